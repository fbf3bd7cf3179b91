"""AdamR: Adam in a rotated space, for every matrix of a model."""

from __future__ import annotations

from collections.abc import Sequence

from hf_precond.configs import AdamRConfig
from hf_precond.optim.base import PrecondOptimizer
from hf_precond.optim.leaf import Leaf
from hf_precond.optim.rotation import RotatedAdamRule
from hf_precond.optim.rotation_batch import MatrixLeaf


class AdamR(PrecondOptimizer):
    """Adam's step in the eigenbasis of the gradient's Kronecker second moments.

    Every parameter of two or more dimensions is stepped by
    :class:`~hf_precond.optim.rotation.RotatedAdamRule` (its formula is there),
    every other by AdamW. ``basis="identity"`` is ``torch.optim.AdamW``.

    Start from AdamW's learning rate, or twice that. A loss that jumps within
    the first steps asks for warm-up; a growing count of ``basis_kept`` in
    :meth:`diagnostics` for gradient clipping.

    Args:
        param_groups: as for any torch optimizer.
        blocks: what was found in the model.
        config: the fields.
    """

    config: AdamRConfig
    rule: RotatedAdamRule

    def make_rule(self) -> RotatedAdamRule:
        """The rotated step."""
        return RotatedAdamRule(self.config)

    def step_others(self, leaves: Sequence[Leaf]) -> None:
        """Step every leaf, the matrices with what the model says of them."""
        self.rule.update(self._known(leaves))

    def allocate_rule(self, leaves: Sequence[Leaf]) -> None:
        """Make the state of every leaf, where it is missing."""
        for leaf in self._known(leaves):
            self.rule.allocate(leaf)

    def _known(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        matrices = {placed.weight: placed.matrix for placed in self.placed}
        return [
            MatrixLeaf(
                leaf.param, leaf.grad, leaf.state, leaf.prefix, leaf.group, matrices[leaf.param]
            )
            if leaf.param in matrices
            else leaf
            for leaf in leaves
        ]

    def diagnostics(self) -> dict[str, float]:
        """Refreshes of bases, and how often a rung of the fall-back ladder was needed."""
        return super().diagnostics() | self.rule.diagnostics()
