"""The matrix sign in half precision and TF32, against float64 and against Muon's bfloat16."""

import pytest
import torch

from hf_precond.linalg.matrix_functions import half_direction, half_newton_schulz, newton_schulz
from hf_precond.linalg.products import matmul
from tests.linalg.test_matrix_functions import with_condition
from tests.rounding import accelerator

CONDITIONS = [1, 10, 1e2, 1e3, 1e4, 1e6]


def cosine(found, expected):
    """The least of the batch."""
    pair = found.double().flatten(1), expected.flatten(1)
    return float(torch.nn.functional.cosine_similarity(*pair).min())


def damped(size, decay, seed):
    """A second moment of eigenvalues ``1/i^decay``, damped by their mean."""
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    q, _ = torch.linalg.qr(draw)
    values = torch.arange(1, size + 1).double() ** -decay
    return q * (values + values.mean()) @ q.mT


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", [(64, 64), (48, 65), (32, 129), (64, 256)])
def test_half_precision_is_nearer_to_float64_than_bfloat16(shape, condition):
    matrix = with_condition(*shape, condition)
    exact, single = newton_schulz(matrix), matrix.float()
    with accelerator() as seen:
        found = half_newton_schulz(single)
        assert set(seen.operations) == {"float16"}
        peer = newton_schulz(single.bfloat16())
    assert cosine(found, exact) >= max(cosine(peer, exact) - 1e-5, 0.999)
    values, expected = (torch.linalg.svdvals(m.double()) for m in (found, exact))
    torch.testing.assert_close(values, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_direction_with_factors_in_tf32(decay, condition):
    """Products with the factors included, where the peer's are exact."""
    left = torch.linalg.inv(torch.linalg.cholesky(damped(32, decay, 1))).mT
    inverse = torch.linalg.inv(damped(128, decay, 2))
    root = torch.linalg.cholesky(inverse)
    whitened = with_condition(32, 128, condition)
    gradient = torch.linalg.inv(left.mT) @ whitened @ torch.linalg.inv(root)
    exact = left @ newton_schulz(whitened) @ root.mT
    with accelerator():
        peer = left @ newton_schulz(whitened.bfloat16()).double() @ root.mT
        z = matmul(left.mT.float(), gradient.float(), "auto")
        by_rows = matmul(left.float(), half_newton_schulz(z, matmul(z, inverse.float(), "auto")))
        z = matmul(z, root.float(), "auto")
        directly = matmul(matmul(left.float(), half_newton_schulz(z)), root.mT.float(), "auto")
    for found in (by_rows, directly):
        assert cosine(found, exact) >= cosine(peer, exact) - 1e-4
        length = found.double().norm() / exact.norm()
        assert float(length) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("exponent", [-36, -20, 20, 36])
def test_any_scale_fits_into_float16(exponent):
    matrix = with_condition(8, 24, 30)
    weighed = matrix * torch.linspace(1, 2, 24, dtype=torch.float64)
    scale = torch.tensor(10.0**exponent)
    with accelerator():
        for pair in ((matrix, None), (matrix, weighed), (matrix[..., :8], None)):
            pair = [m if m is None else m.float() for m in pair]
            plain = half_newton_schulz(*pair)
            scaled = half_newton_schulz(*(m if m is None else m * scale for m in pair))
            torch.testing.assert_close(scaled, plain, rtol=2e-2, atol=2e-3)


def test_zeros_stay_and_what_is_not_finite_shows():
    matrix = with_condition(8, 24, 30).float()
    matrix[0], matrix[1, 2, 3] = 0, torch.inf
    with accelerator():
        for found in (half_newton_schulz(matrix), half_newton_schulz(matrix, matrix)):
            assert torch.equal(found[0], torch.zeros(8, 24))
            assert found[1].isnan().all() and found[2].isfinite().all()


def test_an_indefinite_gram_matrix_does_not_diverge():
    """As rounding makes it where a factor is worse conditioned than float16 can bear."""
    matrix = with_condition(16, 48, 1e3).float()
    generator = torch.Generator().manual_seed(0)
    for size in (0.1, 1.0, 10.0):
        noise = torch.randn(matrix.shape, generator=generator) * matrix.abs().max() * size
        with accelerator():
            found = half_newton_schulz(matrix, matrix + noise)
        assert found.isfinite().all()


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_direction_in_half_precision_from_end_to_end(decay, condition):
    """Gradients scaled to 64 and factors to 1, float16 like their products; up to its length."""
    left = torch.linalg.inv(torch.linalg.cholesky(damped(32, decay, 1))).mT
    inverse = torch.linalg.inv(damped(128, decay, 2))
    root = torch.linalg.cholesky(inverse)
    whitened = with_condition(32, 128, condition)
    gradient = torch.linalg.inv(left.mT) @ whitened @ torch.linalg.inv(root)
    exact = left @ newton_schulz(whitened) @ root.mT
    half = (gradient * 64 / gradient.abs().amax((-2, -1), keepdim=True)).half()
    low, weight, factor = ((f / f.abs().max()).half().expand(len(half), -1, -1)
                           for f in (left, inverse, root))  # fmt: skip
    with accelerator() as seen:
        peer = left @ newton_schulz(whitened.bfloat16()).double() @ root.mT
        seen.operations.clear()
        z = low.mT @ half
        by_rows = low @ half_direction(z, z @ weight)
        directly = low @ half_direction(z @ factor) @ factor.mT
        assert set(seen.operations) == {"float16"}
    for found in (by_rows, directly):
        assert cosine(found, exact) >= cosine(peer, exact) - 2e-4


def test_heads_keep_their_proportions():
    """Whatever each was divided by before."""
    matrix = with_condition(8, 24, 30).float()
    sizes = torch.tensor([1.0, 1e-2, 10.0] * 4)[: len(matrix)][:, None, None]
    with accelerator():
        for weighed in (None, matrix * torch.linspace(1, 2, 24)):
            plain = half_newton_schulz(matrix, weighed)
            halves = [m if m is None else (m / matrix.abs().max()).half()
                      for m in (matrix, weighed)]  # fmt: skip
            found = half_direction(*halves, sizes, len(matrix)).float()
            expected = plain * sizes
            lengths = (found / found.norm()).flatten(1).norm(dim=1)
            own = (expected / expected.norm()).flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, own, rtol=1e-2, atol=0)
            assert cosine(found, expected.double()) >= 0.999
