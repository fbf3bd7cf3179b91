"""Symmetric matrices kept as one triangle: ``n (n + 1) / 2`` entries instead of ``n²``.

The rectangular full packed format (Gustavson, Waśniewski, Dongarra and Langou,
2010): the triangle is cut into a square and two small triangles, which
together fill a rectangle. So packing copies blocks, and no list of indices is
needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_size(size: int) -> int:
    """Entries of a packed ``[size, size]``."""
    return size * (size + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of ``[…, n, n]`` as ``[…, n (n + 1) / 2]``."""
    first = -(-matrix.shape[-1] // 2)
    top, bottom = matrix[..., :first, :first], matrix[..., first:, first:]
    fold = _fold(matrix, first)
    corner, rest = _views(fold, matrix.shape[-1], first)
    corner.copy_(top.tril())
    rest.add_(bottom.mT.triu())
    square = matrix[..., first:, :first]
    return torch.cat([square.flatten(-2), fold.flatten(-2)], -1)


def unpack(packed: Tensor) -> Tensor:
    """The symmetric ``[…, n, n]`` of :func:`pack`."""
    size = (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2
    first, second = -(-size // 2), size // 2
    square, fold = packed.split([first * second, packed.shape[-1] - first * second], -1)
    corner, rest = _views(fold.unflatten(-1, _fold_shape(size, first)), size, first)
    matrix = packed.new_empty(*packed.shape[:-1], size, size)
    top, bottom = corner.tril(), rest.triu()
    matrix[..., :first, :first] = top + top.tril(-1).mT
    matrix[..., first:, first:] = bottom + bottom.triu(1).mT
    matrix[..., first:, :first] = square.unflatten(-1, (second, first))
    matrix[..., :first, first:] = square.unflatten(-1, (second, first)).mT
    return matrix


def _fold_shape(size: int, first: int) -> tuple[int, int]:
    """The rectangle that both triangles fill: they meet along a diagonal."""
    return (first, first) if size % 2 else (first + 1, first)


def _fold(matrix: Tensor, first: int) -> Tensor:
    return matrix.new_zeros(*matrix.shape[:-2], *_fold_shape(matrix.shape[-1], first))


def _views(fold: Tensor, size: int, first: int) -> tuple[Tensor, Tensor]:
    """Where the first triangle lies (on and below the diagonal), and the second (above it)."""
    if size % 2:
        return fold, fold[..., : first - 1, 1:]
    return fold[..., 1:, :], fold[..., :-1, :]
