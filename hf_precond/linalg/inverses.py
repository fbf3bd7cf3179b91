"""Inverses of positive definite matrices: by blocks, or by a step of Newton's iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.linalg.products import Precision, float32_products, from_cpu, matmul

CHOLESKY_SIZE = 128
"""Blocks up to this size are inverted by Cholesky's factorisation."""

FACTOR_SIZE = 512
"""Cholesky factors up to this size are computed, and inverted, by one call of the library."""

MAX_EIGENVALUE = 1.8
"""Largest estimated eigenvalue of ``c B A`` that :func:`newton_step` allows.

B' is singular at 2; the gap covers what power iteration may miss.
"""

TINY = 1e-30


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
    """Write the inverse of ``matrix`` into ``result``."""
    size = matrix.shape[-1]
    if size <= CHOLESKY_SIZE:
        factor, info = devices.kernel(torch.linalg.cholesky_ex, matrix)
        inverse = devices.kernel(torch.cholesky_inverse, factor)
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


def inverse_cholesky(batch: Tensor, leaf: int = FACTOR_SIZE) -> tuple[Tensor, Tensor]:
    """``L⁻¹`` of the Cholesky factor, ``A = L Lᵀ``, by halves; for accelerators.

    Factorisations reach a twentieth of a device's rate, products half of it. With
    ``A = [[P, Qᵀ], [Q, S]]``, ``V = Q L_P⁻ᵀ`` and T = ``S - V Vᵀ``::

        L⁻¹ = [[L_P⁻¹, 0], [-L_T⁻¹ V L_P⁻¹, L_T⁻¹]]

    and P and T in the same way, down to ``leaf`` rows. Products in float32; with a residual
    ``‖L⁻¹ A L⁻ᵀ - I‖`` of about the condition of A times the unit roundoff, as the library's.

    Args:
        batch: A, ``[…, n, n]``, symmetric positive definite; the lower triangle is read.
        leaf: rows up to which the library factorises and inverts; many matrices are worth the
            launches of a small one.

    Returns:
        The inverse, ``[…, n, n]``, zeros above the diagonal; and ``[…]``, nonzero where A is not
        positive definite and the inverse is of no use.
    """
    if batch.shape[-1] <= leaf:
        return _library_inverse(batch)
    result = torch.zeros_like(batch, memory_format=torch.contiguous_format)
    with float32_products("highest", batch):
        return result, _inverse_cholesky(batch, result, leaf)


def _library_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    lower, info = devices.kernel(torch.linalg.cholesky_ex, matrix)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(lower)
    return devices.kernel(torch.linalg.solve_triangular, lower, eye, upper=False), info


def _inverse_cholesky(matrix: Tensor, result: Tensor, leaf: int) -> Tensor:
    """Write the inverse of the factor of ``matrix`` into ``result``, zeros until now."""
    size = matrix.shape[-1]
    if size <= leaf:
        inverse, info = _library_inverse(matrix)
        result.copy_(inverse)
        return info
    half = size // 2
    first, last = slice(None, half), slice(half, None)
    inverse, rest = result[..., first, first], result[..., last, last]
    info = _inverse_cholesky(matrix[..., first, first], inverse, leaf)
    share = matrix[..., last, first] @ inverse.mT
    schur = matrix[..., last, last] - share @ share.mT
    other = _inverse_cholesky(schur, rest, leaf)
    result[..., last, first] = ((rest @ share) @ inverse).neg_()
    return info | other


def without_last(inverse: Tensor) -> Tensor:
    """The inverse of A without its last row and column, zeros in their place.

    ``P - p pᵀ / π`` with P the inverse of A, p its last column and π the corner of P.

    Args:
        inverse: P, ``[…, n, n]``.
    """
    last = inverse[..., -1:]
    return inverse - last @ (last / inverse[..., -1:, -1:]).mT


