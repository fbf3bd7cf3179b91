"""Inverses that follow a drifting matrix by Newton's iteration (Schulz, 1933)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.linalg.power import largest_eigenvalue

MAX_EIGENVALUE = 1.8
"""Largest eigenvalue of ``c B A`` that a step allows, as estimated; 2 is where B' turns singular.

The gap covers what power iteration may miss.
"""


def newton_step_reference(matrix: Tensor, inverse: Tensor) -> Tensor:
    """The authors' step, ``B' = (1 + a) B - a B A B``.

    ``a = 1`` where ``‖I - B A‖_F < 1``, else ``1 / ‖B A‖_F`` (the supplement of
    NKFAC, section 6). With ``E = I - B A`` the next residual is
    ``(1 - a) E + a E²``. The test's norm grows like √n, so large matrices take
    the slow branch and hardly move; :func:`newton_step` does not.

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


def newton_step(
    matrix: Tensor, inverse: Tensor, rounds: int = 20
) -> tuple[Tensor, Tensor]:
    """A scaled, safeguarded step, ``B' = c (2 B - c B A B)``, at the cost of two products.

    With P = BA, ``c = tr P / ‖P‖_F²`` is the scale at which cB comes closest to
    the inverse (it minimises ``‖I - cP‖_F``), so neither a drift in scale nor
    the size n slows the iteration. Where c would push the largest eigenvalue
    of cP past :data:`MAX_EIGENVALUE` it is reduced to that: B' stays positive
    definite, and every eigenvalue μ of cP in (0, 2) moves to ``μ (2 - μ)``.

    Args:
        matrix: A, symmetric positive definite, ``[…, n, n]``.
        inverse: B, symmetric positive definite, shaped like A.
        rounds: products of the power iteration that finds the largest
            eigenvalue.

    Returns:
        B', symmetric, and the rms eigenvalue error ``‖I - cP‖_F / √n`` that B
        had, ``[…]``; B' has about its square. Not finite where A or B is not.
    """
    size = matrix.shape[-1]
    product = inverse @ matrix
    trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = product.square().sum((-2, -1))
    scale = trace / square
    largest = largest_eigenvalue(product, rounds)
    scale = torch.minimum(scale, MAX_EIGENVALUE / largest)
    error = (size - 2 * scale * trace + scale.square() * square).clamp(min=0).div(size).sqrt()
    factor = scale[..., None, None]
    product.mul_(-factor.square())
    product.diagonal(dim1=-2, dim2=-1).add_(2 * scale[..., None])
    updated = product @ inverse
    return (updated + updated.mT).mul_(0.5), error
