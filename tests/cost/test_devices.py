"""Rates of devices: times of kernels by hand, and files that describe one."""

import pytest
import torch

from hf_precond.cost import devices, kernels
from hf_precond.cost.counting import Counts, Kernel
from hf_precond.cost.devices import DEVICES, Device, find_device

PEAK = {"float32": 1, "tf32": 4, "bfloat16": 8}
ROUND = Device("round", PEAK, 1000, start=0.0)


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic():
    product = Kernel("mm", flops=8e12 * 0.6, precision="bfloat16", bytes=1.0)
    assert ROUND.seconds(product) == pytest.approx(1.0)
    assert ROUND.seconds(product._replace(precision="tf32")) == pytest.approx(2.0)
    # A precision that the device lacks runs as float32, without tensor cores.
    assert ROUND.seconds(product._replace(precision="float16")) == pytest.approx(12.0)
    assert ROUND.seconds(product._replace(bytes=1700e9)) == pytest.approx(2.0)
    root = Kernel("linalg_cholesky_ex", flops=0.05e12, precision="float32", factorization=True)
    assert ROUND.seconds(root) == pytest.approx(1.0)


def test_a_kind_of_kernel_reaches_its_share_of_the_bandwidth():
    add = Kernel("add", bytes=850e9)
    assert ROUND.seconds(add) == pytest.approx(1.0)
    assert ROUND.seconds(add._replace(kind=kernels.ALIGNED)) == pytest.approx(1.0)
    for kind, share in devices.RELATIVE.items():
        assert ROUND.seconds(add._replace(kind=kind)) == pytest.approx(1 / share)
    cpu = Device("cpu", PEAK, 1000, kind="cpu", shares=(1.0, 1.0, 0.85))
    assert cpu.seconds(add._replace(kind=kernels.COLUMNS)) == pytest.approx(1.0)


def test_launches_copies_and_rows_take_time_of_their_own():
    device = Device("round", PEAK, 1000, start=2.0)
    product = Kernel("baddbmm", flops=0.6e9, precision="float32", launches=2.5, copied=0.85e9)
    assert device.seconds(product) == pytest.approx(1.5e-3 + 1e-3 + 5e-6)
    # Rows are what a small factorisation waits for, and arithmetic a large one.
    root = Kernel("linalg_cholesky_ex", flops=1.0, factorization=True, rows=1000, launches=10)
    assert device.seconds(root) == pytest.approx(0.63e-3 + 20e-6)
    assert device.seconds(root._replace(flops=0.05e9)) == pytest.approx(1e-3 + 20e-6)


def test_a_gpu_waits_for_the_longer_of_device_and_host():
    small, large = Kernel("add", bytes=0.85e3), Kernel("add", bytes=0.85e9)
    assert ROUND.milliseconds([small] * 1000) == pytest.approx(4.0)
    assert ROUND.milliseconds([small._replace(launches=3.0)] * 1000) == pytest.approx(12.0)
    assert ROUND.milliseconds([large] * 10) == pytest.approx(10.0)
    assert ROUND.average(Counts([large] * 10, steps=5)) == pytest.approx(2.0)
    slow = Device("slow host", PEAK, 1000, start=0.0, launch=26.0)
    assert slow.milliseconds([small] * 1000) == pytest.approx(26.0)
    assert slow.busy([small] * 1000) == pytest.approx(1e-3)
    cpu = Device("cpu", {"float32": 1}, 1000, kind="cpu", launch=4.0, shares=(1.0, 1.0, 0.85))
    assert cpu.milliseconds([large] * 10) == pytest.approx(10.04)


def test_every_device_has_what_a_prediction_needs():
    for name, device in DEVICES.items():
        assert device.peak["float32"] > 0 and device.bandwidth > 0, name
        assert ("tf32" in device.peak) == (device.capability >= (8, 0))
    assert DEVICES["h100"].autocast is torch.bfloat16
    assert DEVICES["t4"].autocast is torch.float16


def test_a_file_describes_a_device(tmp_path):
    path = tmp_path / "h20.toml"
    path.write_text(
        'name = "NVIDIA H20"\nbandwidth = 4000\n[peak]\nfloat32 = 44\ntf32 = 74\nbfloat16 = 148\n'
    )
    device = find_device(str(path))
    peak = {"float32": 44, "tf32": 74, "bfloat16": 148}
    assert device == Device("NVIDIA H20", peak, 4000.0, (9, 0))
    path.write_text("launch = 26\n" + path.read_text())
    assert find_device(str(path)) == Device("NVIDIA H20", peak, 4000.0, (9, 0), launch=26.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bandwidth = 1\n[peak]\nfloat32 = -1", "peak.float32 must be a number above 0"),
        ("bandwidth = 1\n[peak]\ntf32 = 1", "peak.float32 must be"),
        ("[peak]\nfloat32 = 1", "bandwidth must be a number above 0, in GB/s"),
        ("bandwidth = 1\n[peak]\nfloat32 = 1\nfp8 = 1", "peak.fp8 is no precision"),
        ("launch = 0\nbandwidth = 1\n[peak]\nfloat32 = 1", "launch must be .*, in microseconds"),
        ("bandwith = 1\n[peak]\nfloat32 = 1", "bandwith is no key"),
        ("bandwidth = 1\ncapability = 9\n[peak]\nfloat32 = 1", "two integers"),
        ("bandwidth 1", "no TOML"),
    ],
)
def test_a_file_that_is_not_usable_is_refused_in_a_sentence(tmp_path, text, words):
    path = tmp_path / "device.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        find_device(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="h200, h100, a100, l4, t4, cpu"):
        find_device("h1000")


def test_this_processor_is_measured():
    device = devices.measured_cpu(seconds=0.03)
    assert device.kind == "cpu" and device.autocast is None
    assert 1e-4 < device.peak["float32"] < 100 and 0.1 < device.bandwidth < 1e4
    assert 0.1 < device.launch < 1e4
