"""Exact inverses by blocks."""

import pytest
import torch

from hf_precond.linalg import block_inverse
from hf_precond.linalg.block_inverse import spd_block_inverse


def spd(*shape, seed=0, condition=100.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    size = shape[-1]
    basis = torch.linalg.qr(torch.randn(*shape, size, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return (basis * values @ basis.mT).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 5, 127, 128, 129, 300, 515])
def test_is_the_inverse(size):
    matrix = spd(size)
    found = spd_block_inverse(matrix)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found @ matrix, identity, rtol=0, atol=1e-11)
    torch.testing.assert_close(found, found.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 9), (0, 4)])
def test_of_a_batch(shape, monkeypatch):
    monkeypatch.setattr(block_inverse, "LEAF", 4)
    batch = spd(*shape)
    torch.testing.assert_close(spd_block_inverse(batch), torch.linalg.inv(batch))


def test_of_a_batch_in_products_of_batches(monkeypatch):
    monkeypatch.setattr(block_inverse, "LEAF", 4)
    batch = spd(3, 21)
    result = torch.empty_like(batch)
    block_inverse._invert(batch, result)
    torch.testing.assert_close(result, torch.linalg.inv(batch))


@pytest.mark.parametrize(("condition", "bound"), [(1e2, 1e-5), (1e3, 2e-4)])
def test_well_conditioned_in_float32(condition, bound):
    matrix = spd(400, condition=condition, dtype=torch.float32)
    exact = torch.linalg.inv(matrix.double())
    error = (spd_block_inverse(matrix).double() - exact).norm() / exact.norm()
    assert error < bound


@pytest.mark.parametrize("place", [(0, 0), (250, 3), (299, 299)])
def test_what_cannot_be_inverted_shows_on_the_diagonal(place):
    good, poisoned, indefinite = spd(300), spd(300), spd(300)
    poisoned[place] = poisoned[place[::-1]] = float("nan")
    indefinite[200, 200] = -1.0
    found = spd_block_inverse(torch.stack([good, poisoned, indefinite]))
    finite = torch.isfinite(found.diagonal(dim1=1, dim2=2)).all(1)
    assert finite.tolist() == [True, False, False]
    assert torch.isfinite(found[0]).all()
