"""The matrix sign ``msign(Z) = U Vᵀ`` (``Z = U Σ Vᵀ``) by Newton–Schulz steps, in batches.

The quintic of Jordan et al., "Muon: an optimizer for hidden layers in neural
networks" (2024): steep at zero, so five steps bring every singular value above
about 1/500 of the Frobenius norm into [0.6, 1.25], not to 1 exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def newton_schulz(matrix: Tensor, steps: int = STEPS) -> Tensor:
    """Approximate ``msign`` of every matrix of a batch.

    ``X ← a X + (b XXᵀ + c (XXᵀ)²) X``, from ``Z / ‖Z‖_F``. Three products a
    step; for matrices at least twice as long as wide use
    :func:`gram_newton_schulz`.

    Args:
        matrix: ``[…, m, n]``; computed in its dtype.
        steps: number of steps, >= 1.

    Returns:
        ``[…, m, n]``; zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    shape = matrix.shape
    x = (matrix.mT if tall else matrix).reshape(-1, min(shape[-2:]), max(shape[-2:]))
    x = x / largest_entry(x)  # the squares of entries below 1e-22 are nothing in float32
    x = x / _positive(torch.linalg.matrix_norm(x, keepdim=True))
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return (x.mT if tall else x).reshape(shape)


def gram_newton_schulz(gram: Tensor, steps: int = STEPS) -> Tensor:
    """The same steps taken on ``G = Z Zᵀ`` alone: P with ``msign(Z) ≈ P Z``.

    Every step multiplies X from the left by a polynomial of ``X Xᵀ``, so all of
    them can be done in the small dimension: ``P ← h P``, ``G ← h G h``,
    ``h = a I + b G + c G²``. Whoever has ``Z = L N R`` needs neither the root R
    nor Z: ``G = L (N R Rᵀ Nᵀ) Lᵀ``. Rounding in G limits this form to float32
    and wider (singular values below 1e-3 of the largest come out smaller than
    :func:`newton_schulz` would make them); do not call it in bfloat16.

    Args:
        gram: ``[…, m, m]``, symmetric, positive semi-definite.
        steps: number of steps, >= 1.

    Returns:
        P, ``[…, m, m]``, symmetric.
    """
    a, b, c = COEFFICIENTS
    size = gram.shape[-1]
    trace = _positive(gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])
    g = (gram / trace).reshape(-1, size, size)
    product: Tensor | None = None
    for step in range(steps):
        h = torch.baddbmm(g, g, g, beta=b, alpha=c)
        h.diagonal(dim1=-2, dim2=-1).add_(a)
        product = h if product is None else torch.bmm(h, product)
        if step + 1 < steps:
            g = torch.bmm(torch.bmm(h, g), h)
    assert product is not None
    return product.reshape(gram.shape) * trace.rsqrt()


def largest_entry(matrices: Tensor) -> Tensor:
    """Largest magnitude in each matrix, ``[…, m, n] -> […, 1, 1]``, never zero."""
    low, high = matrices.flatten(-2).aminmax(dim=-1, keepdim=True)
    return _positive(torch.maximum(high, -low)).unsqueeze(-1)


def _positive(value: Tensor) -> Tensor:
    """``value`` kept away from zero, for a division."""
    return value.clamp(min=torch.finfo(value.dtype).tiny)
