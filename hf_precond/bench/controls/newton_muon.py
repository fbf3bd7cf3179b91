"""Newton-Muon: the gradient times the inverse of its inputs' second moment, then Muon's step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_precond.bench.controls.common import ControlConfig, hidden_matrices, orthogonalised
from hf_precond.config.base import decay, interval, positive
from hf_precond.linalg.matrix_functions import inverse
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import (
    Bound,
    BoundMatrix,
    Preconditioned,
    allocate,
    grouped,
    stacked_gradients,
)
from hf_precond.statistics.moments import update_moments
from hf_precond.statistics.requests import MomentRequest, Statistic


@dataclass(frozen=True)
class NewtonMuonConfig(ControlConfig):
    """The fields of Newton-Muon, with the defaults of its authors' runs.

    Args:
        momentum: μ, in [0, 1). Default 0.95.
        nesterov: Nesterov's form. Default ``True``.
        lr_scale: learning rate of the matrices over ``lr``, > 0. Default 1.
        damping: the ridge, in units of a block's mean eigenvalue, > 0.
            Default 0.2.
        stat_decay: decay of the moments' running average, in [0, 1).
            Default 0.95.
        inverse_interval: steps between two statistics, each with its inverse,
            >= 1. Default 32.
        blocks: diagonal blocks of an input at least twice as wide as the
            output, >= 1. Default 4.
    """

    name: ClassVar[str] = "newton_muon"
    unused: ClassVar[tuple[str, ...]] = ("state_dtype",)

    momentum: float = decay(0.95)
    nesterov: bool = True
    lr_scale: float = positive(1.0)
    damping: float = positive(0.2)
    stat_decay: float = decay(0.95)
    inverse_interval: int = interval(32)
    blocks: int = interval(4)

    def build(self, model: nn.Module, warmup: int) -> PrecondOptimizer:
        """:class:`NewtonMuon` of a model."""
        return NewtonMuon(self.groups(model), hidden_matrices(model, self), self)


class NewtonMuon(PrecondOptimizer):
    """Muon on ``G K⁻¹``, K the second moment of the layer's inputs; AdamW on the rest.

    Every ``inverse_interval`` steps, for hidden matrices::

        K ← b K + (1 - b) E[x xᵀ] ,  P = (K + 0.2·tr(K)/n·I)⁻¹

    and at each step ``M ← μ M + G P``, ``W ← (1 - lr·wd) W -
    lr·m·0.2·√max(rows, columns)·msign(G P + μ M)``. A wide input (an MLP's) has
    K in 4 diagonal blocks. The average starts without bias and with the first
    step; the authors start from 0.001·I and at their 32nd step. They scale the
    step by the root of the longer side, here as Muon's ``match_rms_adamw``.

    Source: "Newton-Muon", 2026, arXiv 2604.01472.

    Args:
        param_groups: as for any torch optimizer.
        structure: ``matrices`` are the hidden ones.
        config: the fields.
    """

    config: NewtonMuonConfig

    def blocks(self, bound: BoundMatrix) -> int:
        """How many diagonal blocks K has.

        Args:
            bound: the matrix.
        """
        rows, columns = bound.matrix.shape
        return self.config.blocks if columns >= 2 * rows else 1

    def requests(self) -> Sequence[MomentRequest]:
        """The second moment of every matrix's input."""
        return [
            MomentRequest(b.matrix.name, "input", b.matrix, blocks=self.blocks(b))
            for b in self.bound
        ]

    def due(self, step: int) -> bool:
        """Every ``inverse_interval`` steps."""
        return step % self.config.inverse_interval == 0

    def allocate(self, bound: BoundMatrix) -> None:
        """Make momentum, moment and inverse (the identity), where they are missing."""
        state, device, dtype = self.state[bound.weight], bound.weight.device, bound.dtype
        count, columns = self.blocks(bound), bound.matrix.columns
        width = -(-columns // count)
        new = bound.prefix + "inverse" not in state
        for name in ("moment", "inverse"):
            allocate(state, bound.prefix + name, (count, width, width), dtype, device)
        allocate(state, bound.prefix + "momentum", bound.matrix.shape, dtype, device)
        allocate(state, bound.prefix + "updates", (), torch.int64, device)
        if new:
            state[bound.prefix + "inverse"].diagonal(dim1=1, dim2=2).fill_(1)

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        """Average the moments of the inputs."""
        dropped: dict[str, Tensor] = {}
        for bound in self.bound:
            found = statistics.get(bound.matrix.name)
            if found is None:
                continue
            moment, updates = self._of(bound, "moment"), self._of(bound, "updates")
            mean = (found.sum / found.count.to(found.sum.dtype)).view_as(moment)[None]
            flags = update_moments([moment], [updates], mean, self.config.stat_decay)
            dropped[bound.matrix.name] = flags[0]
        self.count_dropped("statistics_dropped", dropped)

    def refresh(self) -> None:
        """New inverses by Cholesky, those of one size together; one that fails stays."""
        if not self.due(self.steps):
            return
        for alike in grouped(self.bound, lambda b: self._of(b, "moment").shape[1:]):
            moments = torch.cat([self._of(bound, "moment") for bound in alike])
            found = inverse(moments, self.config.damping)
            kept = torch.cat([self._of(bound, "inverse") for bound in alike])
            values = torch.where(found.usable[:, None, None], found.value, kept)
            sizes = [len(self._of(bound, "inverse")) for bound in alike]
            for bound, value in zip(alike, values.split(sizes), strict=True):
                self._of(bound, "inverse").copy_(value)

    def precondition(self, ready: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """Muon's direction of ``G P``, matrices of one shape together."""
        config = self.config
        for batch in grouped(ready, lambda b: (b.matrix.shape, self.blocks(b), b.group)):
            gradients = stacked_gradients(batch)
            inverses = torch.stack([self._of(bound, "inverse") for bound in batch])
            ahead = list(times_blocks(gradients, inverses).unbind())
            momenta = [self._of(bound, "momentum") for bound in batch]
            beta = self.param_groups[batch[0].group]["momentum"]
            torch._foreach_mul_(momenta, beta)
            torch._foreach_add_(momenta, ahead)
            torch._foreach_add_(ahead, momenta, alpha=beta)
            steps = orthogonalised(
                torch.stack(ahead if config.nesterov else momenta), config.lr_scale
            )
            for bound, step in zip(batch, steps, strict=True):
                yield Preconditioned(bound, step, "direction")

    def uses_fallback(self, bound: Bound) -> bool:
        """No: AdamW never steps these matrices."""
        return False

    def _of(self, bound: BoundMatrix, name: str) -> Tensor:
        return self.state[bound.weight][bound.prefix + name]


def times_blocks(matrices: Tensor, blocks: Tensor) -> Tensor:
    """``G P`` with P block-diagonal.

    Args:
        matrices: G, ``[n, rows, columns]``.
        blocks: of P, ``[n, b, w, w]``, ``b w >= columns``.

    Returns:
        ``[n, rows, columns]``.
    """
    count, width = blocks.shape[1:3]
    columns = matrices.shape[-1]
    padded = nn.functional.pad(matrices, (0, count * width - columns))
    parts = padded.unflatten(-1, (count, width)).movedim(-2, 1)
    return (parts @ blocks).movedim(1, -2).flatten(-2)[..., :columns]
