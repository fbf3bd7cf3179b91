"""Matrix sign, damped inverses and inverse roots in batches, without ``eigh``; packed triangles."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.linalg.inverses import inverse_cholesky
from hf_precond.linalg.products import float32_products

# Matrix sign ---------------------------------------------------------------------

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic of Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).

Steep at zero: five steps bring every singular value above about 1/500 of the Frobenius norm into
[0.6, 1.25], not to 1 exactly.
"""

STEPS = 5


def newton_schulz(matrix: Tensor, steps: int = STEPS, eps: float | None = None) -> Tensor:
    """Approximates the matrix sign ``msign(Z) = U Vᵀ`` (``Z = U Σ Vᵀ``) of every matrix of a batch.

    ``X ← a X + (b XXᵀ + c (XXᵀ)²) X``, from ``X = Z / ‖Z‖_F``. Three products a step; for matrices
    at least twice as long as wide :func:`gram_newton_schulz` costs less.

    Args:
        matrix: Z, ``[…, m, n]``; computed in its dtype.
        steps: number of steps, >= 1.
        eps: smallest norm that Z is divided by, as in ``torch.optim.Muon``, whose numbers come
            out bit for bit in bfloat16. Default ``None``: none, Z may be as small as it likes.

    Returns:
        ``[…, m, n]``; zeros stay zeros.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    shape = matrix.shape
    x = (matrix.mT if tall else matrix).reshape(-1, min(shape[-2:]), max(shape[-2:]))
    if eps is None:
        x = x / largest_entry(x)  # the squares of entries below 1e-22 are nothing in float32
        x = x / frobenius_norm(x)
    else:
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    x = _quintic(x, steps)
    return (x.mT if tall else x).reshape(shape)


def _quintic(x: Tensor, steps: int) -> Tensor:
    """``X ← a X + (b XXᵀ + c (XXᵀ)²) X``."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x


def gram_newton_schulz(gram: Tensor, steps: int = STEPS) -> Tensor:
    """Takes the steps of :func:`newton_schulz` on ``G = Z Zᵀ``: P with ``msign(Z) ≈ P Z``.

    Every step multiplies X from the left by a polynomial of ``X Xᵀ``, so all of them can be done in
    the small dimension: ``P ← h P``, ``G ← h G h``, ``h = a I + b G + c G²``. For ``Z = L N R``
    neither the root R nor Z is needed: ``G = L (N R Rᵀ Nᵀ) Lᵀ``. Rounding in G limits this form to
    float32 and wider (singular values below 1e-3 of the largest come out smaller than
    :func:`newton_schulz` would make them); in half precision take :func:`half_newton_schulz`.

    Args:
        gram: G, ``[…, m, m]``, symmetric, positive semi-definite.
        steps: number of steps, >= 1.

    Returns:
        P, ``[…, m, m]``, symmetric.
    """
    size = gram.shape[-1]
    trace = _positive(gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])
    product = _gram_steps((gram / trace).reshape(-1, size, size), steps)
    return product.reshape(gram.shape) * trace.rsqrt()


def _gram_steps(g: Tensor, steps: int) -> Tensor:
    """The product of ``h = a I + u``, ``u = b G + c G²``, over the steps ``G ← h G h``."""
    a, b, c = COEFFICIENTS
    product: Tensor | None = None
    for step in range(steps):
        u = torch.baddbmm(g, g, g, beta=b, alpha=c)
        if product is None or not devices.is_accelerator(g):
            h = u
            h.diagonal(dim1=-2, dim2=-1).add_(a)
            product = h if product is None else torch.bmm(h, product)
            g = torch.bmm(torch.bmm(h, g), h) if step + 1 < steps else g
        else:  # the identity's part in the product's own kernel
            product = torch.baddbmm(product, u, product, beta=a)
            if step + 1 < steps:
                half = torch.baddbmm(g, u, g, beta=a)
                g = torch.baddbmm(half, half, u, beta=a)
    assert product is not None
    return product


RESTART = 2
"""Steps after which :func:`half_newton_schulz` forms the Gram matrix anew."""

DIVERGED = 64.0
"""An entry of the later steps' product that tells divergence: eigenvalues of it are below 41."""


