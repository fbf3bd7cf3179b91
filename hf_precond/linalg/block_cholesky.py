"""Cholesky factors by halves: large products in the place of a slow factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 192
"""Matrices up to this width are factorised by the library."""


def lower_factor(matrices: Tensor) -> Tensor:
    """L with ``L Lᵀ = A``, for matrices far from singular. No host synchronisation.

    On a CPU the library's factorisation runs at a fraction of the speed of a
    product. By halves of whole leaves nearly all of the work is in products::

        A = [[P, ·], [Q, S]];   L = [[C, 0], [W, D]],
        C Cᵀ = P,  W = Q C⁻ᵀ,  D Dᵀ = S - W Wᵀ

    Args:
        matrices: A, ``[…, n, n]``, positive definite; the lower triangle is
            read, and overwritten on a CPU.

    Returns:
        ``[…, n, n]``; above the diagonal there may be anything. Not finite
        where A is not. Nothing tells of a finite A that is not positive
        definite: the result is then some other finite matrix, or NaN.
    """
    if matrices.device.type != "cpu" or matrices.shape[-1] <= LEAF:
        return torch.linalg.cholesky_ex(matrices)[0]
    size = matrices.shape[-1]
    for matrix in matrices.view(-1, size, size):
        _factorise(matrix)
    return matrices


def _factorise(matrix: Tensor) -> None:
    """Overwrite the lower triangle of ``[n, n]`` with its factor."""
    size = len(matrix)
    if size <= LEAF:
        matrix.copy_(torch.linalg.cholesky_ex(matrix)[0])
        return
    # Leaves of full width: the library is slowest at widths that are powers of two.
    half = LEAF * ((size // LEAF + 1) // 2)
    corner, below, rest = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    _factorise(corner)
    shares = torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False)
    below.copy_(shares)
    rest.addmm_(shares, shares.mT, alpha=-1.0)
    _factorise(rest)
