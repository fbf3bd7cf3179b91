"""Largest eigenvalues by power iteration, on batches of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.linalg.transfer import sent

_TINY = 1e-30


def largest_eigenvalue_from_ones(matrix: Tensor, rounds: int = 10) -> Tensor:
    """The authors' estimate of ``λmax``: power iteration from the vector of ones.

    ``v = 1``; each round ``u = A v / ‖A v‖``, ``v = A u``; the answer is ``‖v‖``
    of the last round. Not a number where the ones lie in A's null space (the
    output-gradient factor of a softmax classifier, or a zero matrix); kept for
    trajectories that must match the published code of NKFAC (Sun, PolyU 2024).

    Args:
        matrix: A, symmetric positive semi-definite, ``[…, n, n]``.
        rounds: rounds, each of two products.

    Returns:
        ``[…]``.
    """
    vector = matrix.new_ones(*matrix.shape[:-1], 1)
    for _ in range(rounds):
        vector = matrix @ vector
        vector = matrix @ (vector * (1 / vector.norm(dim=(-2, -1), keepdim=True)))
    return vector.norm(dim=(-2, -1))


def start_vectors(size: int, count: int, like: Tensor) -> Tensor:
    """Gaussian columns of unit length, ``[size, count]``, the same on every call and rank.

    Drawn on the CPU, and sent to a GPU without waiting for it.
    """
    generator = torch.Generator().manual_seed(size)
    columns = torch.randn(size, count, generator=generator, dtype=torch.float64)
    columns /= columns.norm(dim=0, keepdim=True)
    return sent(columns, like.device, like.dtype)


def largest_eigenvalue(matrix: Tensor, rounds: int = 20, columns: int = 4) -> Tensor:
    """``λmax`` from below, by power iteration on several random vectors at once.

    The start is random, so it has a share in every eigenvector (the ones of
    :func:`largest_eigenvalue_from_ones` may have none), and fixed by the size,
    so every rank and every run gets the same answer. Scaled by A's largest
    entry on the way: neither tiny nor huge entries leave the range of float32.
    Zero for a zero matrix. No host synchronisation.

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
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None].clamp(min=_TINY)
    vectors = start_vectors(matrix.shape[-1], columns, matrix).expand(*matrix.shape[:-1], columns)
    growth = torch.zeros_like(scale)
    for _ in range(rounds):
        vectors = (matrix @ vectors) / scale
        growth = vectors.norm(dim=-2, keepdim=True)
        vectors = vectors / growth.clamp(min=_TINY)
    return growth.amax(-1).squeeze(-1) * scale[..., 0, 0]
