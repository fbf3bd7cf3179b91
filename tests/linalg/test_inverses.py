"""Exact inverses by blocks, inverses by Newton's step, and the largest eigenvalue."""

import math

import pytest
import torch

from hf_precond.linalg import inverses
from hf_precond.linalg.inverses import (
    inverse_cholesky,
    largest_eigenvalue,
    newton_step,
    root_without_last,
    spd_block_inverse,
    start_vectors,
    without_last,
)
from tests import rounding

F64 = torch.float64


def spd(*shape, seed=0, condition=100.0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    size = shape[-1]
    basis = torch.linalg.qr(torch.randn(*shape, size, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return (basis * values @ basis.mT).to(dtype)


def moment(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, 2 * shape[-1], generator=generator, dtype=dtype)
    return rows @ rows.mT / shape[-1]


@pytest.mark.parametrize("size", [1, 2, 5, 127, 128, 129, 300, 515])
def test_is_the_inverse(size):
    matrix = spd(size)
    found = spd_block_inverse(matrix)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found @ matrix, identity, rtol=0, atol=1e-11)
    torch.testing.assert_close(found, found.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 20), (2, 3, 9), (0, 4)])
def test_of_a_batch(shape, monkeypatch):
    monkeypatch.setattr(inverses, "CHOLESKY_SIZE", 4)
    batch = spd(*shape)
    torch.testing.assert_close(spd_block_inverse(batch), torch.linalg.inv(batch))


def test_of_a_batch_in_products_of_batches(monkeypatch):
    monkeypatch.setattr(inverses, "CHOLESKY_SIZE", 4)
    batch = spd(3, 21)
    result = torch.empty_like(batch)
    inverses._invert(batch, result)
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


def test_an_inverse_without_the_last_row_is_that_of_the_block_and_has_a_root():
    torch.manual_seed(0)
    rows = torch.randn(2, 30, 6, dtype=torch.float64) + 2
    matrices = rows.mT @ rows
    root = torch.linalg.cholesky(torch.linalg.inv(matrices))
    wanted = torch.zeros_like(matrices)
    wanted[:, :-1, :-1] = torch.linalg.inv(matrices[:, :-1, :-1])
    torch.testing.assert_close(without_last(torch.linalg.inv(matrices)), wanted)
    found = root_without_last(root)
    torch.testing.assert_close(found @ found.mT, wanted)


def eye(size):
    return torch.eye(size, dtype=F64)


def test_the_inverse_is_a_fixed_point_in_a_batch_too():
    batch = torch.stack([spd(8, seed=seed) for seed in range(3)])
    inverse = torch.linalg.inv(batch)
    torch.testing.assert_close(newton_step(batch, inverse)[0], inverse, rtol=1e-10, atol=1e-10)


def test_scaled_step_squares_the_residual_of_the_scaled_start():
    matrix, inverse = spd(6, seed=0), torch.linalg.inv(spd(6, seed=0) + 0.05 * spd(6, seed=1)) * 1.7
    product = inverse @ matrix
    scale = product.trace() / product.square().sum()
    updated, error = newton_step(matrix, inverse)
    residual = eye(6) - scale * product
    assert (eye(6) - updated @ matrix - residual @ residual).norm() < 1e-12
    assert error.item() == pytest.approx((residual.norm() / 6**0.5).item(), rel=1e-9)
    assert torch.equal(updated, updated.mT)


def test_the_scale_of_the_start_is_free():
    matrix, inverse = spd(50, seed=0), torch.linalg.inv(spd(50, seed=0) + 0.05 * spd(50, seed=1))
    first, error = newton_step(matrix, inverse)
    for scale in (1e-6, 0.3, 1.2, 40.0):
        other, same = newton_step(matrix, inverse * scale)
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-12)
        assert same.item() == pytest.approx(error.item(), rel=1e-6)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_a_drift_in_scale_does_not_stall_with_size(size):
    matrix = spd(size)
    exact = torch.linalg.inv(matrix)
    assert (newton_step(matrix, 1.2 * exact)[0] - exact).norm() / exact.norm() < 1e-10


def random_pairs(size, count):
    """Unrelated positive definite pairs of conditions and scales up to 1e4."""
    generator = torch.Generator().manual_seed(size)
    powers = (4 * torch.rand(2 * count, generator=generator)).tolist()
    pairs = torch.stack([spd(size, seed=n, condition=10**power) for n, power in enumerate(powers)])
    scales = 10 ** (4 * torch.rand(count, 1, 1, generator=generator, dtype=F64) - 2)
    return pairs[:count], pairs[count:] * scales


@pytest.mark.parametrize("size", [2, 5, 12, 32])
def test_random_pairs_stay_positive_definite_and_converge(size):
    matrix, inverse = random_pairs(size, 50)
    root = torch.linalg.cholesky(matrix)
    for _ in range(4000):
        inverse, _ = newton_step(matrix, inverse)
        residual = (eye(size) - inverse @ matrix).norm(dim=(1, 2))
        assert (torch.linalg.eigvalsh(root.mT @ (inverse + inverse.mT) / 2 @ root) > 0).all()
        if (residual < 1e-8).all():
            break
    assert (residual < 1e-8).all()


