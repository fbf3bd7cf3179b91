"""When and how the factors of AFOpt are recomputed from its moments.

Every factor at the steps 0, ``stat_interval`` and ``2 stat_interval``; from then on each attention
(each linear layer outside) on a step of its own, ``t ≡ i·stat_interval`` modulo
``inverse_interval``, the layers numbered in model order, i their number modulo
``inverse_interval // stat_interval``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.distributed.collectives import is_sharded
from hf_precond.linalg import matrix_functions
from hf_precond.linalg.matrix_functions import pack
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.factors import AttentionFactors, merged, quadratic
from hf_precond.optimizers.afopt.plan import AFOptPlan, MatrixPlan, RightFactor, State
from hf_precond.optimizers.base.parameters import BoundMatrix, grouped
from hf_precond.optimizers.base.refresh import FailureRecord, ShardedRefresh

Due = RightFactor | MatrixPlan
COUNTERS = ("failed_refreshes", "identity_factors")
ROOT_COST = 60
"""Multiplications of an inverse square root over those of an inverse."""


class Refresh:
    """Recomputes the factors that are due, those of one shape in one batch.

    Args:
        plan: who needs what.
        state: the optimizer's state: moments in, factors out.
        config: the config.
        count: the optimizer's counter.
        failures: what counts failures in a row.
    """

    def __init__(
        self,
        plan: AFOptPlan,
        state: State,
        config: AFOptConfig,
        count: Callable[[str, int | Tensor], None],
        failures: FailureRecord,
    ) -> None:
        self.plan, self.state, self.config, self.count = plan, state, config, count
        self.failures = failures
        self.factors = AttentionFactors(plan, state, config)

    def due(self, step: int, phase: int) -> bool:
        """At the first three statistics for all, then staggered over the interval."""
        config = self.config
        if step <= 2 * config.stat_interval and step % config.stat_interval == 0:
            return True
        return step % config.inverse_interval == phase

    def run(self, step: int) -> None:
        """Refresh what is due at step number ``step``, every rank its share of it."""
        rights = [right for right in self.plan.rights if self.due(step, right.phase)]
        lefts = [t for t in self.plan.treatments if t.left and self.due(step, t.phase)]
        due: list[Due] = [*rights, *lefts]
        # Reading a sharded weight takes all ranks.
        together = [item for item in due if not _reads_shards(item)]
        for items, shared in ((together, True), ([i for i in due if _reads_shards(i)], False)):
            if items:
                self._run(items, shared)

    def _run(self, items: Sequence[Due], shared: bool) -> None:
        """Refresh some of what is due."""
        device = _placed(items[0]).weight.device
        pieces = ShardedRefresh(items, [_cost(item) for item in items], device, COUNTERS, shared=shared)
        rights = [item for item in pieces.mine() if isinstance(item, RightFactor)]
        for batch in grouped(rights, _right_batch):
            pieces.attempt(lambda chosen: self._rights(chosen, pieces), batch)
        lefts = [item for item in pieces.mine() if isinstance(item, MatrixPlan)]
        for alike in grouped(lefts, _left_batch):
            pieces.attempt(lambda chosen: self._lefts(chosen, pieces), alike)
        pieces.share(self._results)
        pieces.report(self.failures, _name, self.count, zeros=True)

    def _results(self, item: Due) -> list[Tensor]:
        """What a refresh changes."""
        if isinstance(item, RightFactor):
            return [item.tensor(self.state)]
        names = ("left", *(("left_moment", "own") if item.in_logits else ()))
        held = item.held(self.state)
        return [held[item.name(name)] for name in names if item.name(name) in held]

    def _rights(self, rights: Sequence[Any], pieces: ShardedRefresh[Due]) -> None:
        moments, means = zip(*(self.right_moment(right) for right in rights), strict=True)
        batch = torch.stack(moments)
        blocks = batch.shape[1] if batch.dim() == 4 else 1
        size = batch.shape[-1]
        mean = torch.stack(means).repeat_interleave(blocks)
        work = batch.view(-1, size, size)
        found = _root(rights[0].kind, work, self.config.damping, mean, blocks)
        held = [right.tensor(self.state) for right in rights]
        self._keep(rights, held, found, batch.shape, pieces, rights[0].packed)

    def right_moment(self, right: RightFactor) -> tuple[Tensor, Tensor]:
        """The moment under a right factor, and its mean eigenvalue."""
        moment = right.moment.read(self.state)
        if right.down is not None:
            down = right.down.read().to(moment.dtype)
            moment = quadratic(down[None], moment)[0]
            wider = right.columns - moment.shape[0]
            if wider > 0:
                # A bias of LoRA's B: the second moment of the constant 1 is 1.
                moment = F.pad(moment, (0, wider, 0, wider))
                moment.diagonal()[-wider:] = 1.0
        elif moment.dim() == 2:
            moment = moment[: right.columns, : right.columns]
        elif right.columns < right.moment.request.matrix.columns:
            moment = moment.clone()
            block, last = divmod(right.columns, moment.shape[-1])
            moment[block, last:] = 0
            moment[block, :, last:] = 0
        return moment, merged(moment, right.columns)

    def _lefts(self, treatments: Sequence[Any], pieces: ShardedRefresh[Due]) -> None:
        factors = self.factors
        moments = torch.stack([factors.left(treatment) for treatment in treatments])
        kind = treatments[0].left
        assert kind is not None
        damping = factors.damping(moments.dtype)
        found = _root(kind, moments.flatten(0, 1), damping)
        held = [(t.held(self.state), t) for t in treatments]
        kept = [state[t.name("left")] for state, t in held]
        self._keep(treatments, kept, found, moments.shape, pieces)
        if self.plan.predicts and treatments[0].in_logits:
            for state, treatment in held:
                state[treatment.name("left_moment")].copy_(factors.left(treatment, damped=False))
        if self.config.joint and treatments[0].in_logits:
            for state, treatment in held:
                own = self._own_moment(treatment).to(moments.dtype)
                found = _root("inverse", own, damping)
                kept = [state[treatment.name("own")]]
                self._keep([treatment], kept, found, own[None].shape, pieces)

    def _own_moment(self, treatment: MatrixPlan) -> Tensor:
        """A_Q for q, A_K for k: what the joint correction takes out of the other factor's space."""
        block = treatment.block
        assert block is not None
        damped = self.config.covariant_damping
        if treatment.role == "q":
            return self.factors.queries(block, damped)
        return self.factors.keys(block, damped)

    def _keep(
        self,
        items: Sequence[Due],
        held: Sequence[Tensor],
        found: matrix_functions.DampedInverse,
        shape: torch.Size,
        pieces: ShardedRefresh[Due],
        packed: bool = False,
    ) -> None:
        """Copy new factors into the state where they are usable."""
        values = found.value.view(shape)
        usable = found.usable.view(*shape[:-2], 1, 1)
        if packed:
            values, usable = pack(values), usable[..., 0]
        kept = torch.where(usable, values.to(held[0].dtype), torch.stack(list(held)))
        torch._foreach_copy_(list(held), list(kept.unbind()))
        pieces.fail(items, ~found.usable.view(len(held), -1).all(1))
        pieces.count("failed_refreshes", (~found.usable).sum())
        pieces.count("identity_factors", found.identity.sum())


