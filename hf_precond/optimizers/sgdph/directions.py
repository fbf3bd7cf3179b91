"""SGD-PH's directions of channel-wise parameters, from their gradients and curvature.

The tensors of a batch are laid end to end, so that a step takes a fixed number
of kernels however many norms a model has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_precond.optimizers.base.parameters import ParamView, states
from hf_precond.optimizers.sgdph.config import SGDPHConfig

CAP = 10.0
"""κ: the most that ``base="sgd"`` multiplies a momentum by, the authors' ``tau / eps``."""

SLOWEST = 0.05
"""The least share of AdamW's step that ``base="adamw"`` takes, entry by entry.

Where a norm's input is (almost) constant, as with the zero queries that BLIP-2 starts from, H is
singular: its size holds for no step, and a step by it would be none.
"""

FORGET = {"adamw": 1e2, "sgd": 1e4}
"""By base: a probe that finds less than one part in so many of an average makes it anew.

The thesis' base does so only for what is out of all proportion.
"""


def allocate(view: ParamView, base: str) -> None:
    """Make the state of a channel-wise parameter, where it is missing.

    ``curvature``: D, the running average of the probes, shaped like the
    parameter. ``probes``: how many it holds, a 0-d float32 tensor. And the
    moments of AdamW or SGD.
    """
    view.zeros("curvature")
    view.counter("probes")
    if base == "adamw":
        view.zeros("exp_avg")
        view.zeros("exp_avg_sq")
        view.counter("step")
    elif view.group["momentum"] != 0:
        view.zeros("momentum_buffer")


def average_probes(
    views: Sequence[ParamView],
    estimates: Sequence[Tensor],
    present: Tensor,
    decay: float,
    forget: float = math.inf,
) -> Tensor:
    """``D ← b D + (1 - b) ĥ`` in place; an estimate that is absent or not finite changes nothing.

    Args:
        views: parameters of one dtype and device; ``curvature`` and ``probes`` are changed.
        estimates: ĥ of each, shaped like the parameter.
        present: whether any rank has one, ``[len(views)]``.
        decay: b in [0, 1).
        forget: an average whose largest entry is more than ``forget`` times the largest of ĥ is
            of a point left behind, and begins again with ĥ; zeros say nothing.

    Returns:
        Per view 1 where a present estimate was dropped, else 0.
    """
    curvatures, probes = states(views, "curvature"), states(views, "probes")
    averages = joined(views, "curvature")
    size = torch.stack(torch._foreach_norm(list(estimates), float("inf"))).to(averages.dtype)
    finite = torch.isfinite(size)
    usable = finite & present
    if forget < math.inf:
        held = torch.stack(torch._foreach_norm(curvatures, float("inf")))
        again = usable & (size > 0) & (held > forget * size * _corrections(views, decay, "probes"))
        averages.masked_fill_(_spread(again, views), 0)
        torch._foreach_mul_(probes, list((~again).to(probes[0].dtype).unbind()))
    new = torch.cat([e.reshape(-1) for e in estimates]).to(averages.dtype)
    averages.lerp_(torch.where(_spread(usable, views), new, averages), 1 - decay)
    torch._foreach_copy_(curvatures, split(averages, views))
    torch._foreach_add_(probes, list(usable.to(probes[0].dtype).unbind()))
    return (present & ~finite).to(torch.int64)


def update_moments(views: Sequence[ParamView], base: str) -> None:
    """Put the gradients of views of one parameter group into AdamW's moments or SGD's momentum."""
    dtype, group = views[0]["curvature"].dtype, views[0].group
    grads = [view.grad if view.grad.dtype == dtype else view.grad.to(dtype) for view in views]
    if base == "adamw":
        beta1, beta2 = group["betas"]
        first, second = states(views, "exp_avg"), states(views, "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        torch._foreach_add_(states(views, "step"), 1)
    elif group["momentum"] != 0:
        buffers = states(views, "momentum_buffer")
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)


