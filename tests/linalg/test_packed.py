"""Packed symmetric matrices."""

import pytest
import torch

from hf_precond.linalg.packed import pack, packed_size, unpack


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
