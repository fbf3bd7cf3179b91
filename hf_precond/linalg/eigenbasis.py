"""Eigenbases of slowly changing symmetric matrices, followed without decomposing them anew.

The matrices are kept in the coordinates of their present basis, ``B = Qᵀ A Q``,
so they stay nearly diagonal, small eigenvalues keep their relative accuracy in
float32, and it takes no product to see how good the basis still is.

A refresh rotates all pairs of columns at once by their Jacobi angles,

    X_ij = tan θ_ij,  tan 2θ_ij = 2 B_ij / (B_jj - B_ii),  |θ_ij| <= 45°,

and makes ``I + X`` orthogonal by Cholesky-QR. X is antisymmetric, so the Gram
matrix ``I + XᵀX`` has no eigenvalue below 1: unlike that of an orthogonal
iteration ``A Q``, whose condition is the square of A's, it never fails in
float32. Where the angles are small each refresh squares the error (Jacobi; see
Ogita and Aishima, "Iterative refinement for symmetric eigenvalue
decomposition", JJIAM 2018, for the same step as a Newton iteration).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.linalg import factorization
from hf_precond.linalg.banded import add_lower_product, banded_size, symmetric
from hf_precond.linalg.inverses import inverse_cholesky
from hf_precond.linalg.products import Precision, arithmetic, float32_products

LEAF = 128
"""Rows up to which the library inverts a Cholesky factor; many are inverted together."""


def eigenbasis(factor: Tensor, count: factorization.Count | None = None) -> tuple[Tensor, Tensor]:
    """Returns the eigenvectors, in descending order, and the matrix in their coordinates.

    Decomposes by ``eigh`` and its retries: for the first basis, when there is
    none to start from.

    Args:
        factor: A, symmetric, ``[b, n, n]``; the lower triangle is read.
        count: see :func:`hf_precond.linalg.factorization.eigh`.

    Returns:
        ``Q`` and ``diag(λ)``, each ``[b, n, n]``.
    """
    values, vectors = factorization.eigh(factor, count)
    return vectors, torch.diag_embed(values)


def refresh(
    factor: Tensor, sweeps: int = 1, precision: Precision = "highest"
) -> tuple[Tensor, Tensor]:
    """Returns the rotation of a basis towards the eigenvectors of ``B = Qᵀ A Q``.

    The new basis is ``Q P``. A matrix that is not finite gives ``P = I``. Nothing is read from the
    device.

    Args:
        factor: B, symmetric, ``[b, n, n]``; the lower triangle is read.
        sweeps: how often all pairs are rotated, >= 1.
        precision: of products on accelerators, TF32 at the lowest. P is orthogonal to float32
            whatever it is; an entry of ``Pᵀ B P`` errs by some 1e-3 of ``√(B_ii B_jj)`` in TF32.

    Returns:
        ``P``, orthogonal, and ``Pᵀ B P``, each ``[b, n, n]``.
    """
    size = factor.shape[-1]
    rotation = pair_rotation(factor, precision)
    factor = symmetric(turned(mirrored(factor), rotation, precision), size)
    if sweeps == 1:
        return rotation, factor
    further, factor = refresh(factor, sweeps - 1, precision)
    return rotation @ further, factor


def turned(factor: Tensor, rotation: Tensor, precision: Precision = "highest") -> Tensor:
    """Returns ``Pᵀ B P``, as :func:`~hf_precond.linalg.banded.banded` keeps it.

    Args:
        factor: B, symmetric, both triangles, ``[b, n, n]``.
        rotation: P, ``[b, n, n]``.
        precision: see :func:`refresh`.
    """
    kept = factor.new_empty(len(factor), banded_size(factor.shape[-1]))
    with float32_products(precision, factor):
        return add_lower_product(kept, rotation.mT, factor @ rotation, beta=0.0)


def pair_rotation(factor: Tensor, precision: Precision = "highest") -> Tensor:
    """Returns the rotation of one sweep: ``(I + X) C⁻¹``, ``CᵀC = I + XᵀX``, C upper triangular.

    In TF32 the angles are rounded to what it holds exactly. ``XᵀX`` is exact then, and so is
    ``X C⁻¹`` with ``C⁻¹ - I`` in two parts of TF32; the result is orthogonal to float32.

    Args:
        factor: B, symmetric, ``[b, n, n]``; the lower triangle is read.
        precision: see :func:`refresh`.

    Returns:
        An orthogonal matrix, ``[b, n, n]``; the identity where B is not finite.
    """
    low = arithmetic(precision, factor) != "highest"
    skew = jacobi_tangents(factor, torch.float16 if low else factor.dtype).to(factor.dtype)
    gram = torch.empty_like(skew)
    with float32_products(precision, skew):
        add_lower_product(gram, skew.mT, skew, beta=0.0)
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    if not devices.is_accelerator(gram):
        lower, _ = torch.linalg.cholesky_ex(gram)
        skew.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        # (C⁻ᵀ (I + X)ᵀ)ᵀ: the library solves by columns, and these are in its order of memory.
        solved: Tensor = torch.linalg.solve_triangular(lower, skew.mT, upper=False)
        return solved.mT
    inverse, _ = inverse_cholesky(gram, LEAF)
    del gram
    if not low:
        with float32_products("highest", skew):
            return torch.baddbmm(inverse.mT, skew, inverse.mT)
    inverse.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    rotation, high = skew + inverse.mT, in_tf32(inverse)
    with float32_products(precision, skew):
        rotation.baddbmm_(skew, high.mT).baddbmm_(skew, inverse.sub_(high).mT)
    rotation.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return rotation


def jacobi_tangents(factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns ``tan θ_ij`` of the rotations that make each ``B_ij`` zero.

    ``t = b / (d + sign(d) √(d² + b²))``, ``2d = B_jj - B_ii``, ``b = B_ij``.

    Args:
        factor: B, symmetric, ``[b, n, n]``; the lower triangle is read.
        dtype: of the result; B's by default.

    Returns:
        Antisymmetric, in [-1, 1], ``[b, n, n]``; zero where B is not finite,
        which its diagonal shows in a matrix of second moments.
    """
    values = factor.diagonal(dim1=-2, dim2=-1)
    finite = torch.isfinite(values).all(-1, keepdim=True)
    halves = torch.where(finite, values / 2, torch.nan)
    gaps = halves[..., None, :] - halves[..., None]
    reach = torch.hypot(gaps, factor).copysign_(gaps).add_(gaps)
    # Both entries of a pair come from the lower one: where eigenvalues are equal, the signs of two
    # computed by themselves would be the same, and the pair would not be rotated.
    tangents = torch.div(factor, reach, out=reach).to(dtype or factor.dtype).tril_(-1)
    # Zero over zero, and all of a matrix that is not finite.
    tangents.nan_to_num_(0.0)
    return tangents - tangents.mT


