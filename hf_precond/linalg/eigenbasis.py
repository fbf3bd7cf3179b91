"""Eigenbases of slowly changing symmetric matrices, followed without decomposing them anew.

The matrices are kept in the coordinates of their present basis, ``B = Qᵀ A Q``,
so they stay nearly diagonal, small eigenvalues keep their relative accuracy in
float32, and it takes no product to see how good the basis still is.

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

from hf_precond.linalg import factorization
from hf_precond.linalg.block_cholesky import lower_factor
from hf_precond.linalg.workspace import Workspace

BANDED = 256
"""Symmetric products at least this wide are computed in bands of their lower triangle, on a CPU."""
BANDS = {256: 3, 768: 6, 1536: 8}
"""Bands from these widths on: more save multiplications and make each product slower."""
TILE = 64
"""Rows that are mirrored at a time on a CPU, so that both sides of the copy stay in the cache."""


def eigenbasis(
    factor: Tensor, count: factorization.Count | None = None
) -> tuple[Tensor, Tensor]:
    """The eigenvectors, in descending order, and the matrix in their coordinates.

    Decomposes by ``eigh`` with its retries: for the first basis, when
    there is none to start from.

    Args:
        factor: A, symmetric, ``[b, n, n]``; the lower triangle is read.
        count: see :func:`hf_precond.linalg.factorization.eigh`.

    Returns:
        ``Q`` and ``diag(λ)``, each ``[b, n, n]``.
    """
    values, vectors = factorization.eigh(factor, count)
    return vectors, torch.diag_embed(values)


def refresh(
    factor: Tensor, sweeps: int = 1, workspace: Workspace | None = None, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn a basis towards the eigenvectors of ``B = Qᵀ A Q``. No host synchronisation.

    The new basis is ``Q P``. A matrix that is not finite gives ``P = I``.

    Args:
        factor: B, symmetric, ``[b, n, n]``; the lower triangle is read.
        sweeps: how often all pairs are turned, >= 1.
        workspace: memory for intermediate results, the second one returned
            among them.
        whole: whether the upper triangle of ``factor`` is B's too.

    Returns:
        ``P``, orthogonal, and ``Pᵀ B P`` (at least its lower triangle), each
        ``[b, n, n]``.
    """
    workspace = Workspace() if workspace is None else workspace
    rotation = None
    for sweep in range(sweeps):
        if sweep or not whole:
            factor = mirrored(factor, workspace)
        further = pair_rotation(factor, workspace)
        rotation = further if rotation is None else rotation @ further
        factor = congruence(further, factor, workspace)
    assert rotation is not None
    return rotation, factor


def pair_rotation(factor: Tensor, workspace: Workspace | None = None) -> Tensor:
    """One sweep: ``(I + X) C⁻¹``, ``CᵀC = I + XᵀX`` with C upper triangular.

    Args:
        factor: B, exactly symmetric, ``[b, n, n]``.
        workspace: memory for intermediate results.

    Returns:
        An orthogonal matrix ``[b, n, n]``; the identity where B is not finite.
    """
    workspace = Workspace() if workspace is None else workspace
    skew = jacobi_tangents(factor, workspace)
    gram = lower_product(skew.mT, skew, workspace.take("half", factor.shape, factor))
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    lower = lower_factor(gram)
    skew.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    # (C⁻ᵀ (I + X)ᵀ)ᵀ: the library solves by columns, and these are in its order of memory.
    return torch.linalg.solve_triangular(lower, skew.mT, upper=False).mT


def jacobi_tangents(factor: Tensor, workspace: Workspace | None = None) -> Tensor:
    """``tan θ_ij`` of the rotation that makes ``B_ij`` zero, antisymmetric, in [-1, 1].

    ``t = b / (d + sign(d) √(d² + b²))``, ``2d = B_jj - B_ii``, ``b = B_ij``.
    Zero where B is not finite: a matrix of second moments then has a diagonal
    that is not.
    """
    workspace = Workspace() if workspace is None else workspace
    values = factor.diagonal(dim1=-2, dim2=-1)
    largest = values.abs().amax(-1)
    finite = torch.isfinite(values).all(-1)
    tiny = torch.finfo(factor.dtype).tiny
    scale = torch.where(finite, largest, 1.0).clamp_min(tiny).reciprocal()[:, None, None]
    entries = torch.mul(factor, scale, out=workspace.take("skew", factor.shape, factor))
    if not factor.is_cpu or not bool(finite.all()):
        entries = torch.where(finite[:, None, None], entries, 0.0)
    values = torch.where(finite[:, None], values, 0.0) * scale[:, 0]
    values = values / 2
    half = workspace.take("half", factor.shape, factor)
    reach = workspace.take("reach", factor.shape, factor)
    torch.sub(values[:, None, :], values[:, :, None], out=half)
    # Equal eigenvalues have no order of their own: far below rounding their places give them one.
    # Without, a pair would be turned by 45 degrees the same way twice, which is no rotation.
    places = torch.arange(values.shape[-1], dtype=values.dtype, device=values.device) * tiny
    half += torch.sub(places[:, None], places[None, :], out=reach[0])
    torch.addcmul(half.new_full((), tiny), half, half, out=reach)
    reach.addcmul_(entries, entries).sqrt_().copysign_(half).add_(half)
    tangents = entries.div_(reach)
    tangents.diagonal(dim1=-2, dim2=-1).zero_()
    return tangents


