"""AdamR: Adam in a rotated space, for every matrix of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_precond.architectures.modules import find_matrices
from hf_precond.architectures.parameters import ParameterSurvey
from hf_precond.architectures.structure import (
    LayerMatrix,
    ModelStructure,
)
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.rotated_adam import RotatedAdam
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import BoundMatrix, ParamView
from hf_precond.registry import register_optimizer
from hf_precond.statistics.moments import mean_of
from hf_precond.statistics.requests import MomentRequest, Statistic

Moment = Literal["input", "output_grad"]
FEATURED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def every_matrix(model: nn.Module, config: Any) -> ModelStructure:
    """For AdamR: every trainable parameter of two or more dimensions, whole, without bias.

    Raises:
        ValueError: when there is none.
    """
    survey = ParameterSurvey(model)
    matrices, treated, reasons = [], {}, {}
    for matrix in find_matrices(model):
        matrix.bias = None
        (name,) = survey.matrix_names(matrix)
        if min(matrix.shape) == 1:
            reasons[name] = "a single row or column"
        elif matrix.weight.endswith("bias"):  # of experts, a row each
            reasons[name] = "bias"
        else:
            matrices.append(matrix)
            treated[name] = survey.describe(name)
    if not matrices:
        raise ValueError(
            "adamr: no trainable parameter of this model has two dimensions, so nothing would be "
            "rotated; unfreeze a matrix, or use --optim adamw_torch."
        )
    return survey.structure(config, treated, reasons, matrices=matrices)


@register_optimizer(
    "adamr",
    config=AdamRConfig,
    select=every_matrix,
    description="Adam in the eigenbasis of the gradient's Kronecker second moments",
    memory="2mn, and 2m² (2n²) where its left (right) side is rotated",
)
class AdamR(PrecondOptimizer):
    """Adam's step in the eigenbasis of the gradient's Kronecker second moments.

    Every parameter of two or more dimensions is stepped by
    :class:`~hf_precond.optimizers.adamr.rotated_adam.RotatedAdam` (its formula is there),
    every other by AdamW; a weight that holds the matrices of many experts is
    stepped expert by expert. ``basis="identity"`` is ``torch.optim.AdamW``.

    ``basis_source="feature"`` takes for the factors the second moments of the
    layer's inputs (R) and output gradients (L), K-FAC's, in linear layers and
    convolutions; embeddings, grouped convolutions, parameters of no layer and
    sides divided into blocks keep the gradient's.

    Start from twice AdamW's learning rate, with ``betas=(0.95, 0.95)``. A loss
    that jumps within the first steps asks for warm-up; a growing
    ``basis_kept`` of :meth:`diagnostics`, the refreshes that found numbers
    that are not finite, for clipping. A longer ``basis_interval`` is cheaper
    and costs loss.

    Args:
        param_groups: as for any torch optimizer.
        blocks: what was found in the model.
        config: the fields.

    Raises:
        RuntimeError: at a step, when a factor was not finite at three
            refreshes in a row.
    """

    config: AdamRConfig
    fallback: RotatedAdam

    def make_fallback(self) -> RotatedAdam:
        """The rotated step."""
        return RotatedAdam(self.config)

    # Statistics of features -----------------------------------------------------

    def requests(self) -> Sequence[MomentRequest]:
        """Moments of inputs and output gradients, where ``basis_source`` asks for them."""
        return [
            MomentRequest(f"{bound.matrix.name}.{side}", kind, bound.matrix)
            for bound in self.bound
            for side, kind in self._kinds(bound).items()
        ]

    def due(self, step: int) -> bool:
        """The first two steps, then every ``stat_interval``."""
        if self.config.basis_source == "gradient":
            return False
        return step < 2 or step % self.config.stat_interval == 0

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        """One update of the factors of every layer that was seen whole."""
        dropped: dict[str, Tensor] = {}
        whole: dict[ParamView, tuple[str, dict[str, Statistic]]] = {}
        for bound in self.bound:
            kinds = self._kinds(bound)
            found = {side: statistics.get(f"{bound.matrix.name}.{side}") for side in kinds}
            seen = {side: f for side, f in found.items() if f is not None}
            if kinds and len(seen) == len(kinds):
                whole[self._view(bound)] = bound.matrix.name, seen
        self.fallback.allocate(list(whole))
        for view, (name, seen) in whole.items():
            bad = self.fallback.observe(view, {s: mean_of(f.sum, f.count) for s, f in seen.items()})
            # Without a single token, on any rank, there was nothing to drop.
            tokens = torch.stack([f.count for f in seen.values()]).amin()
            dropped[name] = bad * (tokens > 0).to(bad)
        self.count_dropped("statistics_dropped", dropped)

    def _kinds(self, bound: BoundMatrix) -> dict[str, Moment]:
        """Rotated side to the moment that its factor is made of; empty for the gradient's."""
        matrix = bound.matrix
        if self.config.basis_source == "gradient" or not is_featured(matrix):
            return {}
        tiling = self.fallback.tiling(self._view(bound))
        if tiling.tiles > 1:
            return {}
        kinds: dict[str, Moment] = {"left": "output_grad", "right": "input"}
        if matrix.layout == "transposed":
            kinds = {"left": "input", "right": "output_grad"}
        return {side: kinds[side] for side in tiling.sides}

    # The step ---------------------------------------------------------------------

    def _raw_views(self, *args: Any) -> list[ParamView]:
        """Every parameter, the matrices with what the model says of them."""
        views = super()._raw_views(*args)
        matrices = {bound.weight: bound.matrix for bound in self.bound}
        for view in views:
            view.matrix = matrices.get(view.param)
        return views

    def _view(self, bound: BoundMatrix) -> ParamView:
        """A whole weight as a view, for its state; there may be no gradient yet."""
        group = self.param_groups[bound.group]
        weight = bound.weight
        gradient: Tensor = weight if weight.grad is None else weight.grad
        return ParamView(weight, gradient, self.state[weight], "", group, matrix=bound.matrix)


def is_featured(matrix: LayerMatrix) -> bool:
    """Whether a layer's inputs and output gradients can be observed."""
    whole = matrix.rows is None and matrix.groups == 1 and matrix.weight == "weight"
    hidden = type(matrix.module).__name__ == "NonDynamicallyQuantizableLinear"
    layered = isinstance(matrix.module, FEATURED) or matrix.layout == "transposed"
    return whole and layered and not hidden
