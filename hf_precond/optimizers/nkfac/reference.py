"""The published code of NKFAC and AdaNKFAC, formula by formula.

What it does otherwise than :class:`~hf_precond.optimizers.nkfac.optimizer.NKFAC`'s default
mode: averages that start from zero and are not corrected for it, a power
iteration from the vector of ones, a Newton step whose rate depends on the
size of the matrix, and a schedule of exact inverses counted in steps of the
optimizer, not of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-12


def largest_eigenvalue_from_ones(matrix: Tensor, rounds: int = 10) -> Tensor:
    """The authors' estimate of ``λmax``: power iteration from the vector of ones.

    ``v = 1``; each round ``u = A v / ‖A v‖``, ``v = A u``; the answer is ``‖v‖``
    of the last round. Not a number where the ones lie in A's null space (the
    output-gradient factor of a softmax classifier, or a zero matrix).

    Args:
        matrix: A, symmetric positive semi-definite, ``[…, n, n]``.
        rounds: rounds, each of two products.

    Returns:
        ``[…]``.
    """
    vector = matrix.new_ones(*matrix.shape[:-1], 1)
    for _ in range(rounds):
        vector = matrix @ vector
        vector = matrix @ (vector * (1 / vector.norm(dim=(-2, -1), keepdim=True)))
    return vector.norm(dim=(-2, -1))


def newton_step_reference(matrix: Tensor, inverse: Tensor) -> Tensor:
    """The authors' step, ``B' = (1 + a) B - a B A B``.

    ``a = 1`` where ``‖I - B A‖_F < 1``, else ``1 / ‖B A‖_F`` (the supplement of
    NKFAC, section 6). With ``E = I - B A`` the next residual is
    ``(1 - a) E + a E²``. The test's norm grows like √n, so large matrices take
    the slow branch and hardly move;
    :func:`~hf_precond.linalg.inverses.newton_step` does not.

    Args:
        matrix: A, symmetric positive definite, ``[…, n, n]``.
        inverse: B, an approximation of its inverse, symmetric positive
            definite, shaped like A.
    """
    product = inverse @ matrix
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    far = (identity - product).norm(dim=(-2, -1), keepdim=True) >= 1
    scale = torch.where(far, 1 / product.norm(dim=(-2, -1), keepdim=True), 1.0)
    return ((1 + scale) * identity - scale * product) @ inverse


def average_moment(moment: Tensor, updates: Tensor, mean: Tensor, decay: float) -> Tensor:
    """``A ← A + (1 - b) (S / (‖S‖_F + 1e-12) - A)`` in place, A starting from zero.

    A sum that is not finite changes nothing.

    Args:
        moment: A, ``[n, n]``, changed in place.
        updates: statistics averaged so far, a 0-d tensor, changed in place.
        mean: S: of inputs the mean, of output gradients the sum of outer
            products, ``[n, n]``.
        decay: b, in [0, 1).

    Returns:
        1 where S was not finite, else 0: a 0-d tensor.
    """
    norm = torch.linalg.vector_norm(mean)
    usable = torch.isfinite(norm)
    updates += usable
    change = (mean / (norm + NORM_EPS) - moment) * (1 - decay)
    moment.add_(torch.where(usable, change, 0.0))
    return (~usable).to(torch.int64)


def damped(moment: Tensor, damping: float, floor: float) -> Tensor:
    """``A + λ I``, ``λ = max(floor, damping · λmax)``, the floor where λmax is not a number."""
    shift = damping * largest_eigenvalue_from_ones(moment)
    shift = torch.where(shift > floor, shift, floor)
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return moment + shift[..., None, None] * identity


def is_exact(step: int, inverse_interval: int, exact_interval: int) -> bool:
    """Whether the inverses due at ``step`` are computed exactly instead of by Newton's step."""
    return step <= 2 * inverse_interval or step % (exact_interval * inverse_interval) == 0


def inverted(matrix: Tensor, previous: Tensor, exact: bool, newton_steps: int) -> Tensor:
    """The inverse of a damped factor: exact, or so many Newton steps from the previous one."""
    if exact:
        return torch.linalg.inv(matrix)
    for _ in range(newton_steps):
        previous = newton_step_reference(matrix, previous)
    return previous


def norm_recovered(gradient: Tensor, direction: Tensor) -> Tensor:
    """``direction`` scaled to the Frobenius norm of ``gradient``, their epsilon included."""
    scale = torch.linalg.vector_norm(gradient) / (torch.linalg.vector_norm(direction) + NORM_EPS)
    return direction.mul_(scale)