def adamw_directions(views: Sequence[ParamView], config: SGDPHConfig) -> tuple[Tensor, Tensor]:
    """``u = clip(m̂ / min(γ D̂ + ε, 20 (√v̂ + ε)), -1, 1)``; AdamW's before the first probe.

    AdamW's is ``m̂ / (√v̂ + ε)``.

    Args:
        views: of one parameter group and dtype, their moments up to date.
        config: ``gamma`` and ``stat_decay``.

    Returns:
        u of all views end to end, and AdamW's own direction likewise.
    """
    (beta1, beta2), eps = views[0].group["betas"], views[0].group["eps"]
    first = joined(views, "exp_avg") / _bias(views, beta1, "step")
    second = joined(views, "exp_avg_sq") / _bias(views, beta2, "step")
    plain = first / second.sqrt_().add_(eps)
    curvature = joined(views, "curvature").abs_() / _bias(views, config.stat_decay, "probes")
    damped = curvature.mul_(config.gamma).add_(eps)
    # Not a maximum of directions: a curvature that is NaN must be seen in the weights.
    bounded = (first / torch.minimum(damped, second / SLOWEST)).clamp_(-1, 1)
    return torch.where(_probed(views), bounded, plain), plain


def sgd_multipliers(views: Sequence[ParamView], config: SGDPHConfig) -> Tensor:
    """``min(τ / (D̂ + ε_c), κ)``, and 1 before the first probe; all views end to end.

    Args:
        views: of one dtype and device.
        config: ``tau``, ``curvature_eps`` and ``stat_decay``.
    """
    curvature = joined(views, "curvature").abs_() / _bias(views, config.stat_decay, "probes")
    multipliers = (config.tau / curvature.add_(config.curvature_eps)).clamp_(max=CAP)
    return torch.where(_probed(views), multipliers, 1.0)


def sgd_directions(views: Sequence[ParamView], multipliers: Tensor) -> Tensor:
    """``u = v · multiplier``, the momentum v up to date; all views end to end."""
    if views[0].group["momentum"] != 0:
        return joined(views, "momentum_buffer") * multipliers
    return torch.cat([view.grad.reshape(-1) for view in views]).to(multipliers.dtype) * multipliers


def joined(views: Sequence[ParamView], name: str) -> Tensor:
    """A state of all views end to end, a copy."""
    return torch.cat([held.reshape(-1) if held.ndim != 1 else held for held in states(views, name)])


def split(joined: Tensor, views: Sequence[ParamView]) -> list[Tensor]:
    """What lies end to end, as one tensor a view, in its shape."""
    pairs = zip(joined.split(_sizes(views)), views, strict=True)
    return [part if v.param.ndim == 1 else part.view(v.param.shape) for part, v in pairs]


def _bias(views: Sequence[ParamView], decay: float, name: str) -> Tensor:
    """``1 - decay ** n`` of each view, n its count of that name; all entries end to end.

    Without the cancellation at decays near 1; 1 for decay 0.
    """
    return _spread(_corrections(views, decay, name), views)


def _corrections(views: Sequence[ParamView], decay: float, name: str) -> Tensor:
    """``1 - decay ** n`` of each view, one number a view."""
    counts = torch.stack(states(views, name)).to(views[0]["curvature"].dtype)
    if decay == 0:
        return torch.ones_like(counts)
    return torch.expm1(counts * math.log(decay)).neg_()


def _probed(views: Sequence[ParamView]) -> Tensor:
    """Whether the parameter of an entry was ever probed; all entries end to end."""
    return _spread(torch.stack(states(views, "probes")) > 0, views)


def _spread(values: Tensor, views: Sequence[ParamView]) -> Tensor:
    """One value a view, repeated over that view's entries."""
    start, parts = 0, []
    for size, alike in itertools.groupby(_sizes(views)):
        stop = start + len(list(alike))
        parts.append(values[start:stop, None].expand(-1, size).reshape(-1))
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sizes(views: Sequence[ParamView]) -> list[int]:
    return list(map(Tensor.numel, [view.param for view in views]))
