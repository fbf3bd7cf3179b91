"""Damped inverses of Kronecker factors, in batches of one size: exact, or by Newton's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hf_precond.linalg.factorization import RETRIES, Retries, spd_inverse
from hf_precond.linalg.inverses import largest_eigenvalue, newton_step, spd_block_inverse

Solver = Literal["newton", "exact"]

WELL_CONDITIONED = 5e-3
"""Damping, relative to the largest eigenvalue, from which inversion by blocks is exact enough."""

MAX_ERROR = 0.5
"""Largest rms eigenvalue error of the previous inverse from which Newton's step goes on."""

NEWTON_SIZES = {"cpu": math.inf, "cuda": 128}
"""The size from which Newton's step costs less than the exact inverse, by device: never on a CPU
(measured in examples/benchmarks/nkfac.md); on a GPU, which runs products far faster than
factorisations, from here on (not measured yet)."""

BATCH_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Entries of the factors inverted in one batch: more gain nothing there, and cost memory."""


COUNTERS = ("newton_restarts", *(f"inverse_{retry}" for retry in RETRIES))
"""What :func:`invert` counts."""


def choose_solver(size: int, device: torch.device) -> Solver:
    """The cheaper solver of a factor of ``size`` that has an inverse to start from."""
    smallest = NEWTON_SIZES.get(device.type, NEWTON_SIZES["cuda"])
    return "newton" if size >= smallest else "exact"


def batches(count: int, size: int, device: torch.device) -> list[slice]:
    """``count`` matrices of ``size`` in batches that suit the device."""
    limit = BATCH_ELEMENTS.get(device.type, BATCH_ELEMENTS["cuda"])
    length = max(1, limit // size**2)
    return [slice(start, start + length) for start in range(0, count, length)]


def damped(moments: Tensor, damping: float, floor: float) -> Tensor:
    """``A + max(floor, damping · λmax(A)) I``, ``[…, n, n]``."""
    # One vector will do for large factors, where the products are what it costs.
    columns = 4 if moments.shape[-1] <= 512 else 1
    shift = (damping * largest_eigenvalue(moments, columns=columns)).clamp(min=floor)
    result = moments.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return result


def invert(
    matrices: Tensor,
    previous: Tensor,
    newton_steps: int,
    count: Callable[[str, int], None],
    damping: float = 0.0,
) -> tuple[Tensor, list[bool]]:
    """Inverses of symmetric positive definite matrices that have drifted.

    With ``newton_steps`` > 0, those follow from the previous inverses by so
    many Newton steps. Where the previous inverse is no start any more (its
    rms eigenvalue error above :data:`MAX_ERROR`, or not finite) and with
    ``newton_steps`` 0 they are exact: by blocks where the damping bounds the
    condition, by Cholesky's factorisation elsewhere and where that fails.
    On a GPU the host waits once a batch, to know which matrices these are.

    Args:
        matrices: A, ``[b, n, n]``.
        previous: the previous inverses, ``[b, n, n]``.
        newton_steps: 0 for exact inverses.
        count: told of what went otherwise than planned.
        damping: at most the smallest eigenvalue over the largest.

    Returns:
        The inverses, and per matrix whether none could be had and the
        previous one was kept.
    """
    if newton_steps == 0:
        return _exact(matrices, previous, count, damping)
    inverses, error = newton_step(matrices, previous)
    for _ in range(newton_steps - 1):
        inverses, _ = newton_step(matrices, inverses)
    astray = (~(error <= MAX_ERROR)).nonzero().flatten()
    if not len(astray):
        return inverses, [False] * len(matrices)
    count("newton_restarts", len(astray))
    inverses[astray], failed = _exact(matrices[astray], previous[astray], count, damping)
    kept = [False] * len(matrices)
    for place, lost in zip(astray.tolist(), failed, strict=True):
        kept[place] = lost
    return inverses, kept


def _exact(
    matrices: Tensor, previous: Tensor, count: Callable[[str, int], None], damping: float
) -> tuple[Tensor, list[bool]]:
    retries = Retries()
    if damping < WELL_CONDITIONED and matrices.dtype != torch.float64:
        inverses = spd_inverse(matrices, previous, retries)
        retries.report("inverse", count)
        return inverses, retries.failed
    inverses = spd_block_inverse(matrices)
    failed = ~torch.isfinite(inverses.diagonal(dim1=-2, dim2=-1)).all(-1)
    places = failed.nonzero().flatten()
    kept = [False] * len(matrices)
    if len(places):
        inverses[places] = spd_inverse(matrices[places], previous[places], retries)
        retries.report("inverse", count)
        for place, lost in zip(places.tolist(), retries.failed, strict=True):
            kept[place] = lost
    return inverses, kept


def stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Equal shapes as one batch, without a copy where there is only one."""
    if len(tensors) == 1:
        return tensors[0].unsqueeze(0).to(dtype)
    return torch.stack([tensor.to(dtype) for tensor in tensors])
