"""Fallback optimizers: how a gradient, raw or preconditioned, becomes a step.

The elementwise work is torch's own functional ``adamw`` and ``sgd``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hf_precond.compat import devices
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.base.messages import NO_FALLBACK
from hf_precond.optimizers.base.parameters import ParamView, by_group, states
from hf_precond.optimizers.base.refresh import FailureRecord


def group_defaults(config: Any) -> dict[str, Any]:
    """What a parameter group has unless it says otherwise.

    Schedules that cycle the momentum (``OneCycleLR``, ``CyclicLR``) cycle
    ``betas`` where there are any: groups stepped by SGD have ``momentum`` alone.

    Args:
        config: the optimizer's.
    """
    values: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "step": 0}
    if getattr(config, "base", "adamw") != "sgd":
        values |= {"betas": config.betas, "eps": config.eps}
    if hasattr(config, "momentum"):
        values["momentum"] = config.momentum
    return values


def make_fallback(
    name: str, config: Any, failures: FailureRecord, count: Callable[[str, int | Tensor], None]
) -> FallbackOptimizer:
    """The fallback optimizer that a config's ``base`` names.

    Args:
        name: ``adamw``, ``sgd``, ``adamr`` or ``muon``.
        config: its fields are read from here.
        failures: the optimizer's record.
        count: the optimizer's counter.

    Raises:
        ValueError: for any other name.
    """
    if name == "adamw":
        return AdamWFallback()
    if name == "sgd":
        return SGDFallback()
    if name == "adamr":
        from hf_precond.optimizers.adamr.rotated_adam import RotatedAdamFallback

        return RotatedAdamFallback.under(config, failures, count)
    if name == "muon":
        from hf_precond.optimizers.muon.step import MuonFallback

        return MuonFallback(config.lr_scale, config.nesterov)
    raise ValueError(NO_FALLBACK.format(name=name))


class FallbackOptimizer(ABC):
    """Steps views of parameters in place; keeps its state in theirs."""

    elementwise = False
    """Whether views may be stepped one after the other, which bounds what a step holds of them."""

    @abstractmethod
    def allocate(self, views: Sequence[ParamView]) -> None:
        """Make the state that :meth:`update` needs, where it is missing."""

    @abstractmethod
    def update(self, views: Sequence[ParamView]) -> None:
        """Step every view by its gradient."""

    def diagnostics(self) -> dict[str, float]:
        """Counters of its own, as plain numbers."""
        return {}


class AdamWFallback(FallbackOptimizer):
    """AdamW (Loshchilov and Hutter, 2019), in torch's order of decay and epsilon.

    ``p ← (1 - lr·wd) p - lr · m̂ / (√v̂ + ε)``
    """

    elementwise = True

    def allocate(self, views: Sequence[ParamView]) -> None:
        for view in views:
            if not view.settled:
                view.zeros("exp_avg")
                view.zeros("exp_avg_sq")
                view.counter("step")

    def update(self, views: Sequence[ParamView]) -> None:
        self.allocate(views)
        for batch in by_group(views):
            group = batch[0].group
            with compute_copies(batch) as (params, grads):
                device = params[0].device
                fused = devices.is_fused(device) and all(map(Tensor.is_contiguous, params + grads))
                # torch's foreach kernels on a CPU take no learning rate that is a tensor.
                alone = isinstance(group["lr"], Tensor) and not devices.is_capturable(device)
                adamw(
                    params,
                    grads,
                    states(batch, "exp_avg"),
                    states(batch, "exp_avg_sq"),
                    [],
                    states(batch, "step"),
                    fused=fused,
                    foreach=not (fused or alone),
                    capturable=devices.is_capturable(device),
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=self.decay(batch, params),
                    eps=group["eps"],
                    maximize=False,
                )

    def decay(self, views: Sequence[ParamView], params: list[Tensor]) -> float:
        """The weight decay that is left to torch's ``adamw``: ``p ← (1 - lr·wd) p``."""
        return views[0].group["weight_decay"]

    def directions(self, views: Sequence[ParamView]) -> list[tuple[Tensor, Tensor]]:
        """Update the moments and return ``(m̂, √v̂)`` of each view, stepping nothing."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.allocate(views)
        for batch in by_group(views):
            beta1, beta2 = batch[0].group["betas"]
            grads = [view.grad.to(view["exp_avg"].dtype) for view in batch]
            first = [view["exp_avg"] for view in batch]
            second = [view["exp_avg_sq"] for view in batch]
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            for view in batch:
                # float32 would lose half the digits of 1 - β₂ᵗ.
                step = view["step"].add_(1).to(devices.widest(view.param.device))
                pairs[id(view)] = (
                    view["exp_avg"] / (1 - beta1**step),
                    (view["exp_avg_sq"] / (1 - beta2**step)).sqrt_(),
                )
        return [pairs[id(view)] for view in views]


class SGDFallback(FallbackOptimizer):
    """SGD with momentum: ``p ← (1 - lr·wd) p``, ``v ← μ v + g``, ``p ← p - lr v``."""

    elementwise = True

    def allocate(self, views: Sequence[ParamView]) -> None:
        for view in views:
            if not view.settled and view.group["momentum"] != 0:
                view.zeros("momentum_buffer")

    def update(self, views: Sequence[ParamView]) -> None:
        self.allocate(views)
        for batch in by_group(views):
            group = batch[0].group
            with compute_copies(batch) as (params, grads):
                sgd(
                    params,
                    grads,
                    states(batch, "momentum_buffer") if group["momentum"] else [None] * len(batch),
                    foreach=True,
                    weight_decay=self.decay(batch, params),
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                )

    def decay(self, views: Sequence[ParamView], params: list[Tensor]) -> float:
        """Decay the parameters; nothing is left to torch's ``sgd``, which couples it."""
        group = views[0].group
        if group["weight_decay"] != 0:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        return 0.0


class CoupledSGD(SGDFallback):
    """SGD with momentum as torch's, its weight decay coupled: ``v ← μ v + g + wd·p``."""

    def decay(self, views: Sequence[ParamView], params: list[Tensor]) -> float:
        """All of it is left to torch's ``sgd``."""
        return views[0].group["weight_decay"]


def descend(views: Sequence[ParamView]) -> None:
    """Apply finished directions held in ``grad``: ``p ← (1 - lr·wd) p - lr·u``."""
    for batch in by_group(views):
        group = batch[0].group
        with compute_copies(batch) as (params, directions):
            if group["weight_decay"] != 0:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-group["lr"])


@contextmanager
def compute_copies(views: Sequence[ParamView]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Parameters and gradients in the dtype of the state.

    Parameters of lower precision are stepped in float32 and rounded back once.
    """
    params = [view.param for view in views]
    dtype = compute_dtype(params[0].dtype)
    grads = [view.grad if view.grad.dtype == dtype else view.grad.to(dtype) for view in views]
    if params[0].dtype == dtype:
        yield params, grads
        return
    copies = [param.to(dtype) for param in params]
    yield copies, grads
    torch._foreach_copy_(params, copies)
