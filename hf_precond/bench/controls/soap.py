"""SOAP as published: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_precond.bench.controls.common import ControlConfig
from hf_precond.config.base import bounded, decay, interval

State = dict[str, Any]


@dataclass(frozen=True)
class SOAPConfig(ControlConfig):
    """SOAP's published fields and defaults.

    Args:
        betas: Adam's decay rates, in [0, 1). Default 0.95 and 0.95.
        stat_decay: decay of the factors, in [0, 1); ``None`` for the second of
            ``betas``, as published. Default ``None``.
        basis_interval: steps between two refreshes of the bases, >= 1.
            Default 10.
        max_precond_dim: a wider side has no basis, >= 1. Default 10000.
    """

    name: ClassVar[str] = "soap"

    betas: tuple[float, float] = decay((0.95, 0.95))
    stat_decay: float | None = decay(None)
    basis_interval: int = interval(10)
    max_precond_dim: int = bounded(10000, 1)

    def build(self, model: nn.Module, warmup: int) -> torch.optim.Optimizer:
        """:class:`SOAP` on all parameters."""
        return SOAP(self.groups(model), self)


class SOAP(torch.optim.Optimizer):
    """SOAP (Vyas et al., 2024, arXiv 2409.11321), in the form of its authors' release.

    For a matrix G, of more dimensions likewise a factor and a basis for each::

        L ← β L + (1-β) G Gᵀ ,  R ← β R + (1-β) Gᵀ G
        G' = Q_Lᵀ G Q_R
        M' ← β₁ M' + (1-β₁) G' ,  V ← β₂ V + (1-β₂) G'²
        W ← W - lr Q_L (M̂' / (√V̂ + ε)) Q_Rᵀ ,  then  W ← (1 - lr·wd) W

    The bases are eigenvectors of the first factors; every ``basis_interval``
    steps, after the step, ``Q ← qr(L Q)``, one power iteration with its columns
    (and V's) sorted by their Rayleigh quotients. M' follows a new basis by
    projection. The first step only makes the bases. Vectors are stepped by Adam.
    Beside the authors' release, 45 steps in float64 stayed within 5e-7.

    AdamR with ``basis="two_sided"`` differs in that: a basis is refreshed every
    3 steps, before the step, with the step's own gradient in the factor, and
    left alone while it is good; its factors start without bias; its
    denominator has a floor relative to its rms, which ε is not; the decay comes
    before the step, as in AdamW; wide sides are left out from 2,048 on, and
    ``auto`` leaves out sides that cost too much; embeddings get a basis on
    their narrow side only, and parameters of more than two dimensions are
    stepped as matrices.

    Args:
        param_groups: as for any torch optimizer.
        config: the fields.
    """

    def __init__(self, param_groups: Iterable[Any], config: SOAPConfig) -> None:
        self.config = config
        defaults = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        super().__init__(param_groups, defaults | {"weight_decay": config.weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        config = self.config
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, grad = self.state[parameter], parameter.grad
                beta = group["betas"][1] if config.stat_decay is None else config.stat_decay
                direction = soap_direction(state, grad, group["betas"], group["eps"], beta, config)
                if direction is not None:
                    parameter.sub_(project(direction, state["bases"], back=True), alpha=group["lr"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    refresh_bases(state, grad, beta, config.basis_interval)
        return loss


def soap_direction(
    state: State,
    grad: Tensor,
    betas: tuple[float, float],
    eps: float,
    stat_decay: float,
    config: Any,
) -> Tensor | None:
    """Adam's direction in the bases; at the first call it makes the state and is ``None``.

    Args:
        state: of the parameter, changed.
        grad: its gradient.
        betas: Adam's decay rates.
        eps: added to the denominator.
        stat_decay: decay of the factors.
        config: ``max_precond_dim``.
    """
    if not state:
        sides = grad.shape if grad.dim() > 1 else ()
        kept = [size if size <= config.max_precond_dim else 0 for size in sides]
        state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["factors"] = [grad.new_zeros(size, size) if size else None for size in kept]
        _update_factors(state, grad, stat_decay)
        state["bases"] = [None if f is None else _eigenvectors(f) for f in state["factors"]]
        return None
    state["step"] += 1
    rotated = project(grad, state["bases"])
    state["exp_avg"].lerp_(rotated, 1 - betas[0])
    state["exp_avg_sq"].mul_(betas[1]).addcmul_(rotated, rotated, value=1 - betas[1])
    first, second = (1 - beta ** state["step"] for beta in betas)
    # As published ε is added before the bias is corrected.
    denominator = state["exp_avg_sq"].sqrt().add_(eps)
    return state["exp_avg"] / denominator * (math.sqrt(second) / first)


def refresh_bases(state: State, grad: Tensor, stat_decay: float, every: int) -> None:
    """Put the gradient into the factors; every so many steps one power iteration and QR.

    Args:
        state: of the parameter, changed.
        grad: its gradient.
        stat_decay: decay of the factors.
        every: steps between two refreshes.
    """
    _update_factors(state, grad, stat_decay)
    bases = state["bases"]
    if state["step"] % every or all(basis is None for basis in bases):
        return
    momentum = project(state["exp_avg"], bases, back=True)
    for side, (factor, basis) in enumerate(zip(state["factors"], bases, strict=True)):
        if basis is None:
            continue
        quotients = ((factor @ basis) * basis).sum(0)
        order = quotients.argsort(descending=True)
        state["exp_avg_sq"] = state["exp_avg_sq"].index_select(side, order)
        bases[side] = torch.linalg.qr(factor @ basis[:, order]).Q
    state["exp_avg"] = project(momentum, bases)


def project(tensor: Tensor, bases: Sequence[Tensor | None], back: bool = False) -> Tensor:
    """``Q_Lᵀ G Q_R``, or back ``Q_L G' Q_Rᵀ``; one basis a dimension, ``None`` for the identity.

    Args:
        tensor: G.
        bases: of its dimensions; none at all for vectors.
        back: the other way.
    """
    if len(bases) == 2:  # the same in fewer passes
        left, right = bases
        if left is not None:
            tensor = (left if back else left.mT) @ tensor
        return tensor if right is None else tensor @ (right.mT if back else right)
    for side, basis in enumerate(bases):
        if basis is not None:
            matrix = basis.mT if back else basis
            tensor = torch.tensordot(tensor, matrix, dims=([side], [0])).movedim(-1, side)
    return tensor


def _update_factors(state: State, grad: Tensor, stat_decay: float) -> None:
    for side, factor in enumerate(state["factors"]):
        if factor is not None:
            unfolded = grad if grad.dim() == 2 and side == 0 else grad.movedim(side, 0).flatten(1)
            factor.lerp_(unfolded @ unfolded.mT, 1 - stat_decay)


def _eigenvectors(factor: Tensor) -> Tensor:
    """Eigenvectors, largest eigenvalue first; in float64 where float32 fails."""
    shifted = factor + 1e-30 * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    try:
        vectors = torch.linalg.eigh(shifted).eigenvectors
    except torch.linalg.LinAlgError:
        vectors = torch.linalg.eigh(shifted.double()).eigenvectors.to(factor.dtype)
    return vectors.flip(1)
