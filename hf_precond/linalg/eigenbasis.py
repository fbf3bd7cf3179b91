"""Eigenbases of slowly changing symmetric matrices, followed without decomposing them anew.

The matrices are kept in the coordinates of their present basis, ``B = Qᵀ A Q``,
so they stay nearly diagonal, small eigenvalues keep their relative accuracy in
float32, and a refresh needs no product with ``Q`` to see how good it still is.

A refresh turns all pairs of columns at once by their Jacobi angles,

    X_ij = tan θ_ij,  tan 2θ_ij = 2 B_ij / (B_jj - B_ii),  |θ_ij| <= 45°,

and makes ``I + X`` orthogonal by Cholesky-QR. X is antisymmetric, so the Gram
matrix ``I + XᵀX`` has no eigenvalue below 1: unlike that of an orthogonal
iteration ``A Q``, whose condition is the square of A's, it never fails in
float32. Where the angles are small the error is squared by each refresh
(Jacobi; see Ogita and Aishima, "Iterative refinement for symmetric eigenvalue
decomposition", JJIAM 2018, for the same step as a Newton iteration).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.linalg import fallback


def eigenbasis(
    factor: Tensor, record: fallback.Record | None = None
) -> tuple[Tensor, Tensor]:
    """The eigenvectors, in descending order, and the matrix in their coordinates.

    Decomposes by ``eigh`` and its fall-back ladder: for the first basis, when
    there is none to start from.

    Args:
        factor: A, symmetric, ``[b, n, n]``.
        record: see :func:`hf_precond.linalg.fallback.eigh`.

    Returns:
        ``Q`` and ``diag(λ)``, each ``[b, n, n]``.
    """
    values, vectors = fallback.eigh(factor, record=record)
    return vectors, torch.diag_embed(values)


def refresh(factor: Tensor, sweeps: int = 1) -> tuple[Tensor, Tensor]:
    """Turn a basis towards the eigenvectors of ``B = Qᵀ A Q``. No host synchronisation.

    The new basis is ``Q P``. A matrix that is not finite gives ``P = I``.

    Args:
        factor: B, symmetric, ``[b, n, n]``.
        sweeps: how often all pairs are turned, >= 1.

    Returns:
        ``P``, orthogonal, and ``Pᵀ B P``, each ``[b, n, n]``.
    """
    rotation = pair_rotation(factor)
    factor = congruence(rotation, factor)
    for _ in range(sweeps - 1):
        further = pair_rotation(factor)
        rotation = rotation @ further
        factor = congruence(further, factor)
    return rotation, factor


def pair_rotation(factor: Tensor) -> Tensor:
    """One sweep: ``(I + X) C⁻¹``, ``CᵀC = I + XᵀX`` with C upper triangular.

    Args:
        factor: B, symmetric, ``[b, n, n]``.

    Returns:
        An orthogonal matrix ``[b, n, n]``; the identity where B is not finite.
    """
    skew = jacobi_tangents(factor)
    gram = (skew.mT @ skew).diagonal_scatter(
        skew.square().sum(-2) + 1, dim1=-2, dim2=-1
    )
    lower, _ = torch.linalg.cholesky_ex(gram)
    skew.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return torch.linalg.solve_triangular(lower.mT, skew, upper=True, left=False)


def jacobi_tangents(factor: Tensor) -> Tensor:
    """``tan θ_ij`` of the rotation that makes ``B_ij`` zero, antisymmetric, in [-1, 1].

    ``t = sign(d) b / (|d|/2 + √(d²/4 + b²))``, ``d = B_jj - B_ii``, ``b = B_ij``.
    Zero where B is not finite.
    """
    values = factor.diagonal(dim1=-2, dim2=-1)
    half = (values[:, None, :] - values[:, :, None]).mul_(0.5)
    reach = torch.hypot(half, factor).add_(half.abs())
    tiny = torch.finfo(factor.dtype).tiny
    tangent = torch.where(half < 0, -factor, factor).div_(reach.clamp_min_(tiny))
    # Equal eigenvalues have no sign of their own: the upper triangle gives it.
    tangent = torch.triu(tangent, diagonal=1)
    finite = torch.isfinite(factor).flatten(1).all(1)
    tangent = torch.where(finite[:, None, None], tangent, 0.0)
    return tangent - tangent.mT


def congruence(rotation: Tensor, factor: Tensor) -> Tensor:
    """``Pᵀ B P``, made exactly symmetric."""
    turned = rotation.mT @ (factor @ rotation)
    return (turned + turned.mT).mul_(0.5)


def orthonormal(basis: Tensor) -> Tensor:
    """One Newton-Schulz step ``Q + Q (I - QᵀQ) / 2`` against accumulated rounding."""
    gram = basis.mT @ basis
    return torch.baddbmm(basis, basis, gram, beta=1.5, alpha=-0.5)


def off_diagonal_energy(factor: Tensor) -> Tensor:
    """``Σ_{i≠j} B_ij² / Σ B_ij²`` of each matrix, in [0, 1]; 0 for a zero matrix."""
    total = factor.square().sum((-2, -1))
    diagonal = factor.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    tiny = torch.finfo(factor.dtype).tiny
    return ((total - diagonal) / total.clamp_min(tiny)).clamp_min(0.0)


def overlap(rotation: Tensor) -> Tensor:
    """``P ∘ P``, doubly stochastic: how much of an old coordinate a new one holds."""
    return rotation.square()
