"""AdamR: Adam in a rotated space, for every matrix of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hf_precond.blocks import LayerMatrix, MomentRequest, Statistic
from hf_precond.configs import AdamRConfig
from hf_precond.optim.base import PrecondOptimizer
from hf_precond.optim.leaf import Leaf
from hf_precond.optim.moments import mean_of
from hf_precond.optim.placed import PlacedMatrix
from hf_precond.optim.rotation.batch import MatrixLeaf
from hf_precond.optim.rotation.rule import RotatedAdamRule

Moment = Literal["input", "output_grad"]
FEATURED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AdamR(PrecondOptimizer):
    """Adam's step in the eigenbasis of the gradient's Kronecker second moments.

    Every parameter of two or more dimensions is stepped by
    :class:`~hf_precond.optim.rotation.rule.RotatedAdamRule` (its formula is there),
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
    rule: RotatedAdamRule

    def make_rule(self) -> RotatedAdamRule:
        """The rotated step."""
        return RotatedAdamRule(self.config)

    # Statistics of features -----------------------------------------------------

    def requests(self) -> Sequence[MomentRequest]:
        """Moments of inputs and output gradients, where ``basis_source`` asks for them."""
        return [
            MomentRequest(f"{placed.matrix.name}.{side}", kind, placed.matrix)
            for placed in self.placed
            for side, kind in self._kinds(placed).items()
        ]

    def due(self, step: int) -> bool:
        """The first two steps, then every ``stat_interval``."""
        if self.config.basis_source == "gradient":
            return False
        return step < 2 or step % self.config.stat_interval == 0

    def commit(self, statistics: Mapping[str, Statistic]) -> None:
        """One update of the factors of every layer that was seen whole."""
        dropped: dict[str, Tensor] = {}
        whole: dict[Leaf, tuple[str, dict[str, Statistic]]] = {}
        for placed in self.placed:
            kinds = self._kinds(placed)
            found = {side: statistics.get(f"{placed.matrix.name}.{side}") for side in kinds}
            seen = {side: f for side, f in found.items() if f is not None}
            if kinds and len(seen) == len(kinds):
                whole[self._leaf(placed)] = placed.matrix.name, seen
        self.rule.allocate_all(list(whole))
        for leaf, (name, seen) in whole.items():
            bad = self.rule.observe(leaf, {s: mean_of(f.sum, f.count) for s, f in seen.items()})
            # Without a single token, on any rank, there was nothing to drop.
            tokens = torch.stack([f.count for f in seen.values()]).amin()
            dropped[name] = bad * (tokens > 0).to(bad)
        self.count_dropped("statistics_dropped", dropped)

    def _kinds(self, placed: PlacedMatrix) -> dict[str, Moment]:
        """Rotated side to the moment that its factor is made of; empty for the gradient's."""
        matrix = placed.matrix
        if self.config.basis_source == "gradient" or not is_featured(matrix):
            return {}
        plan = self.rule.plan(self._leaf(placed))
        if plan.tiles > 1:
            return {}
        kinds: dict[str, Moment] = {"left": "output_grad", "right": "input"}
        if matrix.layout == "transposed":
            kinds = {"left": "input", "right": "output_grad"}
        return {side: kinds[side] for side in plan.sides}

    # The step ---------------------------------------------------------------------

    def step_others(self, leaves: Sequence[Leaf]) -> None:
        """Step every leaf, the matrices with what the model says of them."""
        self.rule.update(self._known(leaves))

    def allocate_rule(self, leaves: Sequence[Leaf]) -> None:
        """Make the state of every leaf, where it is missing."""
        self.rule.allocate_all(self._known(leaves))

    def _known(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        matrices = {placed.weight: placed.matrix for placed in self.placed}
        return [
            MatrixLeaf(**vars(leaf), matrix=matrices[leaf.param])
            if leaf.param in matrices
            else leaf
            for leaf in leaves
        ]

    def _leaf(self, placed: PlacedMatrix) -> MatrixLeaf:
        """A whole weight as a leaf, for its state; there may be no gradient yet."""
        group = self.param_groups[placed.weight_slot[0]]
        weight = placed.weight
        gradient: Tensor = weight if weight.grad is None else weight.grad
        return MatrixLeaf(weight, gradient, self.state[weight], "", group, matrix=placed.matrix)


def is_featured(matrix: LayerMatrix) -> bool:
    """Whether a layer's inputs and output gradients can be observed."""
    whole = matrix.rows is None and matrix.groups == 1 and matrix.weight == "weight"
    hidden = type(matrix.module).__name__ == "NonDynamicallyQuantizableLinear"
    layered = isinstance(matrix.module, FEATURED) or matrix.layout == "transposed"
    return whole and layered and not hidden
