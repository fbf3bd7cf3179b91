"""Sign descent, as a package of its own adds it to ``--optim``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hf_precond import OptimizerConfig, register_optimizer
from hf_precond.architectures.modules import find_matrices, is_linear
from hf_precond.architectures.parameters import ParameterSurvey
from hf_precond.architectures.structure import ModelStructure
from hf_precond.config.base import positive
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import BoundMatrix, Preconditioned


@dataclass(frozen=True)
class ToyConfig(OptimizerConfig):
    """Sign descent on linear layers, AdamW elsewhere.

    Args:
        size: size of a matrix's step per unit of ``lr``, > 0.
    """

    name: ClassVar[str] = "toy"

    size: float = positive(1.0)


def linear_layers(model: nn.Module, config: ToyConfig) -> ModelStructure:
    """The weights and biases of linear layers."""
    survey = ParameterSurvey(model)
    matrices = [matrix for matrix in find_matrices(model) if is_linear(matrix.module)]
    reasons = {
        name: survey.describe(name) for matrix in matrices for name in survey.matrix_names(matrix)
    }
    return survey.structure(config, reasons, matrices=matrices)


@register_optimizer(
    "toy",
    config=ToyConfig,
    select=linear_layers,
    title="Sign descent",
    description="the sign of the gradient of linear layers",
    memory="none; the fallback optimizer's elsewhere",
)
class Toy(PrecondOptimizer):
    """``p <- (1 - lr wd) p - lr size sign(g)``."""

    config: ToyConfig

    def precondition(self, ready: Sequence[BoundMatrix]) -> Iterator[Preconditioned]:
        """The signs of the gradients, as directions."""
        for bound in ready:
            yield Preconditioned(bound, self.config.size * bound.gradient().sign(), "direction")

    def uses_fallback(self, bound: BoundMatrix) -> bool:
        """Directions need none."""
        return False
