"""Factorisations that do not give up at the first failure.

A batch is factorised in one call. Only the matrices for which that failed
climb the ladder, each on its own: ``scaled`` (divided by its largest entry),
``damped`` (a little added to the diagonal), ``float64``, ``cpu`` and at last
``kept`` (the previous result stays). Each rung used is counted. Memory that
runs out is a failure like any other: the rungs need less of it, or none of the
device's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

MAX_FAILURES = 3
RUNGS = ("scaled", "damped", "float64", "cpu", "kept")

Factorise = Callable[[Tensor], tuple[Tensor, ...]]
Item = TypeVar("Item")
Cause = Literal["out_of_memory", "solver"]

UNDECOMPOSED = (
    "its factor could not be decomposed {limit} times in a row; it is close to singular, or holds "
    "infinities or NaN. Lower the learning rate, raise `damping` (or `eps`), clip gradients, or "
    "train in float32."
)
SOLVERS = ("cusolver", "hipsolver", "rocsolver", "magma")
ALLOCATORS = ("can't allocate memory", "status_alloc_failed")


@dataclass
class Record:
    """What a call had to do beyond the plain factorisation.

    Args:
        rungs: rung to the number of matrices that it served; empty when the
            plain factorisation served them all.
        failed: per matrix, whether it kept its previous result; shaped like
            the batch.
    """

    rungs: dict[str, int] = field(default_factory=dict)
    failed: list[bool] = field(default_factory=list)

    def counted(self, kind: str, count: Callable[[str, int], None]) -> None:
        """Hand every rung to an optimizer's counter, as ``{kind}_{rung}``."""
        for rung, matrices in self.rungs.items():
            count(f"{kind}_{rung}", matrices)


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


def in_parts(
    work: Callable[[Sequence[Item]], None], items: Sequence[Item], last: bool = False
) -> list[tuple[Item, Cause]]:
    """``work(items)``; where that fails by :func:`cause`, once more with each item on its own.

    Args:
        work: changes what it changes at its end, so that it can be called
            again for some of the items when it has failed.
        items: equal pieces of work.
        last: whether this is the last attempt already.

    Returns:
        The items that failed on their own too, and why.
    """
    try:
        work(items)
        return []
    except RuntimeError as error:
        found = cause(error)
        if found is None:
            raise
    # Only here are the frames of the failed attempt, and what they held, gone.
    if found == "out_of_memory" and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if last:
        return [(item, found) for item in items]
    return [failed for item in items for failed in in_parts(work, [item], last=True)]


def strikes(before: int, failed: bool, name: str, limit: int = MAX_FAILURES) -> int:
    """Consecutive failures of one matrix, after one more attempt.

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


def eigh(
    batch: Tensor,
    previous: tuple[Tensor, Tensor] | None = None,
    record: Record | None = None,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, and eigenvectors, of symmetric matrices.

    ``A = Q diag(λ) Qᵀ``. A matrix that no rung can decompose keeps
    ``previous``; without one it gets the identity and its own diagonal
    (zeros where that is not finite).

    Args:
        batch: A, ``[…, n, n]``; the lower triangle is read.
        previous: eigenvalues and eigenvectors of the last success.
        record: filled with the rungs used and the matrices that failed.

    Returns:
        ``λ`` ``[…, n]`` and ``Q`` ``[…, n, n]``, columns in the order of λ.
    """
    matrices = batch.reshape(-1, *batch.shape[-2:])

    def last(index: int) -> tuple[Tensor, ...]:
        if previous is not None:
            return tuple(t.reshape(-1, *t.shape[batch.dim() - 2 :])[index] for t in previous)
        diagonal = matrices[index].diagonal()
        return (
            torch.where(torch.isfinite(diagonal), diagonal, 0.0),
            torch.eye(batch.shape[-1], dtype=batch.dtype, device=batch.device),
        )

    values, vectors = _climb(matrices, _descending, _eigh_single, last, record)
    return values.reshape(batch.shape[:-1]), vectors.reshape(batch.shape)


def spd_inverse(
    batch: Tensor, previous: Tensor | None = None, record: Record | None = None
) -> tuple[Tensor, Tensor]:
    """Inverses of symmetric positive definite matrices, by Cholesky's factorisation.

    A matrix that no rung can factorise keeps ``previous``, or gets the
    identity without one. The rungs ``damped`` and above invert
    ``A + δ I`` with ``δ`` at rounding level: ``n · eps · max|A|``.

    Args:
        batch: A, ``[…, n, n]``; the lower triangle is read.
        previous: the inverses of the last success.
        record: filled with the rungs used and the matrices that failed.

    Returns:
        The inverses ``[…, n, n]``, and per matrix whether it kept its
        previous inverse: bool, ``[…]``.
    """
    matrices = batch.reshape(-1, *batch.shape[-2:])
    record = Record() if record is None else record

    def last(index: int) -> tuple[Tensor, ...]:
        if previous is not None:
            return (previous.reshape(matrices.shape)[index],)
        return (torch.eye(batch.shape[-1], dtype=batch.dtype, device=batch.device),)

    (inverse,) = _climb(matrices, _inverse, _inverse_single, last, record)
    failed = torch.tensor(record.failed, dtype=torch.bool, device=batch.device)
    return inverse.reshape(batch.shape), failed.reshape(batch.shape[:-2])


