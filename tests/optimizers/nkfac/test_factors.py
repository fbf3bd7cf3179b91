"""Averages of unit moments, on the host's path and on the device's; norm recovery; the block."""

import pytest
import torch

from hf_precond.optimizers.nkfac import factors
from hf_precond.optimizers.nkfac.factors import KroneckerBlock, recovery

PATHS = [factors._average_on_host, factors._average_on_device]


def moment_of(seed, size=6, dtype=torch.float32):
    rows = torch.randn(9, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows.T @ rows).to(dtype)


def run(average, totals, decay=0.7):
    moment, updates = torch.zeros(6, 6), torch.zeros((), dtype=torch.int64)
    dropped = 0
    for total in totals:
        dropped += int(average([moment], [updates], [total], decay))
    return moment, int(updates), dropped


@pytest.mark.parametrize("average", PATHS)
def test_is_the_average_written_out(average):
    moment, updates, dropped = run(average, [moment_of(seed) for seed in range(8)])
    expected = torch.zeros(6, 6)
    for seed in range(8):
        keep = min(0.7, 1 - 1 / (seed + 1))
        expected = keep * expected + (1 - keep) * moment_of(seed) / moment_of(seed).norm()
    torch.testing.assert_close(moment, expected, rtol=1e-6, atol=1e-7)
    assert (updates, dropped) == (8, 0)


@pytest.mark.parametrize("average", PATHS)
@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e30])
def test_scale_leaves_no_trace_even_where_squares_leave_float32(average, scale):
    found, _, dropped = run(average, [scale * moment_of(seed) for seed in range(3)])
    torch.testing.assert_close(found, run(average, [moment_of(seed) for seed in range(3)])[0])
    assert dropped == 0


@pytest.mark.parametrize("average", PATHS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (5, 5)])
def test_one_number_that_is_not_finite_drops_the_sum(average, bad, place):
    poisoned = moment_of(1)
    poisoned[place] = bad
    found, updates, dropped = run(average, [moment_of(0), poisoned, moment_of(2)])
    assert torch.equal(found, run(average, [moment_of(0), moment_of(2)])[0])
    assert (updates, dropped) == (2, 1)


@pytest.mark.parametrize("average", PATHS)
def test_zero_says_nothing_and_is_no_failure(average):
    found, updates, dropped = run(average, [moment_of(0), torch.zeros(6, 6)])
    assert torch.equal(found, run(average, [moment_of(0)])[0])
    assert (updates, dropped) == (1, 0)
    assert run(average, [torch.zeros(6, 6)])[1:] == (0, 0)


def test_norm_recovery_of_a_zero_direction_stays_zero():
    zero, norm = torch.zeros(2, 2), torch.linalg.vector_norm
    assert torch.equal(zero * recovery(norm(torch.ones(2, 2)), norm(zero)), zero)
    found = torch.eye(2) * recovery(norm(3 * torch.ones(2, 2)), norm(torch.eye(2)))
    assert found.norm() == pytest.approx(6.0)


def test_the_identity_for_a_side_without_factor():
    left = moment_of(0)
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    dense = torch.kron(left, torch.eye(4))
    found = KroneckerBlock(left, None).apply(gradient)
    torch.testing.assert_close(found.flatten(), dense @ gradient.flatten())
    assert KroneckerBlock(None, None).apply(gradient) is gradient
