import pytest
import torch

from hf_precond.compat import devices
from hf_precond.linalg.products import arithmetic, matmul


@pytest.mark.parametrize("precision", ["auto", "highest", "tf32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_cpu_every_setting_is_the_plain_product(precision, dtype):
    a, b = torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, 5, 2, dtype=dtype)
    assert torch.equal(matmul(a, b, precision), a @ b)


@pytest.mark.parametrize(
    ("precision", "with_tf32", "without"),
    [
        ("auto", ("tf32", "half", "highest"), ("highest", "half", "highest")),
        ("tf32", ("tf32", "half", "highest"), ("highest", "half", "highest")),
        ("bf16", ("bf16", "half", "highest"), ("bf16", "half", "highest")),
        ("highest", ("highest",) * 3, ("highest",) * 3),
    ],
)
def test_what_a_setting_means(precision, with_tf32, without, monkeypatch):
    tensor, kinds = torch.zeros(1, device="meta"), ("factor", "sign", "solve")
    for answer, expected in ((True, with_tf32), (False, without)):
        monkeypatch.setattr(devices, "has_tf32", lambda device, answer=answer: answer)
        assert tuple(arithmetic(precision, tensor, kind) for kind in kinds) == expected
        for exact in (tensor.double(), torch.zeros(1)):
            assert {arithmetic(precision, exact, kind) for kind in kinds} == {"highest"}


def test_tf32_is_asked_of_the_device(monkeypatch):
    capability = {0: (7, 5), 1: (8, 0), 2: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[d.index])
    found = [devices.has_tf32.__wrapped__(torch.device("cuda", index)) for index in capability]
    assert found == [False, True, True]
    assert not devices.has_tf32(torch.device("mps")) and not devices.has_tf32(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "low", "high"),
    [("highest", 0.0, 1e-6), ("tf32", 1e-5, 1e-3), ("auto", 1e-5, 1e-3), ("bf16", 1e-3, 1e-2)],
)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_rounding_is_that_of_the_setting(precision, low, high):
    torch.manual_seed(0)
    a, b = torch.randn(256, 256, device="cuda"), torch.randn(256, 256, device="cuda")
    exact = a.double() @ b.double()
    found = matmul(a, b, precision)
    assert found.dtype == torch.float32
    error = float((found - exact).norm() / exact.norm())
    assert low <= error <= high
