"""Power iteration: the authors' rounds from ones, and one without a null space to start in."""

import math

import pytest
import torch

from hf_precond.linalg.power import largest_eigenvalue, largest_eigenvalue_from_ones, start_vectors


def spd(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, 2 * shape[-1], generator=generator, dtype=dtype)
    return rows @ rows.mT / shape[-1]


def test_from_ones_is_two_products_a_round_and_the_norm_of_the_last():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    # 1 -> A 1 = (5, 2), u = (5, 2) / sqrt(29), v = A u = (22, 7) / sqrt(29)
    one = largest_eigenvalue_from_ones(matrix, rounds=1)
    assert one.item() == pytest.approx(math.sqrt((22**2 + 7**2) / 29), rel=1e-14)
    exact = torch.linalg.eigvalsh(matrix)[-1].item()
    assert largest_eigenvalue_from_ones(matrix).item() == pytest.approx(exact, rel=1e-10)


def test_from_ones_in_the_null_space_is_not_a_number():
    matrix = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torch.isnan(largest_eigenvalue_from_ones(matrix))


def test_a_batch_is_every_matrix_by_itself():
    batch = spd(3, 4, 7)
    for function in (largest_eigenvalue, largest_eigenvalue_from_ones):
        alone = torch.stack([torch.stack([function(m) for m in row]) for row in batch])
        torch.testing.assert_close(function(batch), alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("size", [1, 2, 5, 40, 300])
def test_finds_the_largest_eigenvalue_from_below(size):
    matrix = spd(size)
    exact = torch.linalg.eigvalsh(matrix)[-1].item()
    found = largest_eigenvalue(matrix).item()
    assert found <= exact * (1 + 1e-12)
    assert found >= exact * 0.97


def test_centred_gradients_of_a_classifier_have_the_right_eigenvalue():
    # Rows of softmax's gradient sum to zero, so the ones are in the null space of their moment.
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(500, 10, generator=generator, dtype=torch.float64) * torch.arange(1, 11)
    rows -= rows.mean(1, keepdim=True)
    matrix = rows.T @ rows
    exact = torch.linalg.eigvalsh(matrix)[-1].item()
    assert largest_eigenvalue(matrix).item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("direction", range(6))
def test_no_axis_hides_the_largest_eigenvalue(direction):
    values = torch.ones(6, dtype=torch.float64)
    values[direction] = 3.0
    assert largest_eigenvalue(values.diag()).item() == pytest.approx(3.0, rel=1e-6)


def test_a_block_without_the_largest_entry_is_found():
    # The largest diagonal entry is 1, the largest eigenvalue 1.8 in the block without it.
    matrix = torch.block_diag(torch.ones(1, 1), torch.full((2, 2), 0.9))
    assert largest_eigenvalue(matrix).item() == pytest.approx(1.8, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_scale_leaves_float32_alone(scale):
    matrix = spd(20, dtype=torch.float32)
    expected = largest_eigenvalue(matrix).item() * scale
    assert largest_eigenvalue(matrix * scale).item() == pytest.approx(expected, rel=1e-4)


def test_zero_is_zero_and_empty_is_zero():
    assert torch.equal(largest_eigenvalue(torch.zeros(2, 5, 5)), torch.zeros(2))
    assert torch.equal(largest_eigenvalue(torch.zeros(2, 0, 0)), torch.zeros(2))
    assert largest_eigenvalue(torch.zeros(0, 4, 4)).shape == (0,)


def test_the_start_is_always_the_same_and_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    first = start_vectors(9, 4, torch.ones(1))
    assert torch.equal(first, start_vectors(9, 4, torch.ones(1)))
    assert torch.equal(state, torch.get_rng_state())


def test_a_product_of_two_positive_definite_matrices():
    left, right = spd(30, seed=1), spd(30, seed=2)
    exact = torch.linalg.eigvals(left @ right).real.max().item()
    assert largest_eigenvalue(left @ right, rounds=60).item() == pytest.approx(exact, rel=1e-2)
