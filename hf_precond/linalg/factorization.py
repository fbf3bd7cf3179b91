"""Cholesky inverses and eigendecompositions that are retried where they fail.

A batch is factorised in one call. Each matrix for which that failed is tried
again on its own: as it is, divided by its largest entry (``scaled``), with a
little added to the diagonal too (``damped``), that in double precision
(``float64``), and on the host (``cpu``). Where all of this fails, the caller's
previous result stays (``kept``). Memory that runs out is a failure like any
other: retries need less of it, or none of the device's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

MAX_FAILURES = 3
UNDECOMPOSED = (
    "its factor could not be decomposed {limit} times in a row; it is close to singular, or holds "
    "infinities or NaN. Lower the learning rate, raise `damping` (or `eps`), clip gradients, or "
    "train in float32."
)
RETRIES = ("scaled", "damped", "float64", "cpu", "kept")
"""How a matrix was served that the plain factorisation did not serve."""

Factorise = Callable[[Tensor, float, float], tuple[Tensor, ...]]
Count = Callable[[str], None]
Cause = Literal["out_of_memory", "solver"]

SOLVERS = ("cusolver", "hipsolver", "rocsolver", "magma")
ALLOCATORS = ("can't allocate memory", "status_alloc_failed")


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


def strikes(before: int, failed: bool, name: str, limit: int = MAX_FAILURES) -> int:
    """Failures in a row of one matrix, after one more attempt.

    Args:
        before: how often in a row it had failed.
        failed: whether it failed now.
        name: the matrix, for the message.
        limit: failures in a row after which to stop, >= 1.

    Raises:
        RuntimeError: at the ``limit``-th failure in a row, with what to do.
    """
    if not failed:
        return 0
    if before + 1 < limit:
        return before + 1
    raise RuntimeError(f"{name}: {UNDECOMPOSED.format(limit=limit)}")


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
    if matrices.numel() == 0:
        return factorise(matrices, 1.0, 0.0), []
    try:
        results = factorise(matrices, 1.0, 0.0)
        finite = torch.stack([torch.isfinite(part).flatten(1).all(1) for part in results])
        good = finite.all(0).tolist()
        if all(good):
            return results, []
        parts = [tuple(part[index] for part in results) for index in range(len(matrices))]
    except RuntimeError as error:
        if cause(error) is None:
            raise
        good, parts = [False] * len(matrices), [()] * len(matrices)
    failed = []
    for index in (index for index, fine in enumerate(good) if not fine):
        found, name = _retry(matrices[index], factorise)
        if found is None:
            failed.append(index)
            found = kept(index)
        if name and count is not None:
            count(name)
        parts[index] = tuple(part.to(matrices) for part in found)
    return tuple(torch.stack(columns) for columns in zip(*parts, strict=True)), failed


def _retry(matrix: Tensor, factorise: Factorise) -> tuple[tuple[Tensor, ...] | None, str]:
    """The first retry that serves ``matrix``, ``[n, n]``: its result, if there is one, and name."""
    if not bool(torch.isfinite(matrix).all()):
        return None, "kept"
    scale = float(matrix.abs().max()) or 1.0
    shift = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    double, device = torch.float64, matrix.device
    attempts = [
        ("", matrix.dtype, device, 1.0, 0.0),
        ("scaled", matrix.dtype, device, scale, 0.0),
        ("damped", matrix.dtype, device, scale, shift),
        ("float64", double, device, scale, shift),
    ]
    if device.type != "cpu":
        attempts.append(("cpu", double, torch.device("cpu"), scale, shift))
    for name, dtype, place, divisor, damping in attempts:
        try:
            operand = matrix.to(place, dtype)[None]
            parts = tuple(part[0].to(matrix) for part in factorise(operand, divisor, damping))
        except RuntimeError as error:
            if cause(error) is None:
                raise
            continue
        if all(bool(torch.isfinite(part).all()) for part in parts):
            return parts, name
    return None, "kept"


def _descending_eigh(batch: Tensor, scale: float, damping: float) -> tuple[Tensor, ...]:
    values, vectors = torch.linalg.eigh(_scaled_and_damped(batch, scale, damping))
    return (values.flip(-1) - damping) * scale, vectors.flip(-1)


def _cholesky_inverse(batch: Tensor, scale: float, damping: float) -> tuple[Tensor, ...]:
    factor, info = torch.linalg.cholesky_ex(_scaled_and_damped(batch, scale, damping))
    inverse = torch.cholesky_inverse(factor)
    # A failed factorisation leaves finite numbers behind; NaN marks it without a host check here.
    return (inverse.masked_fill((info != 0)[:, None, None], torch.nan) / scale,)


def _scaled_and_damped(batch: Tensor, scale: float, damping: float) -> Tensor:
    """``A / scale + damping I``; A itself where that is what it is."""
    if (scale, damping) == (1.0, 0.0):
        return batch
    result = batch / scale
    result.diagonal(dim1=-2, dim2=-1).add_(damping)
    return result
