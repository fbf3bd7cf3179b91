"""Inverses and roots without eigh against those by eigh, in float64."""

import pytest
import torch

from hf_precond.linalg import inverse_roots


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
    found = inverse_roots.inverse(moment, damping)
    assert found.usable.all()
    assert not found.identity.any()
    torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=0)
    factor = inverse_roots.inverse_factor(moment, damping).value
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=1e-9, atol=0)
    root = inverse_roots.inverse_sqrt(moment, damping).value
    torch.testing.assert_close(root, power(moment, damping, -0.5), rtol=1e-8, atol=1e-9)


def test_float32_root_at_the_default_damping():
    moment = moments(2, 385).float()
    found = inverse_roots.inverse_sqrt(moment, 1.0).value.double()
    expected = power(moment.double(), 1.0, -0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_given_mean_damps_every_block_alike():
    moment = moments(2, 6)
    moment[1] *= 100
    mean = torch.full((2,), inverse_roots.mean_eigenvalue(moment).mean().item(), dtype=torch.float64)
    found = inverse_roots.inverse(moment, 0.5, mean).value
    expected = torch.linalg.inv(moment + 0.5 * mean[0] * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    root = inverse_roots.inverse_sqrt(moment, 0.5, mean, blocks=2).value
    torch.testing.assert_close(root @ root, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("function", [inverse_roots.inverse, inverse_roots.inverse_factor, inverse_roots.inverse_sqrt])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_or_not_finite_gives_the_identity(function, bad):
    moment = moments(2, 5)
    moment[0] = 0
    moment[0, 0, 0] = bad
    found = function(moment, 1.0)
    assert found.identity.tolist() == [True, False]
    torch.testing.assert_close(found.value[0], torch.eye(5, dtype=torch.float64))


def test_a_tiny_moment_stays_finite():
    found = inverse_roots.inverse_sqrt(torch.full((1, 4, 4), 1e-30), 1.0)
    assert torch.isfinite(found.value).all()
    assert found.value.max() <= 1.01 / inverse_roots.FLOOR**0.5


@pytest.mark.parametrize("scale", [1e-6, 1e20, 1e30])
@pytest.mark.parametrize("function", [inverse_roots.inverse, inverse_roots.inverse_factor, inverse_roots.inverse_sqrt])
def test_a_moment_of_any_scale_in_float32(function, scale):
    """Squares of its entries may be beyond the range of float32."""
    moment = moments(2, 6)
    found = function((moment * scale).float(), 0.1)
    assert found.usable.all()
    value = found.value.double()
    value = value if function is inverse_roots.inverse else value @ value.mT
    torch.testing.assert_close(value * scale, power(moment, 0.1, -1), rtol=1e-3, atol=1e-3)


def test_a_failed_factorisation_is_tried_with_more_damping():
    moment = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))[None]
    found = inverse_roots.inverse(moment, 1e-6)
    assert found.usable.all()
    expected = torch.linalg.inv(moment + 1e-4 * (2 - 1e-5) / 3 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found.value, expected, rtol=1e-9, atol=0)


def test_hopeless_factorisations_are_reported():
    moment = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))[None]
    assert inverse_roots.inverse(moment, 1e-3).usable.tolist() == [False]