def root_without_last(root: Tensor) -> Tensor:
    """A root of :func:`without_last` of ``W Wᵀ``: ``W - W w wᵀ / ‖w‖²``, w the last row of W.

    Args:
        root: W, ``[…, n, n]``.
    """
    last = root[..., -1:, :]
    return root - root @ last.mT @ (last / last.square().sum(-1, keepdim=True))


def newton_step(
    matrix: Tensor, inverse: Tensor, precision: Precision = "highest"
) -> tuple[Tensor, Tensor]:
    """One scaled and safeguarded Newton step, ``B' = c (2 B - c B A B)``: two products.

    With P = BA, ``c = tr P / ‖P‖_F²`` is the scale at which cB comes closest to
    the inverse (it minimises ``‖I - cP‖_F``), so neither a drift in scale nor
    the size n slows the iteration. Where c would push the largest eigenvalue
    of cP past :data:`MAX_EIGENVALUE` it is reduced to that: B' stays positive
    definite, and every eigenvalue μ of cP in (0, 2) moves to ``μ (2 - μ)``.
    The iteration without c is Schulz's (1933).

    Args:
        matrix: A, symmetric positive definite, ``[…, n, n]``.
        inverse: B, symmetric positive definite, shaped like A.
        precision: of the two products on an accelerator. What they round
            limits the residual ``‖I - A B'‖`` to about the condition of A times
            their unit roundoff; a step from there corrects, it does not add.

    Returns:
        B', symmetric, and the rms eigenvalue error ``‖I - cP‖_F / √n`` that B
        had, ``[…]``; B' has about its square. Not finite where A or B is not.
    """
    size = matrix.shape[-1]
    product = matmul(inverse, matrix, precision)
    trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = product.square().sum((-2, -1))
    scale = torch.minimum(trace / square, MAX_EIGENVALUE / largest_eigenvalue(product))
    error = (size - 2 * scale * trace + scale.square() * square).clamp(min=0).div(size).sqrt()
    factor = scale[..., None, None]
    product.mul_(-factor.square())
    product.diagonal(dim1=-2, dim2=-1).add_(2 * scale[..., None])
    updated = matmul(product, inverse, precision)
    return (updated + updated.mT).mul_(0.5), error


def largest_eigenvalue(matrix: Tensor, rounds: int = 20, columns: int = 4) -> Tensor:
    """``λmax`` from below, by power iteration on several random vectors at once.

    The start is random, so it has a share in every eigenvector, and fixed by
    the size, so every rank and every run gets the same answer. The products
    are scaled by the largest diagonal entry, so neither tiny nor huge entries
    leave the range of float32. Zero for a zero matrix. No host synchronisation.

    Args:
        matrix: A, with real eigenvalues >= 0 (symmetric positive
            semi-definite, or a product of two such), ``[…, n, n]``.
        rounds: products.
        columns: vectors.

    Returns:
        ``[…]``; the relative error is ``O(log n / rounds)`` at worst and far
        smaller where the largest eigenvalue stands out.
    """
    if 0 in matrix.shape:
        return matrix.new_zeros(matrix.shape[:-2])
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None].clamp(min=TINY)
    vectors = start_vectors(matrix.shape[-1], columns, matrix).expand(*matrix.shape[:-1], columns)
    growth = torch.zeros_like(scale)
    for _ in range(rounds):
        vectors = (matrix @ vectors) / scale
        growth = vectors.norm(dim=-2, keepdim=True)
        vectors = vectors / growth.clamp(min=TINY)
    return growth.amax(-1).squeeze(-1) * scale[..., 0, 0]


def start_vectors(size: int, count: int, like: Tensor) -> Tensor:
    """Gaussian columns of unit length, ``[size, count]``, the same on every call and rank.

    Drawn on the CPU, and sent to a GPU without waiting for it.

    Args:
        size: length of a column.
        count: number of columns.
        like: a tensor of the dtype and device wanted.
    """
    generator = torch.Generator().manual_seed(size)
    columns = torch.randn(size, count, generator=generator, dtype=torch.float64)
    columns /= columns.norm(dim=0, keepdim=True)
    return from_cpu(columns, like.device, like.dtype)