def _climb(
    matrices: Tensor,
    factorise: Factorise,
    single: Callable[[Tensor, Tensor, float], tuple[Tensor, ...]],
    last: Callable[[int], tuple[Tensor, ...]],
    record: Record | None,
) -> tuple[Tensor, ...]:
    """Factorise a batch; those that fail climb the ladder one by one."""
    record = Record() if record is None else record
    record.rungs, record.failed = {}, [False] * len(matrices)
    if matrices.numel() == 0:
        return factorise(matrices)
    try:
        results = factorise(matrices)
        good = _finite(results)
        if all(good):
            return results
        parts = [tuple(part[index] for part in results) for index in range(len(matrices))]
    except RuntimeError as error:
        if cause(error) is None:
            raise
        good = [False] * len(matrices)
        parts = [()] * len(matrices)
    for index, fine in enumerate(good):
        if fine:
            continue
        matrix = matrices[index]
        found, rung = _rungs(matrix, factorise, single)
        if found is None:
            record.failed[index] = True
            found = last(index)
        if rung:
            record.rungs[rung] = record.rungs.get(rung, 0) + 1
        parts[index] = tuple(part.to(matrix) for part in found)
    return tuple(torch.stack(columns) for columns in zip(*parts, strict=True))


def _rungs(
    matrix: Tensor,
    factorise: Factorise,
    single: Callable[[Tensor, Tensor, float], tuple[Tensor, ...]],
) -> tuple[tuple[Tensor, ...] | None, str]:
    """The first rung that serves one matrix: its result and its name."""
    if not bool(torch.isfinite(matrix).all()):
        return None, "kept"
    plain = _attempt(lambda: tuple(part[0] for part in factorise(matrix[None])), matrix)
    if plain is not None:
        return plain, ""
    scale = matrix.abs().max()
    if not bool(scale > 0):
        scale = torch.ones_like(scale)
    shift = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    exact = matrix.double()
    rungs: list[tuple[str, Tensor, float]] = [
        ("scaled", matrix, 0.0),
        ("damped", matrix, shift),
        ("float64", exact, shift),
    ]
    if matrix.device.type != "cpu":
        rungs.append(("cpu", exact.cpu(), shift))
    for rung, operand, damping in rungs:
        found = _attempt(partial(single, operand, scale.to(operand), damping), matrix)
        if found is not None:
            return found, rung
    return None, "kept"


def _attempt(
    work: Callable[[], tuple[Tensor, ...]], like: Tensor
) -> tuple[Tensor, ...] | None:
    """The result in ``like``'s dtype and device, or ``None`` if it raised or is not finite."""
    try:
        found = tuple(part.to(like) for part in work())
    except RuntimeError as error:
        if cause(error) is None:
            raise
        return None
    return found if all(bool(torch.isfinite(part).all()) for part in found) else None


def _finite(results: tuple[Tensor, ...]) -> list[bool]:
    """Per matrix, whether all of its results are finite: one reading from the device."""
    fine = torch.stack([torch.isfinite(part).flatten(1).all(1) for part in results]).all(0)
    return fine.tolist()


def _descending(batch: Tensor) -> tuple[Tensor, ...]:
    values, vectors = torch.linalg.eigh(batch)
    return values.flip(-1), vectors.flip(-1)


def _eigh_single(matrix: Tensor, scale: Tensor, damping: float) -> tuple[Tensor, ...]:
    scaled = matrix / scale
    scaled.diagonal().add_(damping)
    values, vectors = _descending(scaled)
    return (values - damping) * scale, vectors


def _inverse(batch: Tensor) -> tuple[Tensor, ...]:
    factor, info = torch.linalg.cholesky_ex(batch)
    inverse = torch.cholesky_inverse(factor)
    # A failed factorisation leaves finite numbers behind; NaN marks it without a host check here.
    return (inverse.masked_fill((info != 0)[:, None, None], torch.nan),)


def _inverse_single(matrix: Tensor, scale: Tensor, damping: float) -> tuple[Tensor, ...]:
    scaled = matrix / scale
    scaled.diagonal().add_(damping)
    return (_inverse(scaled[None])[0][0] / scale,)
