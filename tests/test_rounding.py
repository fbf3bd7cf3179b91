"""The helper that rounds as an accelerator does, against numbers written out."""

import pytest
import torch

from hf_precond.compat import devices
from hf_precond.linalg.products import float32_products, matmul
from tests.rounding import accelerator, tf32


def test_tf32_keeps_ten_bits():
    values = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, -(1 + 2**-11), 3 * 2.0**100, torch.inf])
    expected = torch.tensor([1.0, 1 + 2**-10, 1.0, -1.0, 3 * 2.0**100, torch.inf])
    assert torch.equal(tf32(values), expected)
    assert tf32(torch.tensor([torch.nan])).isnan()


@pytest.mark.parametrize(
    ("precision", "low", "high"),
    [("highest", 0.0, 1e-6), ("tf32", 1e-4, 1e-3), ("auto", 1e-4, 1e-3), ("bf16", 1e-3, 1e-2)],
)
def test_the_rounding_is_that_of_the_setting(precision, low, high):
    torch.manual_seed(0)
    a, b = torch.randn(3, 64, 256), torch.randn(3, 256, 64)
    exact = a.double() @ b.double()
    with accelerator() as seen:
        found = matmul(a, b, precision)
    assert found.dtype == torch.float32
    assert low <= float((found - exact).norm() / exact.norm()) <= high
    kind = {"highest": "float32", "bf16": "bfloat16"}.get(precision, "tf32")
    assert seen.operations == {kind: 2 * 3 * 64 * 256 * 64}


def test_products_outside_and_of_float64_are_exact():
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    plain, double = a @ b, a.double() @ b.double()
    with accelerator():
        with float32_products("tf32", a):
            assert not torch.equal(a @ b, plain)
            assert torch.equal(a.double() @ b.double(), double)
        assert torch.equal(a @ b, plain)
        assert devices.is_accelerator(a) and not a.is_cpu
    assert not devices.is_accelerator(a) and a.is_cpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32_and_rounded_once(dtype):
    ones = torch.ones(1, 2**12, dtype=dtype)
    small = torch.full((2**12, 1), 2.0**-6, dtype=dtype)
    c = torch.tensor([[1.0]], dtype=dtype)
    with accelerator():
        assert float(ones @ small) == 64
        assert float(torch.addmm(c, ones, small, beta=2, alpha=0.5)) == 34
        assert float(torch.mm(ones, small, out_dtype=torch.float32)) == 64
        assert torch.mm(ones, small, out_dtype=torch.float32).dtype == torch.float32
        assert float(c.clone().addmm_(ones, small)) == 65


def test_out_is_written():
    a, out = torch.randn(4, 4), torch.empty(4, 4)
    with accelerator():
        assert matmul(a, a, "tf32", out) is out
        assert torch.equal(out, tf32(a) @ tf32(a))
