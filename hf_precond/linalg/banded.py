"""Symmetric matrices kept as one triangle, in bands of rows that products are added to in place.

A band holds some rows up to the end of the diagonal block that they meet, so that each is a plain
matrix: bands of an eighth of the rows take 0.56 of the whole matrix. Up to :data:`WHOLE` rows there
is one band, the matrix itself. (:func:`hf_precond.linalg.matrix_functions.pack` is smaller still,
for matrices that are computed as a whole.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

BAND = 128
"""Fewest rows of a band."""
WHOLE = 2 * BAND
"""A matrix of at most so many rows is one band."""


@functools.lru_cache(maxsize=1024)
def bands(size: int) -> tuple[tuple[int, int], ...]:
    """Returns the first row of each band of a matrix of ``size`` rows, and the one past its last.

    Args:
        size: n.
    """
    height = max(BAND, size // 8) if size > WHOLE else max(size, 1)
    return tuple((start, min(start + height, size)) for start in range(0, size, height))


@functools.lru_cache(maxsize=1024)
def banded_size(size: int) -> int:
    """Returns how many entries are kept of a matrix of ``size`` rows.

    Args:
        size: n.
    """
    return sum((stop - start) * stop for start, stop in bands(size))


def banded(matrix: Tensor) -> Tensor:
    """Returns the bands of symmetric matrices, one after the other.

    Args:
        matrix: ``[b, n, n]``; the lower triangle is read.

    Returns:
        ``[b, banded_size(n)]``; a view where there is one band.
    """
    if len(bands(matrix.shape[-1])) == 1:
        return matrix.flatten(1)
    return torch.cat([band.flatten(1) for band in _views(matrix, matrix.shape[-1])], 1)


def symmetric(kept: Tensor, size: int) -> Tensor:
    """Returns the matrices of :func:`banded`, where what it was given was symmetric throughout.

    Args:
        kept: ``[b, banded_size(n)]``; both triangles of its diagonal blocks are read.
        size: n.

    Returns:
        ``[b, n, n]``. A view where there is one band.
    """
    if len(bands(size)) == 1:
        return kept.unflatten(1, (size, size))
    matrix = kept.new_empty(len(kept), size, size)
    for (start, stop), band in zip(bands(size), _views(kept, size), strict=True):
        matrix[:, start:stop, :stop] = band
        matrix[:, :start, start:stop] = band[..., :start].mT
    return matrix


def add_lower_product(
    matrix: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0
) -> Tensor:
    """Computes ``β C + α A B`` in the place of C, for symmetric results: their lower triangle.

    Each band is computed up to its diagonal block, which saves a third of the multiplications of
    wide matrices and more.

    Args:
        matrix: C, ``[b, n, n]``, there may be anything above the diagonal afterwards; or as
            :func:`banded` returns it.
        a: A, ``[b, n, k]``.
        b: B, ``[b, k, n]``.
        beta: multiplier of C; with 0 nothing of C is read.
        alpha: multiplier of ``A B``.

    Returns:
        C.
    """
    size = a.shape[-2]
    for (start, stop), band in zip(bands(size), _views(matrix, size), strict=True):
        band.baddbmm_(a[:, start:stop], b[..., :stop], beta=beta, alpha=alpha)
    return matrix


def _views(matrix: Tensor, size: int) -> Iterator[Tensor]:
    """Each band of whole or of kept matrices, ``[b, stop - start, stop]``."""
    first = 0
    for start, stop in bands(size):
        if matrix.dim() == 3:
            yield matrix[:, start:stop, :stop]
        else:
            last = first + (stop - start) * stop
            yield matrix[:, first:last].unflatten(1, (stop - start, stop))
            first = last