def half_newton_schulz(matrix: Tensor, weighed: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """``msign(Z S^½) S^½`` by the steps of :func:`newton_schulz` in float16, given Z and ``Z S``.

    float16 has the 10 bits of TF32 at twice its speed, and more than bfloat16; the entries of Z and
    Y are scaled to 1, the Gram matrix to trace 1, which float16 holds. Of matrices at least twice
    as long as wide the steps are taken on Gram matrices, as in :func:`gram_newton_schulz`: with
    ``Y = Z S``, ``Y Zᵀ`` is that of ``Z S^½``, P is computed from it, and the result is ``P Y``.
    Where an eigenvalue is small, a step multiplies the rounding in a Gram matrix by ``a² = 12``; so
    after two steps it is formed anew from ``P Y`` and ``P Z``. Meant for S with a condition number
    up to 1e3, which damping 1 ensures. Where rounding made Y useless all the same, and the later
    steps diverge, the first two are the result.

    Args:
        matrix: Z, ``[b, m, n]`` with ``m <= n``, float32.
        weighed: Y, ``[b, m, n]``, for S symmetric positive definite. Default ``None``: S is the
            identity.
        steps: number of steps, > :data:`RESTART`.

    Returns:
        ``[b, m, n]``, float32; zeros stay zeros.
    """
    size = largest_entry(matrix)
    x = _halved(matrix, size)
    if _is_short(x, weighed):
        return _quintic(x.div_(_norm(x)), steps).to(matrix.dtype)
    height = size if weighed is None else largest_entry(weighed)
    last, y, trace = _last_steps(x, None if weighed is None else _halved(weighed, height), steps)
    return torch.bmm(last, y) * (height / (size * trace)).sqrt()


def half_direction(
    matrix: Tensor, weighed: Tensor | None = None, sizes: Tensor | None = None, heads: int = 1
) -> Tensor:
    """:func:`half_newton_schulz` of float16 matrices, up to a number, in fewer passes.

    Args:
        matrix: Z, ``[n · heads, m, k]`` with ``m <= k``, float16 with entries of about 100 and
            less.
        weighed: Y, likewise.
        sizes: what the results are multiplied by, ``[n · heads, 1, 1]``, float32; ones by default.
        heads: neighbours whose results keep their proportions.

    Returns:
        ``[n · heads, m, k]``, float16, each group of heads divided by a number.
    """
    if _is_short(matrix, weighed):
        sign = _quintic(_halved(matrix, _norm(matrix)), STEPS)
        return sign if sizes is None else _in_proportion(sign, sizes, heads)
    last, y, trace = _last_steps(matrix, weighed)
    if heads > 1:
        scale = trace.rsqrt() if sizes is None else trace.rsqrt().mul_(sizes)
        last = _in_proportion(last, scale, heads)
    return torch.bmm(last, y)


def _in_proportion(matrices: Tensor, scale: Tensor, heads: int) -> Tensor:
    """Matrices times ``scale`` over the largest of its group of heads, in place."""
    each = scale.view(-1, heads)
    return torch.mul(matrices, (each / each.amax(1, keepdim=True)).view_as(scale), out=matrices)


def _is_short(x: Tensor, weighed: Tensor | None) -> bool:
    return weighed is None and x.shape[2] < 2 * x.shape[1]


def _last_steps(x: Tensor, y: Tensor | None, steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """P of the last steps, Y after the first ones, and the trace that all are divided by."""
    gram, weighed = _wide_gram(x if y is None else y, x), y is not None
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    if weighed:  # of a positive definite matrix it is the larger; rounding may undo it
        trace = torch.maximum(trace, torch.linalg.matrix_norm(gram, keepdim=True))
    trace = trace.clamp(min=torch.finfo(x.dtype).smallest_normal)
    first = _gram_steps(_halved(gram, trace), RESTART)
    x = torch.bmm(first, x)
    y = x if y is None else torch.bmm(first, y)
    last = _gram_steps(_halved(_wide_gram(y, x), trace), steps - RESTART)
    if weighed:
        largest = torch.linalg.vector_norm(last, math.inf, dim=(-2, -1), keepdim=True)
        last = torch.where(largest < DIVERGED, last, _eye(last))
    return last, y, trace


def _wide_gram(y: Tensor, x: Tensor) -> Tensor:
    """``Y Xᵀ`` of float16 matrices in float32, whose range it needs."""
    if devices.accumulates(x.device):
        return torch.bmm(y, x.mT, out_dtype=torch.float32)
    return torch.bmm(y, x.mT).float()


def _halved(matrix: Tensor, divisor: Tensor) -> Tensor:
    """``matrix / divisor`` in float16, in one kernel and the same order of memory."""
    return torch.div(matrix, divisor, out=torch.empty_like(matrix, dtype=torch.float16))


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norms of float16 matrices in float32, never zero, ``[b, m, n] -> [b, 1, 1]``."""
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return norm.clamp(min=torch.finfo(matrix.dtype).smallest_normal)


def largest_entry(matrices: Tensor) -> Tensor:
    """Largest magnitude in each matrix, ``[…, m, n] -> […, 1, 1]``, never zero."""
    if devices.is_accelerator(matrices):
        return _positive(torch.linalg.vector_norm(matrices, math.inf, dim=(-2, -1), keepdim=True))
    low, high = matrices.flatten(-2).aminmax(dim=-1, keepdim=True)
    return _positive(torch.maximum(high, -low)).unsqueeze(-1)


def frobenius_norm(matrices: Tensor) -> Tensor:
    """Frobenius norms, ``[…, m, n] -> […, 1, 1]``; never zero, nor so small that 1/x overflows."""
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    return norm.clamp(min=torch.finfo(norm.dtype).tiny / torch.finfo(norm.dtype).eps)


def _positive(value: Tensor) -> Tensor:
    """``value`` kept away from zero, for a division."""
    return value.clamp(min=torch.finfo(value.dtype).tiny)


# Damped inverses and roots ---------------------------------------------------------

FLOOR = 1e-12
"""Smallest damping in absolute units."""

RETRIES = 3
"""Attempts at a Cholesky factorisation, each with ten times the damping."""

SAFE = 0.5
"""Damping from which an accelerator makes one attempt: the condition is at most ``1 + 2n``, and a
matrix that fails all the same keeps its previous factor."""


class DampedInverse(NamedTuple):
    """Inverses or inverse roots of a batch.

    Args:
        value: ``[…, n, n]``.
        usable: ``[…]``; False where the factorisation failed and the previous factor should stay.
        identity: ``[…]``; True where the moment was zero or not finite, and ``value`` the identity.
    """

    value: Tensor
    usable: Tensor
    identity: Tensor


def mean_eigenvalue(moment: Tensor) -> Tensor:
    """``tr(A)/n``, ``[…, n, n] -> […]``."""
    return moment.diagonal(dim1=-2, dim2=-1).mean(-1)


def damp(moment: Tensor, damping: float, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``A + max(λ·tr(A)/n, floor)·I``, symmetrised; the identity where A is zero or not finite.

    Args:
        moment: A, ``[…, n, n]``, positive semi-definite up to rounding.
        damping: λ, in units of the mean eigenvalue.
        mean: ``[…]``, the mean eigenvalue to use where A is one diagonal block of a larger matrix;
            A's own by default.

    Returns:
        The damped matrix, and where it is the identity (``[…]``).
    """
    mean = mean_eigenvalue(moment) if mean is None else mean
    finite = torch.isfinite(moment).all(-1).all(-1) & torch.isfinite(mean)
    identity = ~(finite & (mean > 0))
    damped = (moment + moment.mT) * 0.5
    damped.diagonal(dim1=-2, dim2=-1).add_((mean * damping).clamp(min=FLOOR)[..., None])
    return torch.where(identity[..., None, None], _eye(moment), damped), identity


def inverse(moment: Tensor, damping: float, mean: Tensor | None = None) -> DampedInverse:
    """``(A + λ·tr(A)/n·I)⁻¹`` by Cholesky; arguments as for :func:`damp`."""
    if devices.is_accelerator(moment):
        found = inverse_factor(moment, damping, mean)
        with float32_products("highest", moment):
            return found._replace(value=found.value @ found.value.mT)
    lower, usable, identity = _cholesky(moment, damping, mean)
    return DampedInverse(torch.cholesky_inverse(lower), usable, identity)


def inverse_factor(moment: Tensor, damping: float, mean: Tensor | None = None) -> DampedInverse:
    """W with ``W Wᵀ = (A + λ·tr(A)/n·I)⁻¹``: the inverse transpose of a Cholesky factor.

    W is the inverse square root up to an orthogonal factor, ``W = A^(-1/2) Q``. That is all the
    spectral step needs, since ``msign(Qᵀ Z) = Qᵀ msign(Z)``. Arguments as for :func:`damp`.
    """
    if devices.is_accelerator(moment):
        return _inverse_factor_on_device(moment, damping, mean)
    lower, usable, identity = _cholesky(moment, damping, mean)
    eye = _eye(moment).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    return DampedInverse(inverse.mT, usable, identity)


def _inverse_factor_on_device(moment: Tensor, damping: float, mean: Tensor | None) -> DampedInverse:
    """As :func:`inverse_factor`; nothing is read back, so no one knows whether to try again."""
    damped, identity = damp(moment, damping, mean)
    inverse, info = inverse_cholesky(damped)
    mean = mean_eigenvalue(moment) if mean is None else mean
    for attempt in range(1, RETRIES if damping < SAFE else 1):
        more = (mean * (damping * (10.0**attempt - 1))).masked_fill_(identity, 0.0)
        raised = damped.clone()
        raised.diagonal(dim1=-2, dim2=-1).add_(more[..., None])
        again, again_info = inverse_cholesky(raised)
        inverse = torch.where((info == 0)[..., None, None], inverse, again)
        info = torch.where(info == 0, info, again_info)
    usable = info == 0
    if damping < SAFE:
        inverse = torch.where(usable[..., None, None], inverse, _eye(moment))
    return DampedInverse(inverse.mT, usable, identity)


def _cholesky(moment: Tensor, damping: float, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Lower factors, where they are usable, and where they are the identity's."""
    damped, identity = damp(moment, damping, mean)
    lower, info = torch.linalg.cholesky_ex(damped)
    for attempt in range(1, RETRIES):
        if not info.any():
            break
        raised, _ = damp(moment, damping * 10.0**attempt, mean)
        again, again_info = torch.linalg.cholesky_ex(raised)
        lower = torch.where((info == 0)[..., None, None], lower, again)
        info = torch.where(info == 0, info, again_info)
    usable = info == 0
    return torch.where(usable[..., None, None], lower, _eye(moment)), usable, identity


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


# Packed triangles ------------------------------------------------------------------


def packed_size(size: int) -> int:
    """Entries of a packed ``[size, size]``: ``n (n + 1) / 2`` instead of ``n²``."""
    return size * (size + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of ``[…, n, n]`` as ``[…, n (n + 1) / 2]``.

    The rectangular full packed format (Gustavson, Waśniewski, Dongarra and Langou, 2010): the
    triangle is cut into a square and two small triangles, which together fill a rectangle. So
    packing copies blocks, and no list of indices is needed.
    """
    first = -(-matrix.shape[-1] // 2)
    top, bottom = matrix[..., :first, :first], matrix[..., first:, first:]
    fold = matrix.new_zeros(*matrix.shape[:-2], *_fold_shape(matrix.shape[-1], first))
    corner, rest = _triangles(fold, matrix.shape[-1], first)
    corner.copy_(top.tril())
    rest.add_(bottom.mT.triu())
    square = matrix[..., first:, :first]
    return torch.cat([square.flatten(-2), fold.flatten(-2)], -1)


def unpack(packed: Tensor) -> Tensor:
    """The symmetric ``[…, n, n]`` of :func:`pack`."""
    size = (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2
    first, second = -(-size // 2), size // 2
    square, fold = packed.split([first * second, packed.shape[-1] - first * second], -1)
    square = square.unflatten(-1, (second, first))
    corner, rest = _triangles(fold.unflatten(-1, _fold_shape(size, first)), size, first)
    matrix = packed.new_empty(*packed.shape[:-1], size, size)
    top, bottom = corner.tril(), rest.triu()
    matrix[..., :first, :first] = top + top.tril(-1).mT
    matrix[..., first:, first:] = bottom + bottom.triu(1).mT
    matrix[..., first:, :first] = square
    matrix[..., :first, first:] = square.mT
    return matrix


def _fold_shape(size: int, first: int) -> tuple[int, int]:
    """The rectangle that both triangles fill: they meet along a diagonal."""
    return (first, first) if size % 2 else (first + 1, first)


def _triangles(fold: Tensor, size: int, first: int) -> tuple[Tensor, Tensor]:
    """Where the first triangle lies (on and below the diagonal), and the second (above it)."""
    if size % 2:
        return fold, fold[..., : first - 1, 1:]
    return fold[..., 1:, :], fold[..., :-1, :]
