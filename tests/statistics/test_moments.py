"""Moments against the sums that they are."""

import pytest
import torch

from hf_precond.statistics.moments import moment


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
