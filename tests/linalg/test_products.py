import pytest
import torch

from hf_precond.linalg.products import matmul


@pytest.mark.parametrize("precision", ["highest", "tf32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_cpu_every_setting_is_the_plain_product(precision, dtype):
    a, b = torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, 5, 2, dtype=dtype)
    assert torch.equal(matmul(a, b, precision), a @ b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "low", "high"),
    [("highest", 0.0, 1e-6), ("tf32", 1e-5, 1e-3), ("bf16", 1e-3, 1e-2)],
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
