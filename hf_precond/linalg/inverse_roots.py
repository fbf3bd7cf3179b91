"""Inverses and inverse square roots of damped second moments, in batches, without ``eigh``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg.msign import largest_entry

FLOOR = 1e-12
"""Smallest damping in absolute units."""

RETRIES = 3
"""Attempts at a Cholesky factorisation, each with ten times the damping."""


@dataclass
class Refreshed:
    """New factors of a batch.

    Args:
        value: ``[…, n, n]``.
        usable: ``[…]``; where it is False the factorisation failed and the
            previous factor should be kept.
        identity: ``[…]``; where it is True the moment was zero or not finite
            and ``value`` is the identity.
    """

    value: Tensor
    usable: Tensor
    identity: Tensor


def mean_eigenvalue(moment: Tensor) -> Tensor:
    """``tr(A)/n``, ``[…, n, n] -> […]``."""
    return moment.diagonal(dim1=-2, dim2=-1).mean(-1)


def damp(
    moment: Tensor, damping: float, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``A + max(λ·tr(A)/n, floor)·I``, symmetrised; the identity where A is zero or not finite.

    Args:
        moment: A, ``[…, n, n]``, positive semi-definite up to rounding.
        damping: λ, in units of the mean eigenvalue.
        mean: ``[…]``: the mean eigenvalue to use where A is one diagonal block
            of a larger matrix; A's own by default.

    Returns:
        The damped matrix, and where it is the identity (``[…]``).
    """
    mean = mean_eigenvalue(moment) if mean is None else mean
    finite = torch.isfinite(moment).all(-1).all(-1) & torch.isfinite(mean)
    identity = ~(finite & (mean > 0))
    shift = (mean * damping).clamp(min=FLOOR)
    damped = (moment + moment.mT) * 0.5
    damped.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.where(identity[..., None, None], eye, damped), identity


def inverse_factor(moment: Tensor, damping: float, mean: Tensor | None = None) -> Refreshed:
    """W with ``W Wᵀ = (A + λ·tr(A)/n·I)⁻¹``: the inverse transpose of a Cholesky factor.

    W is the inverse square root up to an orthogonal factor, ``W = A^(-1/2) Q``.
    That is all the spectral step needs, since ``msign(Qᵀ Z) = Qᵀ msign(Z)``.

    Args:
        moment: A, ``[…, n, n]``.
        damping: λ, > 0.
        mean: see :func:`damp`.
    """
    lower, usable, identity = _cholesky(moment, damping, mean)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return Refreshed(inverse.mT, usable, identity)


def inverse(moment: Tensor, damping: float, mean: Tensor | None = None) -> Refreshed:
    """``(A + λ·tr(A)/n·I)⁻¹`` by Cholesky; arguments as for :func:`inverse_factor`."""
    lower, usable, identity = _cholesky(moment, damping, mean)
    return Refreshed(torch.cholesky_inverse(lower), usable, identity)


def inverse_sqrt(
    moment: Tensor, damping: float, mean: Tensor | None = None, blocks: int = 1
) -> Refreshed:
    """``(A + λ·tr(A)/n·I)^(-1/2)``, symmetric, by the coupled Newton–Schulz iteration.

    ``T = (3I - Z Y)/2, Y ← Y T, Z ← T Z`` from ``Y = A/‖A‖_F, Z = I`` (Higham,
    "Functions of Matrices", 2008, eq. 6.35): Y tends to the root, Z to its
    inverse. The number of steps follows from λ, which bounds the condition
    number; nothing is read back to the host.

    Args:
        moment: A, ``[…, n, n]``.
        damping: λ, > 0.
        mean: see :func:`damp`.
        blocks: how many blocks share ``mean``.
    """
    damped, identity = damp(moment, damping, mean)
    shape, size = damped.shape, damped.shape[-1]
    largest = largest_entry(damped)  # the squares of entries above 1e19 are beyond float32
    y = damped / largest
    norm = torch.linalg.matrix_norm(y, keepdim=True)
    y = (y / norm).reshape(-1, size, size)
    z = torch.eye(size, dtype=y.dtype, device=y.device).expand_as(y).contiguous()
    for _ in range(root_steps(size * blocks, damping)):
        t = torch.bmm(z, y).mul_(-0.5)
        t.diagonal(dim1=-2, dim2=-1).add_(1.5)
        y, z = torch.bmm(y, t), torch.bmm(t, z)
    value = z.reshape(shape) * norm.rsqrt() * largest.rsqrt()
    value = (value + value.mT) * 0.5
    return Refreshed(value, torch.isfinite(value).all(-1).all(-1), identity)


def root_steps(size: int, damping: float) -> int:
    """Steps until the smallest eigenvalue of a damped matrix of this size has converged.

    It is at least ``λ/(n + λ√n)`` of the Frobenius norm, and grows by 9/4 a
    step while small; six more make it exact.
    """
    smallest = damping / (size + damping * math.sqrt(size))
    return math.ceil(-math.log(smallest) / math.log(2.25)) + 6


def _cholesky(
    moment: Tensor, damping: float, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower factors, where they are usable, and where they are the identity's."""
    mean = mean_eigenvalue(moment) if mean is None else mean
    damped, identity = damp(moment, damping, mean)
    lower, info = torch.linalg.cholesky_ex(damped)
    for attempt in range(1, RETRIES):
        # A CUDA device always retries: asking whether it must would stall the host.
        if not info.is_cuda and not info.any():
            break
        shifts = [(mean * (damping * 10.0**times)).clamp(min=FLOOR) for times in (0, attempt)]
        raised = damped.clone()
        more = torch.where(identity, 0.0, shifts[1] - shifts[0])
        raised.diagonal(dim1=-2, dim2=-1).add_(more[..., None])
        again, again_info = torch.linalg.cholesky_ex(raised)
        lower = torch.where((info == 0)[..., None, None], lower, again)
        info = torch.where(info == 0, info, again_info)
    usable = info == 0
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.where(usable[..., None, None], lower, eye), usable, identity
