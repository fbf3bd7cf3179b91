"""torch's AdamW, SGD and Muon, and schedule-free AdamW, as controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_precond.bench.controls.common import ControlConfig, hidden_matrices
from hf_precond.config.base import decay, positive


@dataclass(frozen=True)
class AdamWConfig(ControlConfig):
    """``torch.optim.AdamW``, fused (Loshchilov and Hutter, 2019)."""

    name: ClassVar[str] = "adamw"

    def build(self, model: nn.Module, warmup: int) -> torch.optim.Optimizer:
        """``torch.optim.AdamW`` on all parameters."""
        groups = self.groups(model)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(frozen=True)
class SGDConfig(ControlConfig):
    """``torch.optim.SGD`` with momentum; its weight decay is coupled.

    Args:
        momentum: in [0, 1). Default 0.9.
        nesterov: Nesterov's form. Default ``False``.
    """

    name: ClassVar[str] = "sgd"
    unused: ClassVar[tuple[str, ...]] = (*ControlConfig.unused, "betas", "eps")

    momentum: float = decay(0.9)
    nesterov: bool = False

    def build(self, model: nn.Module, warmup: int) -> torch.optim.Optimizer:
        """``torch.optim.SGD`` on all parameters."""
        groups, momentum = self.groups(model), self.momentum
        return torch.optim.SGD(groups, self.lr, momentum=momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class TorchMuonConfig(ControlConfig):
    """``torch.optim.Muon`` on hidden matrices, fused ``torch.optim.AdamW`` on the rest.

    Muon (Jordan et al., 2024) with ``match_rms_adamw`` (Liu et al., 2025). A
    fused weight (q, k and v in one) is one matrix to it, and convolutions are
    AdamW's, both unlike ``--optim muon``.

    Args:
        momentum: of the matrices, in [0, 1). Default 0.95.
        nesterov: Nesterov's form. Default ``True``.
        lr_scale: learning rate of the matrices over ``lr``, > 0. Default 1.
    """

    name: ClassVar[str] = "torch_muon"

    momentum: float = decay(0.95)
    nesterov: bool = True
    lr_scale: float = positive(1.0)

    def build(self, model: nn.Module, warmup: int) -> Both:
        """Muon and AdamW, as one."""
        matrices = {id(m.weight_parameter) for m in hidden_matrices(model, self).matrices}
        muon, rest = [], []
        for group in self.groups(model):
            inside = [p for p in group["params"] if id(p) in matrices and p.dim() == 2]
            taken = {id(p) for p in inside}
            outside = [p for p in group["params"] if id(p) not in taken]
            if inside:
                muon.append(group | {"params": inside, "lr": group["lr"] * self.lr_scale})
            if outside:
                rest.append(group | {"params": outside})
        for group in muon:  # the decay of a step is lr · weight_decay, as of the others
            group["weight_decay"] /= self.lr_scale
        first = torch.optim.Muon(
            muon, momentum=self.momentum, nesterov=self.nesterov, adjust_lr_fn="match_rms_adamw"
        )
        second = torch.optim.AdamW(rest, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        return Both([first, second])


class Both:
    """Several torch optimizers that step as one.

    Args:
        parts: the optimizers, of different parameters.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """The state of all, by parameter."""
        return {key: value for part in self.parts for key, value in part.state.items()}

    def step(self) -> None:
        """Step each."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for part in self.parts:
            part.zero_grad()


@dataclass(frozen=True)
class ScheduleFreeConfig(ControlConfig):
    """Schedule-free AdamW (Defazio et al., "The Road Less Scheduled", 2024), from PyPI.

    It warms up by itself and its rate does not decay: the bench's schedule does
    not apply. It is evaluated at its average (the package's ``eval()``).
    ``beta1`` is the interpolation that takes the momentum's place.
    """

    name: ClassVar[str] = "schedulefree"

    def build(self, model: nn.Module, warmup: int) -> torch.optim.Optimizer:
        """``schedulefree.AdamWScheduleFree`` on all parameters.

        Args:
            model: the model.
            warmup: its ``warmup_steps``.

        Raises:
            RuntimeError: the package is not installed.
        """
        try:
            import schedulefree
        except ImportError:
            raise RuntimeError(
                "optimizer 'schedulefree' needs the package schedulefree; install it "
                "(pip install schedulefree), or drop that optimizer from the file."
            ) from None
        return schedulefree.AdamWScheduleFree(
            self.groups(model), lr=self.lr, betas=self.betas, eps=self.eps, warmup_steps=warmup
        )
