"""Base rules: how a gradient, raw or preconditioned, becomes a step.

The elementwise work is torch's own functional ``adamw`` and ``sgd``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hf_precond.configs import compute_dtype
from hf_precond.optim.leaf import Leaf, by_group, grouped


class Rule(ABC):
    """Steps leaves in place; keeps its state in theirs."""

    @abstractmethod
    def allocate(self, leaf: Leaf) -> None:
        """Make the state that :meth:`update` needs, where it is missing."""

    def allocate_all(self, leaves: Sequence[Leaf]) -> None:
        """The same for several, which a rule may lay out together."""
        for leaf in leaves:
            self.allocate(leaf)

    @abstractmethod
    def update(self, leaves: Sequence[Leaf]) -> None:
        """Step every leaf by its gradient."""

    def diagnostics(self) -> dict[str, float]:
        """Counters of the rule's own, as plain numbers."""
        return {}


class AdamWRule(Rule):
    """AdamW (Loshchilov and Hutter, 2019), in torch's order of decay and epsilon.

    ``p ← (1 - lr·wd) p - lr · m̂ / (√v̂ + ε)``

    Args:
        decay_in_step: the authors' AdaNKFAC divides the decay by the first
            moment's bias correction: ``p ← p - lr/(1-β₁ᵗ)·(m/(√v̂+ε) + wd·p)``.
    """

    def __init__(self, decay_in_step: bool = False) -> None:
        self.decay_in_step = decay_in_step

    def allocate(self, leaf: Leaf) -> None:
        leaf.zeros("exp_avg")
        leaf.zeros("exp_avg_sq")
        leaf.counter("step")

    def update(self, leaves: Sequence[Leaf]) -> None:
        for leaf in leaves:
            self.allocate(leaf)
        for batch in by_group(leaves):
            if not self.decay_in_step or batch[0].group["weight_decay"] == 0:
                self._adamw(batch, batch[0].group["weight_decay"])
                continue
            if batch[0].param.is_cuda:
                self._adamw(batch, 0.0, _kept_by_decay(batch))
                continue
            for same in grouped(batch, lambda leaf: float(leaf["step"])):
                group = same[0].group
                correction = 1 - group["betas"][0] ** (float(same[0]["step"]) + 1)
                self._adamw(same, group["weight_decay"] / correction)

    def _adamw(
        self, leaves: Sequence[Leaf], weight_decay: float, kept: Sequence[Tensor] = ()
    ) -> None:
        group = leaves[0].group
        with compute_copies(leaves) as (params, grads):
            for param, keep in zip(params, kept, strict=False):
                param.mul_(keep)
            fused = all(t.is_contiguous() for t in params + grads)
            # torch's foreach kernels on a CPU take no learning rate that is a tensor.
            alone = isinstance(group["lr"], Tensor) and not params[0].is_cuda
            adamw(
                params,
                grads,
                [leaf["exp_avg"] for leaf in leaves],
                [leaf["exp_avg_sq"] for leaf in leaves],
                [],
                [leaf["step"] for leaf in leaves],
                fused=fused,
                foreach=not (fused or alone),
                capturable=params[0].is_cuda,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=weight_decay,
                eps=group["eps"],
                maximize=False,
            )

    def directions(self, leaves: Sequence[Leaf]) -> list[tuple[Tensor, Tensor]]:
        """Update the moments and return ``(m̂, √v̂)`` of each leaf, stepping nothing."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for leaf in leaves:
            self.allocate(leaf)
        for batch in by_group(leaves):
            beta1, beta2 = batch[0].group["betas"]
            grads = [leaf.grad.to(leaf["exp_avg"].dtype) for leaf in batch]
            first = [leaf["exp_avg"] for leaf in batch]
            second = [leaf["exp_avg_sq"] for leaf in batch]
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            for leaf in batch:
                # float32 would lose half the digits of 1 - β₂ᵗ.
                step = leaf["step"].add_(1).double()
                pairs[id(leaf)] = (
                    leaf["exp_avg"] / (1 - beta1**step),
                    (leaf["exp_avg_sq"] / (1 - beta2**step)).sqrt_(),
                )
        return [pairs[id(leaf)] for leaf in leaves]


def _kept_by_decay(leaves: Sequence[Leaf]) -> Sequence[Tensor]:
    """``1 - lr·wd / (1-β₁ᵗ)`` of each leaf, from the step counts on the device."""
    group = leaves[0].group
    steps = torch.stack([leaf["step"] for leaf in leaves]).double() + 1
    return (1 - group["lr"] * group["weight_decay"] / (1 - group["betas"][0] ** steps)).unbind()


class SGDRule(Rule):
    """SGD with momentum, ``v ← μ v + g``, ``p ← p - lr v``.

    Args:
        coupled: add ``wd·p`` to the gradient (the authors' and torch's SGD)
            instead of decaying the parameter by ``1 - lr·wd``.
    """

    def __init__(self, coupled: bool = False) -> None:
        self.coupled = coupled

    def allocate(self, leaf: Leaf) -> None:
        if leaf.group["momentum"] != 0:
            leaf.zeros("momentum_buffer")

    def update(self, leaves: Sequence[Leaf]) -> None:
        for leaf in leaves:
            self.allocate(leaf)
        for batch in by_group(leaves):
            group = batch[0].group
            with compute_copies(batch) as (params, grads):
                if not self.coupled and group["weight_decay"] != 0:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                sgd(
                    params,
                    grads,
                    [leaf["momentum_buffer"] if group["momentum"] else None for leaf in batch],
                    foreach=True,
                    weight_decay=group["weight_decay"] if self.coupled else 0.0,
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                )


def descend(leaves: Sequence[Leaf]) -> None:
    """Apply finished directions held in ``grad``: ``p ← (1 - lr·wd) p - lr·u``."""
    for batch in by_group(leaves):
        group = batch[0].group
        with compute_copies(batch) as (params, directions):
            if group["weight_decay"] != 0:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-group["lr"])


@contextmanager
def compute_copies(leaves: Sequence[Leaf]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Parameters and gradients in the dtype of the state.

    Parameters of lower precision are stepped in float32 and rounded back once.
    """
    params = [leaf.param for leaf in leaves]
    dtype = compute_dtype(params[0].dtype)
    grads = [leaf.grad.to(dtype) for leaf in leaves]
    if params[0].dtype == dtype:
        yield params, grads
        return
    copies = [param.to(dtype) for param in params]
    yield copies, grads
    torch._foreach_copy_(params, copies)
