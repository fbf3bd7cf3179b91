"""Moments against the sums that they are."""

import pytest
import torch

from hf_precond.statistics import moments
from hf_precond.statistics.moments import (
    Collection,
    as_rows,
    block_moment,
    moment,
    second_moment,
)
from tests.rounding import accelerator


def rows_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("shape", [(20, 7), (5, 12), (1, 1), (0, 4), (3, 0), (300, 260)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_moment_is_the_whole_sum(shape, weighted, constant):
    rows = rows_of(*shape)
    weights = rows_of(shape[0], seed=1).abs() if weighted else None
    behind = torch.cat([rows, torch.ones(shape[0], int(constant), dtype=rows.dtype)], 1)
    expected = behind.T @ (behind if weights is None else weights.diag() @ behind)
    found = moment(rows, weights, constant)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [{}, {"constant": True}, {"blocks": 3}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_half_precision_are_those_of_the_same_numbers(dtype, kind, weighted):
    """Summed in float32: 3,000 rows would be lost in a sum of 8 bits."""
    rows = rows_of(6, 500, 7).abs().to(dtype)
    weights = (rows_of(6, 500, seed=1) > 0).float() if weighted else None
    collection = Collection("input", None, **kind)
    double = None if weights is None else weights.double()
    exact = second_moment(collection, rows.double(), double)
    with accelerator():
        found = second_moment(collection, rows, weights)
    assert found.sum.dtype == found.count.dtype == torch.float32
    torch.testing.assert_close(found.sum.double(), exact.sum, rtol=1e-5, atol=1e-2)
    assert found.count == exact.count


def test_rows_that_the_layer_rounds_enter_as_it_rounds_them():
    """A norm returns float32 under autocast; the linear layer behind it multiplies bfloat16."""
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert as_rows(rows, torch.float32, torch.bfloat16).dtype == torch.float32
    with accelerator():
        assert as_rows(rows, torch.float32).dtype == torch.float32
        found = moment(as_rows(rows, torch.float32, torch.bfloat16))
    rounded = rows.bfloat16().double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), rounded.T @ rounded, rtol=1e-5, atol=1e-4)


def test_so_many_rows_enter_on_an_accelerator_unless_a_number_is_given():
    weight = torch.ones(2, 2)

    def limits():
        return [moments.rows_of(rows, weight) for rows in (None, 0, 7)]

    assert limits() == [0, 0, 7]
    with accelerator():
        assert limits() == [moments.ROWS, 0, 7]


@pytest.mark.parametrize("size", [1, 5, 8, 13, 24])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_blocks_of_half_precision_are_those_of_float64(weighted, constant, blocks, size):
    torch.manual_seed(size)
    rows = torch.randn(40, size).bfloat16()
    # Weights that bfloat16 holds: the product rounds them, and the count does not.
    weights = torch.randint(0, 9, (40,)) / 8 if weighted else None
    exact = rows.double(), None if weights is None else weights.double()
    torch.use_deterministic_algorithms(True)  # memory that nothing was written to is NaN
    try:
        with accelerator():
            found = block_moment(rows, weights, constant, blocks)
            whole = moment(rows, weights, constant)
    finally:
        torch.use_deterministic_algorithms(False)
    error = 1e-2 if weighted else 1e-6  # a weighted row is rounded
    for one, other in (
        (found, block_moment(*exact, constant, blocks)),
        (whole, moment(*exact, constant)),
    ):
        assert one.shape == other.shape and one.dtype == torch.float32
        assert (one - other).abs().max() <= error * other.abs().max()
    if constant and weighted:
        assert whole[size, size] == weights.sum()
