"""Which sides of a weight AdamR rotates, and as how many matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.linalg.banded import banded_size
from hf_precond.optimizers.adamr.config import AdamRConfig

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")

CHEAP = 1024
"""``basis="auto"`` rotates both sides of a matrix whose longer side is at most this."""
ELONGATED = 2
"""It also rotates both sides where the longer is at most this many times the other."""
LARGE = 1 << 24
"""Entries of a parameter's state up to which it may be any multiple of AdamW's: 64 MiB."""


@dataclass(frozen=True)
class Tiling:
    """A weight as ``tiles`` matrices of ``rows x columns``, each with its own bases.

    AdamR keeps two moments, ``2 tiles m n`` numbers as AdamW does, and of each rotated side a basis
    and a triangle, ``1.6 tiles m²`` on the left and ``1.6 tiles n²`` on the right. With both sides
    rotated that is 2.6 times AdamW's state for a square matrix; with the smaller side of
    ``d x 4d`` rotated it is 1.2 times.

    Args:
        tiles: number of matrices: 1, the groups of a grouped convolution, the experts of a layer,
            or the blocks of a side wider than ``max_dim``.
        rows: m, the rows of a tile.
        columns: n, the columns of a tile.
        split: the side of the weight that the tiles divide.
        left: whether rows are rotated.
        right: whether columns are rotated.
    """

    tiles: int
    rows: int
    columns: int
    split: Literal["rows", "columns"] = "rows"
    left: bool = False
    right: bool = False

    @functools.cached_property
    def sides(self) -> tuple[Side, ...]:
        """The rotated sides; AdamW steps a weight that has none."""
        return tuple(side for side in SIDES if getattr(self, side))

    @functools.cached_property
    def state_ratio(self) -> float:
        """Entries of the state over those of AdamW's."""
        sizes = self.left * [self.rows] + self.right * [self.columns]
        kept = sum(size**2 + banded_size(size) for size in sizes)
        return 1 + kept / (2 * self.rows * self.columns)

    @functools.cached_property
    def refresh_cost(self) -> dict[Side, float]:
        """Multiplications of a refresh of each rotated side: n x n products, and n x n by n x m.

        The momentum and the gradient follow the basis. Elementwise work counts in proportion.
        """
        sizes = {"left": (self.rows, self.columns), "right": (self.columns, self.rows)}
        return {s: self.tiles * sizes[s][0] ** 2 * (4.5 * sizes[s][0] + 2.0 * sizes[s][1])
                for s in self.sides}  # fmt: skip


def tile(shape: Sequence[int], config: AdamRConfig, matrix: LayerMatrix | None = None) -> Tiling:
    """Returns which sides of a weight ``config`` has rotated, and in how many matrices.

    ``auto`` rotates both sides while that is cheap: where the longer is at most :data:`CHEAP`, or
    at most :data:`ELONGATED` times the other. Of all other matrices (the MLPs of larger models) it
    rotates the smaller side, as ``one_sided`` does of every matrix. A side wider than ``max_dim``
    is not rotated; where both are, the smaller one is divided into blocks of at most ``max_dim``,
    as equal as they come. A single row or column is a vector: its bases would be arbitrary outside
    the few gradients seen. Embeddings are rotated on the hidden side only, depthwise convolutions
    on the right; each group of a grouped convolution and each expert by itself (its rows in blocks
    where both its sides are wider than ``max_dim``).

    Where that keeps more than :data:`LARGE` entries, and more than ``max_state_ratio`` times those
    of AdamW, the smaller side alone is rotated, in blocks where that is still too much, or none.

    Args:
        shape: the weight's; more than two dimensions are ``[out, rest]``.
        config: ``basis``, ``max_dim`` and ``max_state_ratio`` are read.
        matrix: what the model says of the weight, where it is known.

    Returns:
        The tiling; without rotated sides for vectors and where ``basis`` is ``identity``.
    """
    return _bounded(tile_unbounded(shape, config, matrix), config.max_state_ratio)


