"""How far the gradients of several steps agree, from the norms of their average and their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def agreement(momenta: Tensor, usual: Tensor, beta: float, longest: float) -> Tensor:
    """``min(longest, ‖M‖/(g r₀))``, ``r₀² = (1-β)/(1+β)``: 1 where gradients are independent noise.

    The average of independent gradients of norm g with weights ``(1-β) βʲ`` has norm ``g r₀``.

    Args:
        momenta: norms of the averages M.
        usual: norms g that the gradients usually have; of a gradient that was always zero, or too
            small to be squared, there is no step.
        beta: decay of the averages.
        longest: the largest result.
    """
    usual = usual.clamp(min=torch.finfo(usual.dtype).tiny)
    return (momenta / usual / math.sqrt((1 - beta) / (1 + beta))).clamp_(max=longest)
