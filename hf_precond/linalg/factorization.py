"""Cholesky inverses and eigendecompositions that are retried where they fail.

A batch is factorised in one call. Each matrix for which that failed is tried
again on its own: as it is, divided by its largest entry (``scaled``), with a
little added to the diagonal too (``damped``), that in double precision
(``float64``), and on the host (``cpu``). Where all of this fails, the caller's
previous result stays (``kept``). Memory that runs out is a failure like any
other: retries need less of it, or none of the device's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hf_precond.compat import devices

RETRIES = ("scaled", "damped", "float64", "cpu", "kept")
"""How a matrix was served that the plain factorisation did not serve."""

Factorise = Callable[[Tensor, float, float], tuple[Tensor, ...]]
Count = Callable[[str], None]
Cause = Literal["out_of_memory", "solver"]

SOLVERS = ("cusolver", "hipsolver", "rocsolver", "magma")
ALLOCATORS = ("can't allocate memory", "status_alloc_failed", "backend out of memory")


def cause(error: RuntimeError) -> Cause | None:
    """Why a factorisation failed; ``None`` for an error of another kind, which must be raised.

    Solver libraries raise plain ``RuntimeError`` for much of what goes wrong
    inside them, and so does the allocator of a CPU.
    """
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or any(name in text for name in ALLOCATORS):
        return "out_of_memory"
    if isinstance(error, torch.linalg.LinAlgError) or any(name in text for name in SOLVERS):
        return "solver"
    return None


def eigh(batch: Tensor, count: Count | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, and eigenvectors, of symmetric matrices.

    ``A = Q diag(λ) Qᵀ``. A matrix that no retry can decompose gets the
    identity and its own diagonal (zeros where that is not finite).

    Args:
        batch: A, ``[…, n, n]``; the lower triangle is read.
        count: called with one of :data:`RETRIES` for every matrix that the
            plain factorisation did not serve.

    Returns:
        ``λ`` ``[…, n]`` and ``Q`` ``[…, n, n]``, columns in the order of λ.
    """
    matrices = batch.reshape(-1, *batch.shape[-2:])

    def kept(index: int) -> tuple[Tensor, ...]:
        diagonal = matrices[index].diagonal()
        identity = torch.eye(len(diagonal), dtype=batch.dtype, device=batch.device)
        return torch.where(torch.isfinite(diagonal), diagonal, 0.0), identity

    (values, vectors), _ = _factorised(matrices, _descending_eigh, kept, count)
    return values.reshape(batch.shape[:-1]), vectors.reshape(batch.shape)


def spd_inverse(
    batch: Tensor, previous: Tensor, count: Count | None = None
) -> tuple[Tensor, list[int]]:
    """Inverses of symmetric positive definite matrices, by Cholesky's factorisation.

    A matrix that no retry can factorise keeps its previous inverse. Retries
    from ``damped`` on invert ``A + δ I`` with ``δ = n · eps · max|A|``, which
    is at rounding level.

    Args:
        batch: A, ``[b, n, n]``; the lower triangle is read.
        previous: the previous inverses, ``[b, n, n]``.
        count: see :func:`eigh`.

    Returns:
        The inverses, ``[b, n, n]``, and the indices of those that are the
        previous ones.
    """
    (inverses,), failed = _factorised(batch, _cholesky_inverse, lambda i: (previous[i],), count)
    return inverses, failed


def _factorised(
    matrices: Tensor,
    factorise: Factorise,
    kept: Callable[[int], tuple[Tensor, ...]],
    count: Count | None,
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Factorise a batch ``[b, n, n]``, and one by one the matrices for which that failed."""
    try:
        results = factorise(matrices, 1.0, 0.0)
        if _finite(results):
            return results, []
    except RuntimeError as error:
        if cause(error) is None:
            raise
    parts, failed = [], []
    for index, matrix in enumerate(matrices):
        result, name = _retry(matrix, factorise)
        if result is None:
            failed.append(index)
        if name and count is not None:
            count(name)
        parts.append([part.to(matrix) for part in result or kept(index)])
    return tuple(torch.stack(columns) for columns in zip(*parts, strict=True)), failed


def _retry(matrix: Tensor, factorise: Factorise) -> tuple[tuple[Tensor, ...] | None, str]:
    """The first attempt that serves ``matrix``, ``[n, n]``: its result, if any, and its name."""
    if not _finite([matrix]):
        return None, "kept"
    scale = float(matrix.abs().max()) or 1.0
    shift = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    device, host, double = matrix.device, torch.device("cpu"), torch.float64
    attempts = [
        ("", device, matrix.dtype, 1.0, 0.0),
        ("scaled", device, matrix.dtype, scale, 0.0),
        ("damped", device, matrix.dtype, scale, shift),
        ("float64", device, double, scale, shift),
        ("cpu", host, double, scale, shift),
    ]
    for name, place, dtype, divisor, damping in attempts[: 4 if device == host else 5]:
        if dtype == double and devices.widest(place) != double:
            continue
        try:
            results = factorise(matrix.to(place, dtype)[None], divisor, damping)
            results = tuple(part[0].to(matrix) for part in results)
        except RuntimeError as error:
            if cause(error) is None:
                raise
            continue
        if _finite(results):
            return results, name
    return None, "kept"


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite: one reading from the device."""
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _descending_eigh(batch: Tensor, scale: float, damping: float) -> tuple[Tensor, ...]:
    values, vectors = devices.kernel(torch.linalg.eigh, _scaled_and_damped(batch, scale, damping))
    return (values.flip(-1) - damping) * scale, vectors.flip(-1)


def _cholesky_inverse(batch: Tensor, scale: float, damping: float) -> tuple[Tensor, ...]:
    factor, info = devices.kernel(
        torch.linalg.cholesky_ex, _scaled_and_damped(batch, scale, damping)
    )
    inverse = devices.kernel(torch.cholesky_inverse, factor)
    # A failed factorisation leaves finite numbers behind; NaN marks it without a host check here.
    return (inverse.masked_fill((info != 0)[:, None, None], torch.nan) / scale,)


def _scaled_and_damped(batch: Tensor, scale: float, damping: float) -> Tensor:
    """``A / scale + damping I``; A itself where that is what it is."""
    if (scale, damping) == (1.0, 0.0):
        return batch
    result = batch / scale
    result.diagonal(dim1=-2, dim2=-1).add_(damping)
    return result
