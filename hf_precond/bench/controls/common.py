"""What the controls share: their configs, hidden matrices, the length of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_precond.architectures.groups import parameter_groups
from hf_precond.architectures.parameters import ParameterSurvey, add_reason
from hf_precond.architectures.structure import ModelStructure
from hf_precond.config.base import OptimizerConfig
from hf_precond.linalg.matrix_functions import largest_entry, newton_schulz
from hf_precond.optimizers.muon.config import MuonConfig
from hf_precond.optimizers.muon.optimizer import hidden_matrices as muon_matrices

RMS = 0.2
"""Root mean square of a step's entries per unit of learning rate, as AdamW's usually is."""


@dataclass(frozen=True)
class ControlConfig(OptimizerConfig):
    """The fields of a control; those without effect are refused, not ignored.

    Raises:
        ValueError: naming a field that has no effect here.
    """

    unused: ClassVar[tuple[str, ...]] = ("state_dtype", "skip_nonfinite")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.unused:
            if getattr(self, name) != self._fields()[name].default:
                raise ValueError(f"{name}: it has no effect under {self.name}; leave it out.")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups by the Trainer's rule: no decay of biases and norms.

        Args:
            model: the model.
        """
        own = {"lr": self.lr, "weight_decay": self.weight_decay}
        return [own | group for group in parameter_groups(model, self)]

    def build(self, model: nn.Module, warmup: int) -> Any:
        """The optimizer of a model.

        Args:
            model: the model.
            warmup: steps of warm-up, where the optimizer has its own schedule.
        """
        raise NotImplementedError


def hidden_matrices(model: nn.Module, config: OptimizerConfig) -> ModelStructure:
    """The matrices that ``--optim muon`` steps, q, k and v apart; stacks of experts left out.

    Args:
        model: the model.
        config: the config that the routing shows.

    Raises:
        ValueError: there is none.
    """
    found = muon_matrices(model, MuonConfig())
    survey = ParameterSurvey(model)
    treated: dict[str, str] = {}
    matrices = [matrix for matrix in found.matrices if not matrix.stacked]
    for matrix in matrices:
        add_reason(treated, survey.matrix_names(matrix), "hidden layer")
    return survey.structure(config, treated, matrices=matrices)


def orthogonalised(matrices: Tensor, scale: float = 1.0) -> Tensor:
    """``scale · 0.2 · √max(m, n) · msign(Z)`` of a batch, in bfloat16 on a GPU.

    Args:
        matrices: Z, ``[…, m, n]``.
        scale: multiplier.
    """
    x = matrices / largest_entry(matrices)
    sign = newton_schulz(x.bfloat16() if x.is_cuda and x.dtype != torch.float64 else x)
    return sign.to(matrices.dtype) * (scale * RMS * math.sqrt(max(matrices.shape[-2:])))
