"""Directions of channel-wise parameters from their gradient and curvature.

All tensors of a batch are laid end to end, so that a step takes a fixed
number of kernels however many norms a model has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_precond.optimizers.base.parameters import ParamView, by_group
from hf_precond.optimizers.sgdph.config import SGDPHConfig

CAP = 10.0
"""κ: the most that ``base="sgd"`` multiplies a momentum by, the authors' ``tau / eps``."""


def allocate(view: ParamView, base: str) -> None:
    """Make the state of a channel-wise parameter, where it is missing.

    ``curvature``: D, the running average of the probes, shaped like the
    parameter. ``probes``: how many it holds, a 0-d float32 tensor. And the
    moments of the base rule.
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
    views: Sequence[ParamView], estimates: Sequence[Tensor], present: Tensor, decay: float,
    absolute: bool,
) -> Tensor:  # fmt: skip
    """``D ← b D + (1 - b) ĥ`` in place; an estimate that is absent or not finite changes nothing.

    Args:
        leaves: parameters of one dtype and device; ``curvature`` and ``probes`` are changed.
        estimates: ĥ of each, shaped like the parameter.
        present: whether any rank staged it, ``[len(leaves)]``.
        decay: b in [0, 1).
        absolute: average ``|ĥ|`` (the authors') instead of ĥ.

    Returns:
        Per leaf 1 where a present estimate was dropped, else 0.
    """
    curvatures = [view["curvature"] for view in views]
    finite = torch.isfinite(torch.stack(torch._foreach_norm(list(estimates), float("inf"))))
    usable = finite & present
    flat = torch.cat([e.reshape(-1) for e in estimates]).to(curvatures[0].dtype)
    held = _flat(views, "curvature")
    chosen = _spread(usable, [curvature.numel() for curvature in curvatures])
    held.lerp_(torch.where(chosen, flat.abs() if absolute else flat, held), 1 - decay)
    torch._foreach_copy_(curvatures, apart(held, views))
    probes = [view["probes"] for view in views]
    torch._foreach_add_(probes, list(usable.to(probes[0].dtype).unbind()))
    return (present & ~finite).to(torch.int64)


def advance_moments(views: Sequence[ParamView], base: str) -> None:
    """Put the gradients into the moments of the base rule."""
    for batch in by_group(views):
        grads = [view.grad.to(view["curvature"].dtype) for view in batch]
        group = batch[0].group
        if base == "adamw":
            beta1, beta2 = group["betas"]
            first = [view["exp_avg"] for view in batch]
            second = [view["exp_avg_sq"] for view in batch]
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            torch._foreach_add_([view["step"] for view in batch], 1)
        elif group["momentum"] != 0:
            buffers = [view["momentum_buffer"] for view in batch]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)


def adamw_directions(views: Sequence[ParamView], config: SGDPHConfig) -> tuple[Tensor, Tensor]:
    """``u = clip(m̂ / (γ D̂ + ε), -1, 1)``; AdamW's ``m̂ / (√v̂ + ε)`` before the first probe.

    Args:
        leaves: of one parameter group and dtype, their moments up to date.
        config: ``gamma`` and ``stat_decay``.

    Returns:
        u of all leaves end to end, and AdamW's own direction likewise.
    """
    beta1, beta2 = views[0].group["betas"]
    eps = views[0].group["eps"]
    sizes = [view["curvature"].numel() for view in views]
    steps = _stack(views, "step")
    probes = _stack(views, "probes")
    first = _flat(views, "exp_avg") / _spread(_remainder(beta1, steps), sizes)
    second = _flat(views, "exp_avg_sq") / _spread(_remainder(beta2, steps), sizes)
    plain = first / second.sqrt_().add_(eps)
    curvature = _flat(views, "curvature").abs_() / _spread(
        _remainder(config.stat_decay, probes), sizes
    )
    bounded = (first / curvature.mul_(config.gamma).add_(eps)).clamp_(-1, 1)
    return torch.where(_spread(probes > 0, sizes), bounded, plain), plain


def sgd_multipliers(
    views: Sequence[ParamView], config: SGDPHConfig, cycle: int | None = None
) -> Tensor:
    """``min(τ / (D̂ + ε_c), κ)``, and 1 before the first probe; all leaves end to end.

    The authors' rule, with ``cycle``: ``τ (1 - μⁿ) / (D + ε_c)``.

    Args:
        leaves: of one parameter group and dtype.
        config: ``tau``, ``curvature_eps`` and ``stat_decay``.
        cycle: n, the number of the cycle under way, for the authors' rule.
    """
    sizes = [view["curvature"].numel() for view in views]
    curvature = _flat(views, "curvature").abs_()
    if cycle is not None:
        factor = config.tau * (1 - views[0].group["momentum"] ** cycle)
        return factor / curvature.add_(config.curvature_eps)
    probes = _stack(views, "probes")
    curvature = curvature / _spread(_remainder(config.stat_decay, probes), sizes)
    multipliers = (config.tau / curvature.add_(config.curvature_eps)).clamp_(max=CAP)
    return torch.where(_spread(probes > 0, sizes), multipliers, 1.0)


def sgd_directions(
    views: Sequence[ParamView], config: SGDPHConfig, cycle: int | None = None
) -> list[Tensor]:
    """``u = v · multiplier``, the momentum v up to date; arguments as :func:`sgd_multipliers`."""
    multipliers = sgd_multipliers(views, config, cycle)
    if views[0].group["momentum"] != 0:
        velocity = _flat(views, "momentum_buffer")
    else:
        velocity = torch.cat([view.grad.reshape(-1) for view in views]).to(multipliers.dtype)
    return apart(velocity * multipliers, views)


def with_directions(views: Sequence[ParamView], directions: Sequence[Tensor]) -> list[ParamView]:
    """The leaves with a finished direction in place of the gradient."""
    return [replace(view, grad=u) for view, u in zip(views, directions, strict=True)]


def apart(joined: Tensor, views: Sequence[ParamView]) -> list[Tensor]:
    """What lies end to end as one tensor a leaf, in its shape."""
    parts = joined.split([view.param.numel() for view in views])
    return [part.view(view.param.shape) for part, view in zip(parts, views, strict=True)]


def _flat(views: Sequence[ParamView], name: str) -> Tensor:
    return torch.cat([view[name].reshape(-1) for view in views])


def _stack(views: Sequence[ParamView], name: str) -> Tensor:
    return torch.stack([view[name] for view in views]).to(views[0]["curvature"].dtype)


def _remainder(decay: float, counts: Tensor) -> Tensor:
    """``1 - decay ** counts``, without its cancellation at decays near 1; 1 for decay 0."""
    if decay == 0:
        return torch.ones_like(counts)
    return torch.expm1(counts * math.log(decay)).neg_()


def _spread(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """One value a tensor, repeated over that tensor's entries."""
    return torch.cat([v.expand(n) for v, n in zip(values.unbind(), sizes, strict=True)])
