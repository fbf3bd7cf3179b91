"""Running second moments: bias-corrected averages that no bad batch can poison."""

from __future__ import annotations

from collections.abc import Sequence

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


def update_moments(
    moments: Sequence[Tensor], updates: Sequence[Tensor], means: Tensor, decay: float
) -> Tensor:
    """:func:`update_moment` of moments of one shape, on a GPU all in a few kernels.

    Args:
        moments: n tensors, changed in place.
        updates: k of each, 0-d tensors, changed in place.
        means: ``[n, …]``.
        decay: in [0, 1).

    Returns:
        Per mean 1 where it was dropped, else 0: ``[n]``.
    """
    if not means.is_cuda:
        each = zip(moments, updates, means, strict=True)
        return torch.stack([update_moment(*one, decay) for one in each])
    usable = torch.isfinite(means).flatten(1).all(1)
    counts = torch.stack(list(updates)) + usable
    keep = torch.clamp(1 - 1 / counts.clamp(min=1).to(means.dtype), max=decay)
    weight = torch.where(usable, 1 - keep, 0.0).view(-1, *[1] * (means.dim() - 1))
    means = torch.where(usable.view(weight.shape), means, 0.0)
    found = torch.stack(list(moments)).to(means.dtype).mul_(1 - weight).add_(means.mul_(weight))
    torch._foreach_copy_(list(moments), list(found.unbind()))
    torch._foreach_copy_(list(updates), list(counts.unbind()))
    return (~usable).to(torch.int64)
