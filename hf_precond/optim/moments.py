"""Running second moments: bias-corrected averages that no bad batch can poison."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; not finite where nothing was counted."""
    return total / count.to(total.dtype)


def update_moment(moment: Tensor, updates: Tensor, mean: Tensor, decay: float) -> Tensor:
    """``A ← b A + (1 - b) mean`` in place, ``b = min(decay, 1 - 1/k)``, k counting updates.

    The first update thus sets A, the second averages two, and so on until the
    decay rules: an average without start-up bias. A mean that is not finite
    changes nothing and counts nothing. No host synchronisation.

    Args:
        moment: A, ``[n, n]`` or ``[…, n, n]``, changed in place.
        updates: k so far, a 0-d tensor on A's device, changed in place.
        mean: the new batch's second moment, shaped like A.
        decay: in [0, 1).

    Returns:
        1 where the mean was dropped, else 0: a 0-d tensor.
    """
    usable = torch.isfinite(mean).all()
    updates += usable
    keep = torch.clamp(1 - 1 / updates.clamp(min=1).to(mean.dtype), max=decay)
    weight = torch.where(usable, 1 - keep, 0.0)
    mean = torch.where(usable, mean, 0.0)
    moment.copy_(moment.to(mean.dtype).mul_(1 - weight).add_(mean * weight))
    return (~usable).to(torch.int64)
