"""How long AFOpt's step is: scalings of a direction, and the logit change it makes.

U is the direction of one matrix ``[W | b]``, all heads together, and the step ``lr`` times::

    rms            m·βᵏ·U·0.2·√numel/‖U‖_F                  m = lr_scale
    logit_rms      βᵏ·U·ρ/c, c the rms change of the logits that U makes: q and k; others as rms
    cap            the shorter of these two: q and k; others as rms
    graft          U·‖B‖_F/‖U‖_F, B the base rule's step per unit of lr, by its own moments
    norm_recovery  the gradient of the base rule is G̃ = U·‖Ĝ‖_F/‖U‖_F, U of Ĝ without momentum

k counts the steps in a row without a gradient, β is the momentum's decay; c follows
:func:`logit_change`, with A_K (A_Q) undamped and as of the last refresh, as the square root of the
mean over query heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.afopt.directions import times_right
from hf_precond.optimizers.base.fallback import AdamWFallback, FallbackOptimizer, SGDFallback
from hf_precond.optimizers.base.parameters import ParamView

RMS = 0.2
"""Root mean square of a step's entries per unit of learning rate: what AdamW's usually is."""


def norms(matrices: Tensor) -> Tensor:
    """Frobenius norms, ``[n, out, c] -> [n, 1, 1]``, never zero."""
    value = torch.linalg.matrix_norm(matrices, keepdim=True)
    return value.clamp(min=torch.finfo(value.dtype).tiny / torch.finfo(value.dtype).eps)


def to_rms(directions: Tensor) -> Tensor:
    """``0.2·√numel / ‖U‖_F``: the factor that makes each entry's rms 0.2, ``[n, 1, 1]``."""
    return RMS * math.sqrt(directions[0].numel()) / norms(directions)


def fade(before: Tensor, gradients: Tensor, beta: float) -> Tensor:
    """What a step is multiplied with that its own length says nothing of.

    A direction of a set length would follow a momentum of nothing but old
    gradients at full length until it vanishes in the last digit.

    Args:
        before: what the last step was multiplied with, ``[n]``.
        gradients: ``[n, out, c]``.
        beta: decay of the momentum.

    Returns:
        1 where there is a gradient, ``beta`` times ``before`` where all of it
        is zero: ``[n]``.
    """
    largest = torch.linalg.vector_norm(gradients, float("inf"), dim=(1, 2))
    return torch.where(largest == 0, beta * before, 1.0)


def logit_change(
    steps: Tensor,
    left: Tensor,
    moments: Sequence[Tensor],
    heads: int,
    scale: float,
) -> Tensor:
    """Mean squares of the logits' change that steps of W_q or of W_k make, from moments.

    ``mean over i, j of (s x̂_iᵀ δŴ_hᵀ k_j)² = s² tr(A_K,h δŴ_h A_X δŴ_hᵀ)`` for
    W_q, over all pairs of a query and a key; with A_Q for W_k. Exact for one
    unmasked sequence, up to the independence of queries and keys for several,
    and to first order in the step.

    Args:
        steps: ``[n, out, c]``.
        left: A_K or A_Q per head, ``[n · heads, rows, rows]``, undamped.
        moments: A_X of each matrix, ``[c, c]`` or blocks.
        heads: heads of the matrix.
        scale: s, what the logits are multiplied with.

    Returns:
        ``[n, heads]``; under grouped queries each key head's sum over its
        query heads.
    """
    moved = times_right(steps, moments)
    count, rows, columns = steps.shape[0], steps.shape[1] // heads, steps.shape[2]
    parts = steps.reshape(-1, rows, columns)
    gram = torch.bmm(moved.view(-1, rows, columns), parts.mT)
    return (gram * left).sum((-2, -1)).view(count, heads).clamp(min=0) * scale**2


def base_step_norm(fallback: FallbackOptimizer, views: Sequence[ParamView]) -> Tensor:
    """Norm of the step per unit of learning rate that the base rule would take; a 0-d tensor.

    Its moments advance, nothing is stepped.

    Args:
        rule: AdamW's or SGD's.
        leaves: weight and bias of one matrix, with their raw gradients.
    """
    if isinstance(fallback, AdamWFallback):
        parts = [
            first / (root + view.group["eps"])
            for view, (first, root) in zip(views, fallback.directions(views), strict=True)
        ]
    else:
        assert isinstance(fallback, SGDFallback)
        parts = []
        for view in views:
            fallback.allocate([view])
            gradient = view.grad.to(compute_dtype(view.param.dtype))
            if view.group["momentum"] != 0:
                gradient = view["momentum_buffer"].mul_(view.group["momentum"]).add_(gradient)
            parts.append(gradient)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in parts]))