def tile_unbounded(
    shape: Sequence[int], config: AdamRConfig, matrix: LayerMatrix | None = None
) -> Tiling:
    """Returns the tiling without a bound on the state; see :func:`tile`.

    Args:
        shape: the weight's.
        config: ``basis`` and ``max_dim`` are read.
        matrix: what the model says of the weight, where it is known.
    """
    fields = config.basis, config.max_dim
    if matrix is None:
        return _tile(tuple(shape), *fields)
    if matrix.stacked:
        return _tile_stack(tuple(shape), *fields)
    return _tile(tuple(shape), *fields, is_embedding(matrix), matrix.groups)


def is_embedding(matrix: LayerMatrix) -> bool:
    """Returns whether a matrix is a table of embeddings, each a row.

    Args:
        matrix: the matrix.
    """
    return isinstance(matrix.module, (nn.Embedding, nn.EmbeddingBag))


@functools.lru_cache(maxsize=4096)
def _tile(
    shape: tuple[int, ...], basis: str, max_dim: int, embedding: bool = False, groups: int = 1
) -> Tiling:
    out, rest = shape[0] if shape else 1, math.prod(shape[1:])
    if len(shape) < 2 or basis == "identity" or min(out, rest) <= 1:
        return Tiling(1, out, rest)
    if embedding or out == groups:
        return _blocks(out, rest, "right", max_dim)
    rows = out // groups
    left, right = 1 < rows <= max_dim, 1 < rest <= max_dim
    elongated = max(rows, rest) > max(CHEAP, ELONGATED * min(rows, rest))
    if left and right and (basis == "one_sided" or (basis == "auto" and elongated)):
        left, right = rows <= rest, rows > rest
    if left or right or groups > 1:
        return Tiling(groups, rows, rest, "rows", left, right)
    return _blocks(out, rest, "left" if out <= rest else "right", max_dim)


@functools.lru_cache(maxsize=4096)
def _bounded(tiling: Tiling, most: float) -> Tiling:
    """The first of: a tiling, its smaller side alone, that in blocks, none; that keeps enough."""
    entries = 2 * tiling.tiles * tiling.rows * tiling.columns
    if tiling.state_ratio <= most or entries * tiling.state_ratio <= LARGE:
        return tiling
    left = tiling.rows <= tiling.columns
    if left and tiling.split == "columns":  # blocks of the wider side
        tiling = Tiling(1, tiling.rows, tiling.tiles * tiling.columns)
    size, other = sorted((tiling.rows, tiling.columns))
    # A basis and a triangle of b rows are at most 2b² entries, beside 2b times the other side.
    widest = other * (most - 1)
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    blocks = next((n for n in divisors if size <= n * widest), size)
    divided = tiling.tiles == 1 or tiling.split == ("rows" if left else "columns")
    if blocks == size or (blocks > 1 and not divided):
        return replace(tiling, left=False, right=False)
    if left:
        return Tiling(tiling.tiles * blocks, size // blocks, other, "rows", left=True)
    split = tiling.split if blocks == 1 else "columns"
    return Tiling(tiling.tiles * blocks, other, size // blocks, split, right=True)


@functools.lru_cache(maxsize=4096)
def _tile_stack(shape: tuple[int, ...], basis: str, max_dim: int) -> Tiling:
    """Every matrix of a stack ``[experts, rows, columns]`` by itself."""
    count, rows, columns = shape
    each = _tile((rows, columns), basis, max_dim)
    if each.sides and each.split == "columns":  # blocks of columns are no view of a stack
        each = _blocks(rows, columns, "left", max_dim)
    return replace(each, tiles=count * each.tiles)


def _blocks(rows: int, columns: int, side: Side, max_dim: int) -> Tiling:
    """One side rotated, in blocks where it is wider than ``max_dim``."""
    size = rows if side == "left" else columns
    tiles = next(n for n in range(math.ceil(size / max_dim), size + 1) if size % n == 0)
    if tiles == size:
        return Tiling(1, rows, columns)
    if side == "left":
        return Tiling(tiles, size // tiles, columns, "rows", left=True)
    return Tiling(tiles, rows, size // tiles, "columns", right=True)
