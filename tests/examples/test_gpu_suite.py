"""The GPU suite in tiny sizes on the CPU, and its tables of what is counted."""

import importlib
import importlib.util
import json
import sys

import pytest
import torch

from tests.examples.scripts import EXAMPLES


@pytest.fixture(scope="module")
def folder():
    sys.path.insert(0, str(EXAMPLES / "benchmarks"))
    yield
    sys.path.remove(str(EXAMPLES / "benchmarks"))


@pytest.fixture(scope="module")
def gpu(folder):
    return importlib.import_module("gpu")


@pytest.fixture(scope="module")
def gpu_tables(folder):
    return importlib.import_module("gpu_tables")


@pytest.mark.slow
def test_the_suite_runs_is_resumed_and_stops_at_its_limit(gpu, tmp_path, capsys):
    words = ["--out", str(tmp_path), "--device", "cpu", "--tiny"]
    assert gpu.main([*words, "--limit", "0"]) == 3
    assert "no time is left" in capsys.readouterr().out
    assert gpu.main([*words, "--limit", "500"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["about"]["torch"] == torch.__version__ and found["about"]["tiny"]
    assert found["correctness"]["passed"] and found["convergence"]["complete"]
    (rows,) = found["cost"].values()
    assert set(rows) == set(gpu.ARMS) and rows["adamw"]["ratio"] == 1.0
    for arm, row in rows.items():
        assert row["ms"] > 0 and row["state_mib"] > 0, arm
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "convergence" / "loss.png").exists() == drawn
    capsys.readouterr()
    # Nothing but the bench is run again, and that finds all it needs.
    assert gpu.main([*words, "--limit", "500"]) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert "ms" not in capsys.readouterr().out


def test_results_of_another_card_are_not_mixed(gpu, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"about": {"card": "another"}}))
    with pytest.raises(SystemExit, match="another card"):
        gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "speed"], "--only speed"), (["--device", "cuda"], "no CUDA device")],
)
def test_mistakes_are_said(gpu, words, message, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), *words])
    assert message in capsys.readouterr().err


def test_a_card_is_known_by_its_name(gpu):
    for name, key in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40", None),
    ):
        assert gpu._known_card(name) == key


def launch(number, start, name="cudaLaunchKernel", cat="cuda_runtime"):
    return {"cat": cat, "name": name, "ts": start, "dur": 2, "args": {"correlation": number}}


def ran(number, duration, name, cat="kernel", start=1000):
    event = launch(number, start, name, cat)
    return event | {"dur": duration}


def test_kernels_belong_to_the_part_that_launched_them(gpu):
    step = {"cat": "user_annotation", "name": gpu.STEP, "dur": 10}
    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        # The second step comes first: a trace has no order.
        *(step | {"ts": 120}, step | {"ts": 20}, step | {"ts": 20, "cat": "gpu_user_annotation"}),
        step | {"ts": 0, "dur": 500, "name": "Optimizer.step#AdamW.step"},
        *(launch(1, 5), ran(1, 3000, "gemm")),
        # Launched in a step's last moment, run long after it; by the driver's interface.
        *(launch(2, 30, "cuLaunchKernelEx", "cuda_driver"), ran(2, 500, "adam")),
        *(launch(3, 25), ran(3, 100, "Memset (Device)", "gpu_memset")),
        *(launch(4, 20), ran(4, 400, "Memcpy DtoD", "gpu_memcpy")),
        # Launched by the passes, run while the host is in a step.
        *(launch(5, 31), ran(5, 1000, "gemm", start=125)),
        # A graph: one launch, several kernels.
        *(launch(6, 125, "cudaGraphLaunch"), ran(6, 300, "adam"), ran(6, 200, "norm")),
        {"cat": "cuda_runtime", "name": "cudaEventQuery", "ts": 126, "dur": 1},
        # Whose launch is unknown.
        ran(7, 9000, "other"),
    ]
    passes, steps = gpu.kernels_by_part(events)
    assert passes == [("gemm", 3000), ("gemm", 1000)]
    assert [sorted(part) for part in steps] == [
        [("Memcpy DtoD", 400), ("Memset (Device)", 100), ("adam", 500)],
        [("adam", 300), ("norm", 200)],
    ]
    figures = gpu.kernel_figures([*events, step | {"ts": 220}])
    assert (figures["passes_kernels"], figures["passes_kernels_ms"]) == (1, 1.333)
    assert (figures["step_kernels"], figures["step_kernels_plain"]) == (2, 2)
    assert (figures["step_kernels_ms"], figures["step_kernels_plain_ms"]) == (0.5, 0.5)
    assert list(figures["largest"].items())[:2] == [
        ("adam", [0.2667, 0.7]),
        ("Memcpy DtoD", [0.1333, 0.3]),
    ]
    assert gpu.kernel_figures([])["step_kernels"] == 0


def test_the_hosts_time_for_a_launch(gpu):
    row = {"passes_kernels": 1204, "passes_host_ms": 30.1}
    assert gpu._microseconds_a_launch(row) == pytest.approx(25.0)
    assert gpu._microseconds_a_launch({"passes_host_ms": 30.1}) is None


def test_a_row_fits_the_terminal(gpu):
    row = {
        "ms": 12345.67, "ratio": 12.345, "predicted": 1.234,
        "predicted_on_this_host": 1.234, "step_ms": 1234.567,
        "step_host_ms": 1234.567, "step_kernels": 12345, "step_kernels_plain": 1234,
        "step_kernels_ms": 123.456, "peak_mib": 12345,
    }  # fmt: skip
    assert len(f"{'llama-124m 65536':18} {gpu.ARMS[5]:24} {gpu._row(row)}") <= 160
    assert gpu._row({"ms": 1.0, "ratio": 1.0}) == "     1.00 ms  1.000"


@pytest.mark.slow
def test_the_tables_are_printed(gpu_tables, capsys):
    gpu_tables.main(["--models", "tiny", "--tokens", "64,256"])
    lines = capsys.readouterr().out.splitlines()
    for arm in gpu_tables.ARMS[2:]:
        assert sum(line.startswith(f"| {arm} |") for line in lines) == 2, arm
        assert sum(line.startswith(f"| tiny | {arm} |") for line in lines) == 1, arm
