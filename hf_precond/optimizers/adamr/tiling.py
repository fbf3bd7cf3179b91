"""Which sides of a weight AdamR rotates, and what that keeps in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.optimizers.adamr.config import AdamRConfig

Split = Literal["rows", "columns"]

CHEAP = 1024
"""``basis="auto"`` rotates both sides of a matrix whose longer side is at most this."""
ELONGATED = 2
"""Of longer ones it rotates both sides where one is at most this many times the other."""


@dataclass(frozen=True)
class Tiling:
    """A weight seen as ``tiles`` matrices of ``rows x columns``, each with bases of its own.

    Args:
        tiles: number of matrices: 1, the groups of a grouped convolution, the
            experts of a layer, or the blocks of a side wider than ``max_dim``.
        rows: rows of a tile.
        columns: columns of a tile.
        split: the side of the weight that the tiles divide.
        left: whether rows are rotated.
        right: whether columns are rotated.
    """

    tiles: int
    rows: int
    columns: int
    split: Split
    left: bool
    right: bool

    @property
    def rotated(self) -> bool:
        """Whether any side is rotated; otherwise the weight is stepped by AdamW."""
        return self.left or self.right

    @functools.cached_property
    def sides(self) -> tuple[str, ...]:
        """The rotated sides."""
        return tuple(side for side in ("left", "right") if getattr(self, side))

    @property
    def widest(self) -> int:
        """The widest rotated side."""
        return max(self.left * self.rows, self.right * self.columns)

    @property
    def state_elements(self) -> int:
        """Numbers kept: two moments, and a factor and a basis of each rotated side.

        ``2 m n``, as AdamW, and ``2 m²`` (``2 n²``) of a rotated left (right)
        side: at two rotated sides three times AdamW's state for a square
        matrix, 1.25 times for one of ``d x 4d`` with its smaller side rotated.
        """
        sides = self.left * self.rows**2 + self.right * self.columns**2
        return 2 * self.tiles * (self.rows * self.columns + sides)

    @functools.cached_property
    def refresh_cost(self) -> dict[str, float]:
        """Multiplications of a refresh of each rotated side, elementwise work in proportion."""
        return self._cost(4.5, 1.0)

    @functools.cached_property
    def turn_cost(self) -> dict[str, float]:
        """What a step that refreshes a side costs more: the gradient that is held turns too."""
        return self._cost(4.5, 2.0)

    def _cost(self, own: float, other: float) -> dict[str, float]:
        sizes = {"left": (self.rows, self.columns), "right": (self.columns, self.rows)}
        found = {side: sizes[side] for side in self.sides}
        return {s: self.tiles * n**2 * (own * n + other * m) for s, (n, m) in found.items()}


def tile(
    shape: Sequence[int], config: AdamRConfig, matrix: LayerMatrix | None = None
) -> Tiling:
    """How ``config`` treats a weight.

    ``auto`` rotates both sides while that is cheap: where the longer is at most
    :data:`CHEAP`, or at most :data:`ELONGATED` times the other; the smaller
    side of all others (the MLPs of larger models). ``one_sided``
    rotates the smaller side of every matrix. A side wider than ``max_dim`` is
    not rotated; where both are, the smaller one is divided into blocks of at
    most ``max_dim``, as equal as they come. A single row or column is a
    vector: its bases would be arbitrary outside the few gradients seen.
    Embeddings are rotated on the hidden side only, depthwise convolutions on
    the right; each group of a grouped convolution and each expert by itself
    (its rows in blocks where both its sides are wider than ``max_dim``).

    Args:
        shape: the weight's; more than two dimensions are ``[out, rest]``.
        config: ``basis`` and ``max_dim`` are read.
        matrix: what the model says of the weight, where it is known.
    """
    embedding = matrix is not None and is_embedding(matrix)
    groups = 1 if matrix is None else matrix.groups
    if matrix is not None and matrix.stacked:
        return _stack(tuple(shape), config.basis, config.max_dim)
    return _tiling(tuple(shape), config.basis, config.max_dim, embedding, groups)


def is_embedding(matrix: LayerMatrix) -> bool:
    """Whether a matrix is a table of embeddings, a row each."""
    return isinstance(matrix.module, (nn.Embedding, nn.EmbeddingBag))


@functools.lru_cache(maxsize=4096)
def _tiling(
    shape: tuple[int, ...], basis: str, max_dim: int, embedding: bool, groups: int
) -> Tiling:
    out, rest = shape[0] if shape else 1, math.prod(shape[1:])
    if len(shape) < 2 or basis == "identity" or min(out, rest) <= 1:
        return Tiling(1, out, rest, "rows", False, False)
    if embedding or out == groups:
        return _one_side(out, rest, "right", max_dim)
    if groups > 1:
        rows = out // groups
        left, right = _sides(rows, rest, basis, max_dim)
        return Tiling(groups, rows, rest, "rows", left, right)
    left, right = _sides(out, rest, basis, max_dim)
    if left or right:
        return Tiling(1, out, rest, "rows", left, right)
    return _one_side(out, rest, "left" if out <= rest else "right", max_dim)


@functools.lru_cache(maxsize=4096)
def _stack(shape: tuple[int, ...], basis: str, max_dim: int) -> Tiling:
    """Every matrix of a stack by itself."""
    count, rows, columns = shape
    one = _tiling((rows, columns), basis, max_dim, False, 1)
    if one.rotated and one.split == "columns":  # blocks of columns are no view of a stack
        one = _one_side(rows, columns, "left", max_dim)
    return replace(one, tiles=count * one.tiles)


def _sides(rows: int, columns: int, basis: str, max_dim: int) -> tuple[bool, bool]:
    """Which sides of one matrix are rotated."""
    left, right = 1 < rows <= max_dim, 1 < columns <= max_dim
    elongated = max(rows, columns) > max(CHEAP, ELONGATED * min(rows, columns))
    one_sided = basis == "one_sided" or (basis == "auto" and elongated)
    if one_sided and left and right:
        left, right = rows <= columns, rows > columns
    return left, right


def _one_side(rows: int, columns: int, side: str, max_dim: int) -> Tiling:
    """One side rotated, in blocks where it is wider than ``max_dim``."""
    size = rows if side == "left" else columns
    tiles = next(n for n in range(math.ceil(size / max_dim), size + 1) if size % n == 0)
    block = size // tiles
    if block == 1:
        return Tiling(1, rows, columns, "rows", False, False)
    if side == "left":
        return Tiling(tiles, block, columns, "rows", True, False)
    return Tiling(tiles, rows, block, "columns", False, True)
