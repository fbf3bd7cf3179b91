"""AdamR: Adam in a rotated space, for every matrix of a model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.hidden import in_hidden_layers
from hf_precond.architectures.modules import find_matrices
from hf_precond.architectures.parameters import ParameterSurvey
from hf_precond.architectures.structure import LayerMatrix, ModelStructure
from hf_precond.optimizers.adamr.batch import Kind
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.rotated_adam import RotatedAdam
from hf_precond.optimizers.adamr.tiling import Side, Tiling, tile, tile_unbounded
from hf_precond.optimizers.base.layout import kept
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import Bound, BoundMatrix, ParamView, Preconditioned
from hf_precond.registry import register_optimizer

if TYPE_CHECKING:
    from hf_precond.statistics.requests import MomentRequest, Statistic

Moment = Literal["input", "output_grad"]
FEATURED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def every_matrix(model: nn.Module, config: Any) -> ModelStructure:
    """Returns every trainable parameter of two or more dimensions, whole, without its bias.

    Args:
        model: the model.
        config: the fields that the routing shows.

    Raises:
        ValueError: there is none.
    """
    survey = ParameterSurvey(model)
    matrices, treated, reasons = [], {}, {}
    signed = signed_names(model, survey) if config.direction == "sign" else ()
    for matrix in find_matrices(model):
        matrix.bias = None
        (name,) = survey.matrix_names(matrix)
        if min(matrix.shape) == 1:
            reasons[name] = "a single row or column"
        elif matrix.weight.endswith("bias"):  # of experts, a row each
            reasons[name] = "bias"
        else:
            reason = survey.describe(name) + bounded_by(matrix, config)
            if config.basis != "identity" and not tile(matrix.weight_shape, config, matrix).sides:
                reasons[name] = reason
                continue
            matrices.append(matrix)
            treated[name] = reason + (", matrix sign" if name in signed else "")
    if not matrices:
        raise ValueError(
            "adamr: no trainable parameter of this model has two dimensions, so nothing would be "
            "rotated; unfreeze a matrix, or use --optim adamw_torch."
        )
    hidden = [matrix for matrix in matrices if survey.name_of(matrix.weight_parameter) in signed]
    return survey.structure(config, treated, reasons, matrices=matrices, hidden=hidden)


def signed_names(model: nn.Module, survey: ParameterSurvey) -> set[str]:
    """Returns the weights of hidden layers, which ``direction="sign"`` is about.

    Args:
        model: the model.
        survey: its parameters.
    """
    found = {name for name, _, _ in in_hidden_layers(survey, find_attention(model))}
    return found - set(survey.head) - set(survey.tied)


def bounded_by(matrix: LayerMatrix, config: AdamRConfig) -> str:
    """Returns what is done instead where a field keeps a matrix from its usual bases, else nothing.

    Args:
        matrix: the matrix.
        config: the optimizer's.
    """
    shape = matrix.weight_shape
    tiling, usual = tile(shape, config, matrix), tile_unbounded(shape, config, matrix)
    if tiling == usual:
        wide = config.basis != "identity" and not tiling.sides
        return ", without bases: no block of at most max_dim divides a side" if wide else ""
    if not tiling.sides:
        return ", without bases: max_state_ratio"
    side = "rows" if tiling.left else "columns"
    size = tiling.rows if tiling.left else tiling.columns
    blocks = f" in blocks of {size}" if tiling.tiles > usual.tiles else ""
    return f", only {side} rotated{blocks}: max_state_ratio"


@register_optimizer(
    "adamr",
    config=AdamRConfig,
    select=every_matrix,
    description="Adam in the eigenbasis of the gradient's Kronecker second moments",
    memory="2mn, and up to 2m² and 2n² for rotated sides, 1.6 of wide ones",
    start="4e-3",
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
        params: parameters, pairs of names and parameters, or groups, as for any
            torch optimizer.
        structure: what was found in the model, where it was read already (then
            with ``config``); by default it is read off the model.
        config: a config, in the place of fields, or changed by them.
        optimizer_dict: what some trainers call ``params``.
        attach_to: the model; without it, call :meth:`attach` before the first
            step. ``hf_precond.create_optimizer`` makes groups too.
        **fields: of the config.

    Raises:
        RuntimeError: at a step, when a factor was not finite at three
            refreshes in a row.
    """

    config: AdamRConfig
    falls_back = False  # the gradient's moments are there

    @functools.cached_property
    def rotated(self) -> RotatedAdam:
        """The step in the eigenbases. Not copied with the optimizer: its state is that of views."""
        return RotatedAdam(self.config, self.failures, self.counters.add)

    def allocate(self, bound: BoundMatrix) -> None:
        """Make the state of a matrix that is rotated and has a gradient, where it is missing."""
        if bound.weight.grad is not None and not self.uses_fallback(bound):
            self.rotated.allocate(self._view(bound))

    def uses_fallback(self, bound: Bound) -> bool:
        """Whether no side of a matrix is rotated, so that AdamW steps it."""
        assert isinstance(bound, BoundMatrix)
        return not self._tiling(bound).sides

    # Statistics of features -----------------------------------------------------

    def requests(self) -> Sequence[MomentRequest]:
        """Moments of inputs and output gradients, where ``basis_source`` asks for them."""
        if self.config.basis_source == "gradient":
            return []
        from hf_precond.statistics.requests import MomentRequest

        return [
            MomentRequest(f"{bound.matrix.name}.{side}", kind, bound.matrix)
            for bound in self.bound
            for side, kind in self._features(bound).items()
        ]

    def due(self, step: int) -> bool:
        """The first two steps and every ``stat_interval``-th, under ``basis_source="feature"``."""
        if self.config.basis_source == "gradient":
            return False
        return step < 2 or step % self.config.stat_interval == 0

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        """Average the features of each layer whose moments have all arrived."""
        from hf_precond.statistics.moments import mean_of

        dropped: dict[str, Tensor] = {}
        for bound in self.bound:
            keys = {side: f"{bound.matrix.name}.{side}" for side in self._features(bound)}
            if not keys or any(key not in statistics for key in keys.values()):
                continue
            moments = {side: statistics[key] for side, key in keys.items()}
            view = self._view(bound)
            self.rotated.allocate(view)
            means = {side: mean_of(moment.sum, moment.count) for side, moment in moments.items()}
            bad = self.rotated.observe(view, means)
            # Without a single token, on any rank, there was nothing to drop.
            tokens = torch.stack([moment.count for moment in moments.values()]).amin()
            dropped[bound.matrix.name] = bad * (tokens > 0).to(bad)
        self.count_dropped("statistics_dropped", dropped)

    def _features(self, bound: BoundMatrix) -> dict[Side, Moment]:
        """Rotated side to the moment that its factor is made of; empty for the gradient's."""
        matrix, tiling = bound.matrix, self._tiling(bound)
        if self.config.basis_source == "gradient" or not is_featured(matrix) or tiling.tiles > 1:
            return {}
        moments: dict[Side, Moment] = {"left": "output_grad", "right": "input"}
        if matrix.layout == "transposed":
            moments = {"left": "input", "right": "output_grad"}
        return {side: moments[side] for side in tiling.sides}

    # The step ---------------------------------------------------------------------

    def refresh(self) -> None:
        """Refresh the bases that are due, with the gradients in their factors."""
        found = kept("kinds", self.bound, self._kinds)
        for view in [view for kind in found for view in kind.views]:
            assert view.param.grad is not None
            view.grad = view.param.grad
        self.rotated.refresh(found)

    def precondition(self, ready: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """Take Adam's step in the eigenbases, which changes the parameters in place."""
        self.rotated.step()
        rotated = kept("rotated", ready, partial(self._rotated, ready))
        return [Preconditioned(bound, None, "applied") for bound in rotated]

    def _rotated(self, bound: Sequence[BoundMatrix]) -> list[BoundMatrix]:
        return [each for each in bound if not self.uses_fallback(each)]

    def _kinds(self) -> list[Kind]:
        rotated = self._rotated([b for b in self.bound if b.weight.grad is not None])
        signed = {matrix.name for matrix in self.structure.hidden}
        return self.rotated.kinds([self._view(b, b.matrix.name in signed) for b in rotated])

    def _tiling(self, bound: BoundMatrix) -> Tiling:
        return tile(bound.weight.shape, self.config, bound.matrix)

    def _view(self, bound: BoundMatrix, hidden: bool = False) -> ParamView:
        """A whole weight as a view; without a gradient it is for its state alone."""
        group, weight = self.param_groups[bound.group], bound.weight
        gradient: Tensor = weight if weight.grad is None else weight.grad
        state = self.state[weight]
        return ParamView(weight, gradient, state, "", group, matrix=bound.matrix, hidden=hidden)


def is_featured(matrix: LayerMatrix) -> bool:
    """Returns whether a layer's inputs and output gradients can be observed.

    Args:
        matrix: the layer's.
    """
    whole = matrix.rows is None and matrix.groups == 1 and matrix.weight == "weight"
    hidden = type(matrix.module).__name__ == "NonDynamicallyQuantizableLinear"
    layered = isinstance(matrix.module, FEATURED) or matrix.layout == "transposed"
    return whole and layered and not hidden