def _root(
    kind: str, moments: Tensor, damping: float, mean: Tensor | None = None, blocks: int = 1
) -> matrix_functions.DampedInverse:
    """The factors of a kind of a batch ``[n, s, s]``."""
    if kind == "root":
        return matrix_functions.inverse_sqrt(moments, damping, mean, blocks)
    return (matrix_functions.inverse if kind == "inverse" else matrix_functions.inverse_factor)(moments, damping, mean)


def _name(item: Due) -> str:
    """A factor's name in messages."""
    if isinstance(item, RightFactor):
        return f"{item.anchor.matrix.name} (input factor {item.key})"
    return f"{item.bound.matrix.name} (left factor)"


def _placed(item: Due) -> BoundMatrix:
    """The matrix whose state holds a factor."""
    return item.anchor if isinstance(item, RightFactor) else item.bound


def _reads_shards(item: Due) -> bool:
    """Whether computing a factor gathers a sharded weight."""
    reads = isinstance(item, MatrixPlan) or item.down is not None
    return reads and is_sharded(_placed(item).weight)


def _cost(item: Due) -> float:
    """Of a refresh, in multiplications."""
    if isinstance(item, RightFactor):
        size, copies = item.shape[-1], math.prod(item.shape[:-2])
        return copies * size**3 * (ROOT_COST if item.kind == "root" else 1)
    columns = item.bound.matrix.columns
    return item.heads * item.rows * (columns**2 + item.rows * (columns + item.rows))


def _right_batch(r: RightFactor) -> tuple:
    return r.shape, r.kind, r.anchor.dtype, r.anchor.weight.device


def _left_batch(t: MatrixPlan) -> tuple:
    return t.heads, t.rows, t.left, t.in_logits, t.bound.dtype, t.bound.weight.device