def rotate(
    side: str,
    rotation: Tensor,
    matrix: Tensor,
    change: Tensor | None = None,
    orthogonal: bool = False,
) -> Tensor:
    """Returns ``Pᵀ M`` on the left, ``M P`` on the right: M in a new basis of its rows or columns.

    Args:
        side: ``left`` or ``right``.
        rotation: P, ``[b, n, n]``.
        matrix: M, ``[b, n, m]`` on the left, ``[b, m, n]`` on the right.
        change: of :func:`change_of`, if any.
        orthogonal: whether M is orthogonal and is to stay so.
    """
    if change is None:
        return rotation.mT @ matrix if side == "left" else matrix @ rotation
    factor = in_tf32(matrix) if orthogonal else matrix
    operands = (change.mT, factor) if side == "left" else (factor, change)
    with float32_products("tf32", matrix):
        return torch.baddbmm(matrix, *operands)


def change_of(rotation: Tensor, precision: Precision) -> Tensor | None:
    """Returns ``P - I`` where products are in TF32, else ``None``.

    ``M + (P - I)ᵀ M`` rounds little where little turns, and M itself not at all.

    Args:
        rotation: P, ``[b, n, n]``.
        precision: see :func:`refresh`.
    """
    if arithmetic(precision, rotation) == "highest":
        return None
    change = in_tf32(rotation)
    change.diagonal(dim1=-2, dim2=-1).copy_(in_tf32(rotation.diagonal(dim1=-2, dim2=-1).sub(1.0)))
    return change


def in_tf32(matrix: Tensor) -> Tensor:
    """Returns a matrix rounded to the nearest numbers that TF32 holds.

    A tensor core cuts the last bits off. All products would be too small, and a basis would shrink.

    Args:
        matrix: of entries of about 1 and less; below 6e-5 they are rounded to 3e-8.
    """
    return matrix.half().to(matrix.dtype)


def orthonormal(basis: Tensor) -> Tensor:
    """Returns ``Q + Q (I - QᵀQ) / 2``: one Newton-Schulz step against accumulated rounding.

    Args:
        basis: Q, nearly orthogonal, ``[b, n, n]``.
    """
    with float32_products("highest", basis):
        return torch.baddbmm(basis, basis, basis.mT @ basis, beta=1.5, alpha=-0.5)


def mirrored(lower: Tensor) -> Tensor:
    """Returns the symmetric matrices whose lower triangles are given.

    Args:
        lower: ``[b, n, n]``; nothing above the diagonal is read.
    """
    return lower.tril() + lower.tril(-1).mT


def off_diagonal_energy(factor: Tensor) -> Tensor:
    """Returns ``Σ_{i≠j} B_ij² / Σ B_ij²`` of each matrix, in [0, 1]; 0 for a zero matrix.

    Args:
        factor: B, symmetric, both triangles, ``[b, n, n]``.

    Returns:
        ``[b]``.
    """
    values = factor.diagonal(dim1=-2, dim2=-1)
    scale = values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(factor.dtype).tiny)
    on = (values / scale).square().sum(-1)
    others = factor / scale[..., None]
    others.diagonal(dim1=-2, dim2=-1).zero_()
    off = torch.linalg.vector_norm(others, dim=(-2, -1)).square_()
    return off / (off + on).clamp_min(1.0)


def overlap(rotation: Tensor) -> Tensor:
    """Returns ``P ∘ P``, doubly stochastic: how much of an old coordinate a new one holds.

    Args:
        rotation: P, orthogonal, ``[b, n, n]``.
    """
    return rotation.square()
