"""Matrix sign, inverses and roots against decompositions in float64; packed triangles."""

import pytest
import torch

from hf_precond.linalg import matrix_functions as functions
from hf_precond.linalg.matrix_functions import (
    COEFFICIENTS,
    STEPS,
    gram_newton_schulz,
    newton_schulz,
    pack,
    packed_size,
    unpack,
)

# Matrix sign: against the singular value decomposition


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
    rotated = q @ newton_schulz(q.mT @ matrix)
    torch.testing.assert_close(rotated, newton_schulz(matrix), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [-40, -30, -23, 20, 30])
def test_float32_neither_loses_nor_overflows_the_squares_of_entries(exponent):
    matrix = with_condition(12, 20, 30)
    scaled = (matrix * 10.0**exponent).float()
    expected = newton_schulz(scaled.double()).float()
    torch.testing.assert_close(newton_schulz(scaled), expected, rtol=0, atol=1e-4)


# Inverses and roots: against eigh

INVERSES = [functions.inverse, functions.inverse_factor]


def moments(batch, size, spread=1e3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(batch, size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.tensor(spread).log10().item(), size, dtype=torch.float64)
    return q @ torch.diag(values) @ q.mT


def power(moment, damping, exponent):
    values, vectors = torch.linalg.eigh(moment)
    mean = values.mean(-1, keepdim=True)
    return vectors @ torch.diag_embed((values + damping * mean) ** exponent) @ vectors.mT


@pytest.mark.parametrize("damping", [1.0, 0.1, 1e-4])
@pytest.mark.parametrize("size", [1, 7, 48])
def test_against_eigh(size, damping):
    moment = moments(3, size)
    expected = power(moment, damping, -1)
    found = functions.inverse(moment, damping)
    assert found.usable.all()
    assert not found.identity.any()
    torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=0)
    factor = functions.inverse_factor(moment, damping).value
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=1e-9, atol=0)


def test_a_given_mean_damps_every_block_alike():
    moment = moments(2, 6)
    moment[1] *= 100
    mean = torch.full((2,), functions.mean_eigenvalue(moment).mean().item(), dtype=torch.float64)
    found = functions.inverse(moment, 0.5, mean).value
    expected = torch.linalg.inv(moment + 0.5 * mean[0] * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    factor = functions.inverse_factor(moment, 0.5, mean).value
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("function", INVERSES)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_or_not_finite_gives_the_identity(function, bad):
    moment = moments(2, 5)
    moment[0] = 0
    moment[0, 0, 0] = bad
    found = function(moment, 1.0)
    assert found.identity.tolist() == [True, False]
    torch.testing.assert_close(found.value[0], torch.eye(5, dtype=torch.float64))


def test_a_tiny_moment_stays_finite():
    found = functions.inverse_factor(torch.full((1, 4, 4), 1e-30), 1.0)
    assert torch.isfinite(found.value).all()
    assert found.value.max() <= 1.01 / functions.FLOOR**0.5


@pytest.mark.parametrize("scale", [1e-6, 1e20, 1e30])
@pytest.mark.parametrize("function", INVERSES)
def test_a_moment_of_any_scale_in_float32(function, scale):
    """Squares of its entries may be beyond the range of float32."""
    moment = moments(2, 6)
    found = function((moment * scale).float(), 0.1)
    assert found.usable.all()
    value = found.value.double()
    value = value if function is functions.inverse else value @ value.mT
    torch.testing.assert_close(value * scale, power(moment, 0.1, -1), rtol=1e-3, atol=1e-3)


def test_a_failed_factorisation_is_tried_with_more_damping():
    moment = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))[None]
    found = functions.inverse(moment, 1e-6)
    assert found.usable.all()
    expected = torch.linalg.inv(moment + 1e-4 * (2 - 1e-5) / 3 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=0)


def test_hopeless_factorisations_are_reported():
    moment = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))[None]
    assert functions.inverse(moment, 1e-3).usable.tolist() == [False]


# Packed triangles


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 33])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_every_entry_returns(size, lead):
    matrix = torch.rand(*lead, size, size, generator=torch.Generator().manual_seed(size))
    matrix = matrix + matrix.mT
    held = pack(matrix)
    assert held.shape == (*lead, packed_size(size)) == (*lead, size * (size + 1) // 2)
    assert torch.equal(unpack(held), matrix)


def test_it_reads_the_lower_triangle_alone():
    matrix = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    lower = matrix.tril()
    assert torch.equal(unpack(pack(matrix)), lower + lower.tril(-1).mT)


def test_packing_is_linear():
    """So that a running average of packed matrices is the packed average."""
    one, two = (torch.rand(4, 4, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(pack(one + 2 * two), pack(one) + 2 * pack(two), rtol=0, atol=1e-15)