def test_the_largest_eigenvalue_is_kept_below_two():
    # One eigenvalue of B A far above the others: the best scale alone would make it negative.
    values = torch.ones(100, dtype=F64)
    values[0] = 4.0
    updated, _ = newton_step(values.diag(), eye(100))
    assert updated.diagonal().min() > 0
    scale = inverses.MAX_EIGENVALUE / 4
    expected = scale * (2 - scale * values)
    torch.testing.assert_close(updated, expected.diag(), rtol=1e-6, atol=1e-9)


def test_what_is_not_finite_shows_in_the_error():
    matrix = torch.stack([spd(5, seed=0), spd(5, seed=1)])
    inverse = torch.linalg.inv(matrix)
    inverse[1, 0, 0] = float("nan")
    _, error = newton_step(matrix, inverse)
    assert error[0] < 1e-6 and not torch.isfinite(error[1])


def drifting_factors(size, updates, refreshes, decay=0.95):
    """Damped factors at each refresh: averages of second moments of 4n Gaussian rows."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.arange(1, size + 1).float().rsqrt()

    def fresh():
        rows = torch.randn(4 * size, size, generator=generator) * deviations
        return rows.T @ rows / (4 * size)

    factor = fresh()
    for _ in range(refreshes + 1):
        largest = torch.lobpcg(factor, k=1, niter=30)[0]
        yield factor + 0.01 * largest * torch.eye(size)
        for _ in range(updates):
            factor = decay * factor + (1 - decay) * fresh()


def tracked_error(size, updates, refreshes=10):
    """Relative error of the inverse after the last refresh."""
    factors = drifting_factors(size, updates, refreshes)
    inverse = torch.linalg.inv(next(factors))
    for matrix in factors:
        inverse, _ = newton_step(matrix, inverse)
    exact = torch.linalg.inv(matrix)
    return ((inverse - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("updates", [1, 10])
@pytest.mark.parametrize("size", [64, 256])
def test_ten_refreshes_stay_within_a_fortieth_of_the_inverse(size, updates):
    assert tracked_error(size, updates) <= 0.025


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 1024, 2048])
def test_ten_refreshes_of_large_factors(size):
    assert tracked_error(size, 10 if size < 2048 else 2) <= 0.025


def test_the_largest_eigenvalues_of_a_batch_are_those_of_every_matrix_by_itself():
    batch = moment(3, 4, 7)
    alone = torch.stack([torch.stack([largest_eigenvalue(m) for m in row]) for row in batch])
    torch.testing.assert_close(largest_eigenvalue(batch), alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("size", [1, 2, 5, 40, 300])
def test_finds_the_largest_eigenvalue_from_below(size):
    matrix = moment(size)
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
    matrix = moment(20, dtype=torch.float32)
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
    left, right = moment(30, seed=1), moment(30, seed=2)
    exact = torch.linalg.eigvals(left @ right).real.max().item()
    assert largest_eigenvalue(left @ right, rounds=60).item() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("precision", ["highest", "auto"])
@pytest.mark.parametrize("condition", [10, 100, 200])
def test_newtons_step_corrects_and_stays_at_what_its_products_round(condition, precision):
    """TF32 cuts at 2^-10: the residual's limit is about the condition times that."""
    size, generator = 96, torch.Generator().manual_seed(0)
    start = torch.randn(size, size, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(start)
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    inverse = torch.linalg.inv(1.1 * matrix + 0.1 / condition * torch.eye(size)).float()
    residuals = []
    with rounding.accelerator():
        for _ in range(12):
            inverse, _ = newton_step(matrix.float(), inverse, precision)
            lost = torch.eye(size) - inverse.double() @ matrix
            residuals.append(float(lost.norm() / size**0.5))
    limit = condition * 2.0 ** (-10 if precision == "auto" else -22)
    assert residuals[0] < 0.02 + limit and max(residuals[3:]) < limit, residuals


@pytest.mark.parametrize("size", [1, 15, 16, 17, 33, 130])
def test_the_inverse_cholesky_factor_is_torchs(size):
    """By halves down to 16."""
    matrix = torch.cat([spd(1, size), 1e-3 * spd(1, size, seed=1)])
    found, info = inverse_cholesky(matrix, leaf=16)
    torch.testing.assert_close(
        found, torch.linalg.inv(torch.linalg.cholesky(matrix)), rtol=1e-11, atol=1e-12
    )
    assert not info.any()
    matrix[1, -1, -1] = -1.0
    assert [bool(i) for i in inverse_cholesky(matrix, leaf=16)[1]] == [False, True]


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_the_inverse_cholesky_factor_in_float32_errs_as_the_librarys(condition):
    """``L⁻¹ A L⁻ᵀ`` is the identity, to the condition times the unit roundoff."""
    matrix = spd(96, condition=condition, dtype=torch.float32)
    found, _ = inverse_cholesky(matrix, leaf=16)
    lower = torch.linalg.cholesky(matrix)
    library = torch.linalg.solve_triangular(lower, torch.eye(96), upper=False)
    miss, peer = (
        float(torch.dist(f.double() @ matrix.double() @ f.double().T, torch.eye(96).double()))
        for f in (found, library)
    )
    assert miss <= max(3 * peer, 96 * condition * 2**-24)
