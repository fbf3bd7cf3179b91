"""Second moments of rows: one triangle computed, the other mirrored."""

from __future__ import annotations

import torch
from torch import Tensor

STRIPS = 8
SMALLEST_STRIP = {"cpu": 48, "cuda": 256}
"""Columns below which a strip's product no longer runs at the speed of a large one."""


TILE = {"cpu": 64}
"""Rows that are mirrored at a time, so that both sides of the copy stay in the cache."""


def strips_for(rows: int, columns: int, device: torch.device) -> int:
    """Strips that pay: few for small moments, one where rows are few beside columns."""
    smallest = SMALLEST_STRIP.get(device.type, SMALLEST_STRIP["cuda"])
    return 1 if 2 * rows < columns else max(1, min(STRIPS, columns // smallest))


def gram(
    rows: Tensor,
    weights: Tensor | None = None,
    out: Tensor | None = None,
    strips: int | None = None,
) -> Tensor:
    """``Xᵀ diag(w) X``, in strips of columns from the diagonal on.

    With s strips, ``(s + 1) / 2s`` of the multiplications of the whole
    product; what lies below the strips is copied from above.

    Args:
        rows: X, ``[n, d]``.
        weights: w, ``[n]``; ``None`` for ones.
        out: where to write the result, ``[d, d]``, of any strides.
        strips: s, >= 1; ``None`` for what suits the shape and the device.

    Returns:
        ``[d, d]``.
    """
    count, size = rows.shape
    strips = strips_for(count, size, rows.device) if strips is None else strips
    weighted = rows if weights is None else rows * weights.unsqueeze(-1)
    if strips == 1 or size == 0:
        product = weighted.mT @ rows
        return product if out is None else out.copy_(product)
    result = rows.new_empty(size, size) if out is None else out
    width = -(-size // strips)
    tile = TILE.get(rows.device.type, size)
    for start in range(0, size, width):
        stop = min(start + width, size)
        torch.mm(weighted[:, start:stop].mT, rows[:, start:], out=result[start:stop, start:])
        for first in range(0, start, tile):
            last = min(first + tile, start)
            result[start:stop, first:last] = result[first:last, start:stop].mT
    return result
