"""The published code of SGD-PH (Sun, PolyU 2024; arXiv 2403.02681), formula by formula."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from hf_precond.architectures.parameters import ParameterSurvey
from hf_precond.optimizers.base.fallback import CoupledSGD, FallbackOptimizer
from hf_precond.optimizers.base.parameters import Bound, BoundNorm, ParamView, Preconditioned
from hf_precond.optimizers.sgdph import directions
from hf_precond.optimizers.sgdph.optimizer import SGDPH
from hf_precond.statistics.requests import CurvatureRequest


class SGDPHReference(SGDPH):
    """SGD-PH with ``reference=True``: reproduces the authors' trajectories.

    Every one-dimensional parameter but the last is stepped by its curvature,
    and one of them is probed at each step, in turn, with z of ones::

        D ← μ D + (1 - μ) |H z|
        u = τ (1 - μⁿ) v / (D + ε_c)      n: number of the current cycle
        p ← p - lr (u + wd p)

    All others are stepped by SGD with coupled weight decay. Tensors take their
    turn in model order, which is the published order for one parameter group.
    """

    def make_fallback(self) -> FallbackOptimizer:
        """The authors' SGD."""
        return CoupledSGD()

    def requests(self) -> Sequence[CurvatureRequest]:
        """One a cycle of each parameter but the last, whose curvature is never used."""
        cycle, norms = len(self.bound), [bound.norm for bound in self.bound[:-1]]
        return [
            CurvatureRequest(norm.name, norm, "ones", cycle, turn, autocast=True)
            for turn, norm in enumerate(norms)
        ]

    def due(self, step: int) -> bool:
        """All steps but the last of a cycle."""
        return (step + 1) % len(self.bound) != 0

    def average(
        self, views: Sequence[ParamView], estimates: Sequence[Tensor], present: Tensor
    ) -> Tensor:
        """Average the magnitudes of the estimates, with the momentum's decay."""
        magnitudes = [estimate.abs() for estimate in estimates]
        return directions.average_probes(views, magnitudes, present, self.config.momentum)

    def uses_fallback(self, bound: Bound) -> bool:
        """The last parameter does."""
        return bound is self.bound[-1]

    def allocate(self, bound: BoundNorm) -> None:
        """Make the state of a parameter that is stepped by its curvature."""
        if not self.uses_fallback(bound):
            super().allocate(bound)

    def precondition(self, ready: Sequence[BoundNorm]) -> Iterable[Preconditioned]:
        """Directions of all parameters but the last."""
        return super().precondition([bound for bound in ready if not self.uses_fallback(bound)])

    def multipliers(self, views: Sequence[ParamView]) -> Tensor:
        """``τ (1 - μⁿ) / (D + ε_c)``, n the number of the current cycle; all views end to end."""
        cycle = (self.steps + 1) // len(self.bound) + 1
        factor = self.config.tau * (1 - views[0].group["momentum"] ** cycle)
        return factor / directions.joined(views, "curvature").add_(self.config.curvature_eps)


def vectors(survey: ParameterSurvey) -> list[str]:
    """Names of the one-dimensional parameters."""
    return [name for name, parameter in survey.parameters.items() if parameter.dim() == 1]
