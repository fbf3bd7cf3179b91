"""Inverses of well-conditioned symmetric positive definite matrices, by blocks."""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 128


def spd_block_inverse(batch: Tensor) -> Tensor:
    """``A⁻¹`` by halves, in products of large blocks.

    With ``A = [[P, Qᵀ], [Q, S]]``, ``W = Q P⁻¹`` and ``T = S - W Qᵀ``::

        A⁻¹ = [[P⁻¹ + Wᵀ T⁻¹ W, -Wᵀ T⁻¹], [-T⁻¹ W, T⁻¹]]

    P and T are inverted in the same way, down to blocks that Cholesky's
    factorisation inverts: ``4/3 n³`` multiplications and additions, nearly all
    in matrix products, where ``torch.cholesky_inverse`` needs fewer and takes
    longer. For well-conditioned matrices: it loses two digits for each digit
    of the condition, where Cholesky's loses one (relative errors in float32 of
    at most 2e-5, 2e-3, .2 at conditions 1e2, 1e3, 1e4). No host
    synchronisation.

    Args:
        batch: A, ``[…, n, n]``, symmetric positive definite.

    Returns:
        ``[…, n, n]``, symmetric to rounding; NaN on the diagonal where A is
        not positive definite or not finite.
    """
    result = torch.empty_like(batch, memory_format=torch.contiguous_format)
    if batch.dim() > 2 and batch.device.type == "cpu":
        # Batched products of views copy them on the CPU; those of single matrices do not.
        size = batch.shape[-1]
        pairs = zip(batch.reshape(-1, size, size), result.view(-1, size, size), strict=True)
        for matrix, inverse in pairs:
            _invert(matrix, inverse)
    else:
        _invert(batch, result)
    return result


def _invert(matrix: Tensor, result: Tensor) -> None:
    """Write the inverse into ``result``."""
    size = matrix.shape[-1]
    if size <= LEAF:
        factor, info = torch.linalg.cholesky_ex(matrix)
        inverse = torch.cholesky_inverse(factor)
        result.copy_(inverse.masked_fill_((info != 0)[..., None, None], torch.nan))
        return
    half = size // 2
    first, last = slice(None, half), slice(half, None)
    below, corner = matrix[..., last, first], result[..., first, first]
    _invert(matrix[..., first, first], corner)
    shares = below @ corner
    schur = matrix[..., last, last] - shares @ below.mT
    rest = result[..., last, last]
    _invert(schur, rest)
    product = rest @ shares
    corner.add_(shares.mT @ product)
    result[..., last, first] = product.neg_()
    result[..., first, last] = product.mT
