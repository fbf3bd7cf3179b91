"""Running averages of statistics."""

import pytest
import torch

from hf_precond.linalg.products import averaging_weight
from hf_precond.statistics.moments import update_moments


def rows_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_average_alike_until_the_decay_takes_over():
    assert [averaging_weight(k, 0.7) for k in (1, 2, 4, 9)] == [0, 0.5, 0.7, 0.7]
    counts = torch.tensor([1.0, 2, 4, 9])
    expected = torch.tensor([0, 0.5, 0.7, 0.7])
    torch.testing.assert_close(averaging_weight(counts, 0.7), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_averages_have_no_start_up_bias_and_skip_bad_means(dtype):
    moments = [torch.full((2, 3), 99.0, dtype=dtype) for _ in range(2)]
    updates = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    means = rows_of(4, 2, 2, 3)
    means[1, 0, 1, 2] = float("nan")
    means[2, 1, 0, 0] = float("inf")
    dropped = [update_moments(moments, updates, mean, 0.6).tolist() for mean in means]
    assert dropped == [[0, 0], [1, 0], [0, 1], [0, 0]]
    assert [int(count) for count in updates] == [3, 3]
    for number, bad in enumerate((1, 2)):
        expected = torch.zeros(2, 3, dtype=dtype)
        for k, mean in enumerate((means[i, number] for i in range(4) if i != bad), 1):
            keep = min(0.6, 1 - 1 / k)
            expected.copy_(keep * expected.double() + (1 - keep) * mean)
        torch.testing.assert_close(moments[number], expected)
