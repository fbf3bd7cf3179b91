"""Triangles in bands of rows against whole matrices."""

import pytest
import torch

from hf_precond.linalg.banded import (
    WHOLE,
    add_lower_product,
    banded,
    banded_size,
    bands,
    symmetric,
)

SIZES = [1, 7, 256, 257, 400, 768, 1100]


def samples(size):
    matrix = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    return matrix + matrix.mT


@pytest.mark.parametrize("size", SIZES)
def test_bands_hold_every_entry_of_a_symmetric_matrix(size):
    matrix = samples(size)
    upper = torch.full_like(matrix, torch.nan).triu(1)
    kept = banded(matrix)
    assert kept.shape == (2, banded_size(size))
    assert torch.equal(symmetric(kept, size), matrix)
    # What stands above the diagonal blocks of a matrix is never read.
    height = bands(size)[0][1]
    above = torch.full_like(matrix, torch.nan).triu(height)
    assert torch.isfinite(banded(torch.where(above.isnan(), upper, matrix))).all()


def test_bands_take_little_more_than_half():
    for size, most in ((384, 0.667), (768, 0.584), (1024, 0.563), (2048, 0.563)):
        assert banded_size(size) <= most * size**2
    assert banded_size(WHOLE) == WHOLE**2


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("size", [7, 257, 400, 1100])
def test_lower_products_are_added_up_to_the_diagonal_at_least(size, kept):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, size, 5, generator=generator, dtype=torch.float64)
    matrix = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    expected = 0.9 * matrix + 0.1 * root @ root.mT
    place = banded(matrix).clone() if kept else matrix
    result = add_lower_product(place, root, root.mT, beta=0.9, alpha=0.1)
    assert result is place
    found = symmetric(result, size) if kept else result
    whole = expected if kept else expected.tril()
    torch.testing.assert_close(found if kept else found.tril(), whole)


@pytest.mark.parametrize("size", [7, 300])
def test_without_the_old_value_nothing_of_it_is_read(size):
    root = torch.randn(1, size, 3)
    place = torch.full((1, banded_size(size)), torch.nan)
    result = symmetric(add_lower_product(place, root, root.mT, beta=0.0), size)
    torch.testing.assert_close(result, root @ root.mT)
