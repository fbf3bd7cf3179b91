"""Newton's iteration for the inverse: the authors' rule and the scaled, safeguarded one."""

import pytest
import torch

from hf_precond.linalg import newton
from hf_precond.linalg.newton import newton_step, newton_step_reference

F64 = torch.float64


def spd(size, seed, condition=100.0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=F64)
    return (basis * values @ basis.T).to(dtype)


def eye(size):
    return torch.eye(size, dtype=F64)


@pytest.mark.parametrize("drift", [0.01, 5.0], ids=["fast branch", "slow branch"])
def test_reference_residual_is_1_minus_a_E_plus_a_E_squared(drift):
    matrix, inverse = spd(6, 0), torch.linalg.inv(spd(6, 0) + drift * 0.1 * spd(6, 1))
    product = inverse @ matrix
    residual = eye(6) - product
    if residual.norm() < 1:
        assert drift < 1
        scale = 1.0
    else:
        assert drift > 1
        scale = 1 / product.norm()
    after = eye(6) - newton_step_reference(matrix, inverse) @ matrix
    expected = (1 - scale) * residual + scale * residual @ residual
    assert (after - expected).norm() < 1e-12


def test_reference_numbers():
    matrix = torch.diag(torch.tensor([4.0, 1.0], dtype=F64))
    near = newton_step_reference(matrix, torch.diag(torch.tensor([0.2, 0.9], dtype=F64)))
    torch.testing.assert_close(near, torch.diag(torch.tensor([0.24, 0.99], dtype=F64)))
    far = newton_step_reference(matrix, eye(2))
    scale = 17**-0.5
    expected = torch.diag(torch.tensor([1 + scale - 4 * scale, 1.0], dtype=F64))
    torch.testing.assert_close(far, expected)
    assert far[0, 0].item() == pytest.approx(0.272393, abs=1e-6)


@pytest.mark.parametrize("step", [newton_step_reference, lambda a, b: newton_step(a, b)[0]])
def test_the_inverse_is_a_fixed_point_in_a_batch_too(step):
    batch = torch.stack([spd(8, seed) for seed in range(3)])
    inverse = torch.linalg.inv(batch)
    torch.testing.assert_close(step(batch, inverse), inverse, rtol=1e-10, atol=1e-10)


def test_scaled_step_squares_the_residual_of_the_scaled_start():
    matrix, inverse = spd(6, 0), torch.linalg.inv(spd(6, 0) + 0.05 * spd(6, 1)) * 1.7
    product = inverse @ matrix
    scale = product.trace() / product.square().sum()
    updated, error = newton_step(matrix, inverse)
    residual = eye(6) - scale * product
    assert (eye(6) - updated @ matrix - residual @ residual).norm() < 1e-12
    assert error.item() == pytest.approx((residual.norm() / 6**0.5).item(), rel=1e-9)
    assert torch.equal(updated, updated.mT)


def test_the_scale_of_the_start_is_free():
    matrix, inverse = spd(50, 0), torch.linalg.inv(spd(50, 0) + 0.05 * spd(50, 1))
    first, error = newton_step(matrix, inverse)
    for scale in (1e-6, 0.3, 1.2, 40.0):
        other, same = newton_step(matrix, inverse * scale)
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-12)
        assert same.item() == pytest.approx(error.item(), rel=1e-6)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_a_drift_in_scale_does_not_stall_with_size(size):
    # B A = 1.2 I: the authors' test sees .2 sqrt(n) and takes the slow branch from n = 25.
    matrix = spd(size, 0)
    inverse = 1.2 * torch.linalg.inv(matrix)
    exact = torch.linalg.inv(matrix)
    ours = (newton_step(matrix, inverse)[0] - exact).norm() / exact.norm()
    theirs = (newton_step_reference(matrix, inverse) - exact).norm() / exact.norm()
    assert ours < 1e-10
    if size >= 64:
        assert theirs > 0.15


def random_pairs(size, count):
    """Unrelated positive definite pairs of conditions and scales up to 1e4."""
    generator = torch.Generator().manual_seed(size)
    powers = (4 * torch.rand(2 * count, generator=generator)).tolist()
    matrices = [spd(size, seed, 10 ** powers[seed]) for seed in range(count)]
    starts = [spd(size, count + seed, 10 ** powers[count + seed]) for seed in range(count)]
    scales = 10 ** (4 * torch.rand(count, 1, 1, generator=generator, dtype=F64) - 2)
    return torch.stack(matrices), torch.stack(starts) * scales


@pytest.mark.parametrize("rule", ["reference", "scaled"])
@pytest.mark.parametrize("size", [2, 5, 12, 32])
def test_random_pairs_stay_positive_definite_and_converge(size, rule):
    matrix, inverse = random_pairs(size, 50)
    root = torch.linalg.cholesky(matrix)
    for _ in range(4000):
        if rule == "reference":
            inverse = newton_step_reference(matrix, inverse)
        else:
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
    scale = newton.MAX_EIGENVALUE / 4
    expected = scale * (2 - scale * values)
    torch.testing.assert_close(updated, expected.diag(), rtol=1e-6, atol=1e-9)


def test_what_is_not_finite_shows_in_the_error():
    matrix = torch.stack([spd(5, 0), spd(5, 1)])
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


def tracked_errors(size, updates, refreshes=10):
    """Relative errors of the inverse after the last refresh: of ours, of the authors' rule."""
    factors = drifting_factors(size, updates, refreshes)
    ours = theirs = torch.linalg.inv(next(factors))
    for matrix in factors:
        ours, _ = newton_step(matrix, ours)
        theirs = newton_step_reference(matrix, theirs)
    exact = torch.linalg.inv(matrix)
    return [((found - exact).norm() / exact.norm()).item() for found in (ours, theirs)]


@pytest.mark.parametrize("updates", [1, 10])
@pytest.mark.parametrize("size", [64, 256])
def test_ten_refreshes_stay_within_a_fortieth_of_the_inverse(size, updates):
    ours, theirs = tracked_errors(size, updates)
    assert ours <= 0.025, (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 1024, 2048])
def test_ten_refreshes_of_large_factors(size):
    ours, theirs = tracked_errors(size, 10 if size < 2048 else 2)
    assert ours <= 0.025, (ours, theirs)


def test_the_authors_rule_stalls_on_averages_that_start_from_zero():
    # Their average after 21 and 31 updates is .659 and .796 of what it should be.
    size, generator = 256, torch.Generator().manual_seed(0)
    rows = torch.randn(4 * size, size, generator=generator, dtype=F64)
    factor = rows.T @ rows / (4 * size) + 0.01 * eye(size)
    start, drifted = torch.linalg.inv(0.659 * factor), 0.796 * factor
    exact = torch.linalg.inv(drifted)
    errors = [
        ((found - exact).norm() / exact.norm()).item()
        for found in (start, newton_step_reference(drifted, start), newton_step(drifted, start)[0])
    ]
    assert errors[0] == pytest.approx(0.208, abs=1e-3)
    assert errors[1] > 0.18 and errors[2] < 1e-10