def congruence(rotation: Tensor, factor: Tensor, workspace: Workspace | None = None) -> Tensor:
    """``Pᵀ B P``, at least its lower triangle."""
    workspace = Workspace() if workspace is None else workspace
    right = product(factor, rotation, workspace.take("half", factor.shape, factor))
    return lower_product(rotation.mT, right, workspace.take("turned", factor.shape, factor))


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` into ``out``, ``[m, n]`` or ``[b, m, n]``; one matrix as a matrix."""
    if a.dim() == 2:
        torch.mm(a, b, out=out)
    elif len(a) == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)
    return out


def bands(size: int) -> list[slice]:
    """The rows of a ``size`` wide matrix, in bands of about equal height."""
    height = -(-size // max([count for width, count in BANDS.items() if width <= size], default=1))
    return [slice(start, min(start + height, size)) for start in range(0, size, height)]


def lower_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` into ``out``, ``[b, n, n]``, at least the lower triangle."""
    size = out.shape[-1]
    if len(a) > 1 or size < BANDED or not a.is_cpu:
        return product(a, b, out)
    for rows in bands(size):
        torch.mm(a[0, rows], b[0, :, : rows.stop], out=out[0, rows, : rows.stop])
    return out


def orthonormal(basis: Tensor) -> Tensor:
    """One Newton-Schulz step ``Q + Q (I - QᵀQ) / 2`` against accumulated rounding."""
    gram = mirrored(lower_product(basis.mT, basis, torch.empty_like(basis)))
    return torch.baddbmm(basis, basis, gram, beta=1.5, alpha=-0.5)


def mirrored(lower: Tensor, workspace: Workspace | None = None) -> Tensor:
    """The symmetric matrices whose lower triangles are given."""
    workspace = Workspace() if workspace is None else workspace
    whole = workspace.take("whole", lower.shape, lower)
    if len(lower) > 1 or lower.shape[-1] < BANDED or not lower.is_cpu:
        below = torch.tril(lower, -1, out=workspace.take("half", lower.shape, lower))
        torch.add(below, below.mT, out=whole)
        whole.diagonal(dim1=-2, dim2=-1).copy_(lower.diagonal(dim1=-2, dim2=-1))
        return whole
    matrix = whole.copy_(lower)[0]
    for start in range(0, len(matrix), TILE):
        rows = slice(start, start + TILE)
        matrix[:start, rows] = matrix[rows, :start].mT
        corner = matrix[rows, rows]
        below = torch.tril(corner, -1)
        corner.tril_().add_(below.mT)
    return whole


def off_diagonal_energy(
    factor: Tensor, workspace: Workspace | None = None, whole: bool = False
) -> Tensor:
    """``Σ_{i≠j} B_ij² / Σ B_ij²`` of each matrix, in [0, 1]; 0 for a zero matrix.

    Args:
        factor: B, symmetric, ``[b, n, n]``; the lower triangle is read.
        workspace: memory for intermediate results.
        whole: whether the upper triangle of ``factor`` is B's too, which
            saves taking it out; energies then are exact to rounding beside 1.
    """
    workspace = Workspace() if workspace is None else workspace
    values = factor.diagonal(dim1=-2, dim2=-1)
    scale = values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(factor.dtype).tiny)
    on = (values / scale).square().sum(-1)
    half = workspace.take("half", factor.shape, factor)
    if whole:
        scaled = torch.mul(factor, scale.reciprocal()[:, None], out=half)
        total = torch.linalg.vector_norm(scaled, dim=(-2, -1)).square_()
        return ((total - on) / total.clamp_min(1.0)).clamp_min(0.0)
    below = torch.tril(factor, -1, out=half)
    beside = 2 * torch.linalg.vector_norm(below.div_(scale[:, None]), dim=(-2, -1)).square_()
    return beside / (beside + on).clamp_min(1.0)


def rotate(
    side: str,
    rotation: Tensor,
    matrix: Tensor,
    workspace: Workspace | None = None,
    role: str = "rotated moment",
) -> Tensor:
    """``Pᵀ M`` on the left, ``M P`` on the right.

    With a workspace the result's memory is taken over by the next call of the
    same role and shape.
    """
    out = (workspace or Workspace()).take(role, matrix.shape, matrix)
    if side == "left":
        return product(rotation.mT, matrix, out)
    return product(matrix, rotation, out)


def overlap(rotation: Tensor) -> Tensor:
    """``P ∘ P``, doubly stochastic: how much of an old coordinate a new one holds."""
    return rotation.square()
