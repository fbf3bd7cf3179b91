"""Newton–Schulz against the singular value decomposition."""

import pytest
import torch

from hf_precond.linalg.msign import COEFFICIENTS, STEPS, gram_newton_schulz, newton_schulz


def with_condition(rows, columns, condition, seed=0):
    """A batch of three matrices with singular values spread geometrically."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(draw, full_matrices=False)
    values = torch.logspace(0, -torch.tensor(float(condition)).log10(), min(rows, columns))
    return u @ torch.diag(values.double()) @ vh


def scalar_map(values):
    """What the steps do to singular values that are already scaled."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("shape", [(16, 16), (16, 80), (80, 16), (48, 64)])
def test_newton_schulz_is_the_odd_polynomial_of_the_singular_values(shape):
    matrix = with_condition(*shape, 50)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    scaled = values / values.norm(dim=-1, keepdim=True)
    expected = u @ torch.diag_embed(scalar_map(scaled)) @ vh
    torch.testing.assert_close(newton_schulz(matrix), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("condition", [1, 10, 100])
@pytest.mark.parametrize("shape", [(16, 16), (32, 128), (128, 32), (64, 96)])
def test_singular_values_come_near_one(shape, condition):
    values = torch.linalg.svdvals(newton_schulz(with_condition(*shape, condition)))
    assert values.min() >= 0.6
    assert values.max() <= 1.25


@pytest.mark.parametrize("shape", [(16, 16), (16, 80), (32, 384)])
def test_gram_form_equals_the_direct_one(shape):
    matrix = with_condition(*shape, 100)
    sign = gram_newton_schulz(matrix @ matrix.mT) @ matrix
    torch.testing.assert_close(sign, newton_schulz(matrix), rtol=0, atol=1e-10)


def test_gram_form_in_float32_on_an_ill_conditioned_matrix():
    matrix = with_condition(32, 384, 1e3)
    single = matrix.float()
    sign = gram_newton_schulz(single @ single.mT) @ single
    torch.testing.assert_close(sign.double(), newton_schulz(matrix), rtol=0, atol=2e-2)


def test_zero_stays_zero_and_batches_are_independent():
    matrix = with_condition(8, 24, 10)
    matrix[1] = 0
    sign = newton_schulz(matrix)
    assert torch.equal(sign[1], torch.zeros_like(sign[1]))
    torch.testing.assert_close(sign[2], newton_schulz(matrix[2]), rtol=0, atol=1e-13)
    product = gram_newton_schulz(matrix @ matrix.mT) @ matrix
    assert torch.isfinite(product).all()
    assert torch.equal(product[1], torch.zeros_like(sign[1]))


def test_gram_polynomial_is_equivariant_to_a_left_root():
    """``msign(Qᵀ Z) = Qᵀ msign(Z)``: any root W = A^(-1/2) Q gives the same step."""
    matrix = with_condition(12, 40, 30)
    q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    turned = q @ newton_schulz(q.mT @ matrix)
    torch.testing.assert_close(turned, newton_schulz(matrix), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [-40, -30, -23, 20, 30])
def test_float32_neither_loses_nor_overflows_the_squares_of_entries(exponent):
    matrix = with_condition(12, 20, 30)
    scaled = (matrix * 10.0**exponent).float()
    expected = newton_schulz(scaled.double()).float()
    torch.testing.assert_close(newton_schulz(scaled), expected, rtol=0, atol=1e-4)
