"""When and how the factors of AFOpt are recomputed from its moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.configs import AFOptConfig
from hf_precond.linalg import roots
from hf_precond.linalg.packed import pack
from hf_precond.optim.attention_factors import AttentionFactors, merged, quadratic
from hf_precond.optim.attention_plan import Plan, RightFactor, State, Treatment
from hf_precond.optim.failures import Failures
from hf_precond.optim.leaf import grouped


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
        plan: Plan,
        state: State,
        config: AFOptConfig,
        count: Callable[[str, int | Tensor], None],
        failures: Failures,
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
        """Refresh what is due at step number ``step``."""
        rights = [right for right in self.plan.rights if self.due(step, right.phase)]
        for batch in grouped(rights, _right_batch):
            self.failures.attempt(self._rights, batch, name_of_right, self.count)
        lefts = [t for t in self.plan.treatments if t.left and self.due(step, t.phase)]
        for alike in grouped(lefts, _left_batch):
            self.failures.attempt(self._lefts, alike, name_of_left, self.count)

    def _rights(self, rights: Sequence[RightFactor]) -> None:
        moments, means = zip(*(self.right_moment(right) for right in rights), strict=True)
        batch = torch.stack(moments)
        blocks = batch.shape[1] if batch.dim() == 4 else 1
        size = batch.shape[-1]
        mean = torch.stack(means).repeat_interleave(blocks)
        work = batch.view(-1, size, size)
        found = _root(rights[0].kind, work, self.config.damping, mean, blocks)
        names = [name_of_right(right) for right in rights]
        held = [right.tensor(self.state) for right in rights]
        self._keep(names, held, found, batch.shape, rights[0].packed)

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
            last = right.columns - (moment.shape[0] - 1) * moment.shape[-1]
            moment[-1, last:] = 0
            moment[-1, :, last:] = 0
        return moment, merged(moment, right.columns)

    def _lefts(self, treatments: Sequence[Treatment]) -> None:
        factors = self.factors
        moments = torch.stack([factors.left(treatment) for treatment in treatments])
        kind = treatments[0].left
        assert kind is not None
        damping = factors.damping(moments.dtype)
        found = _root(kind, moments.flatten(0, 1), damping)
        held = [(t.held(self.state), t) for t in treatments]
        names = [name_of_left(treatment) for treatment in treatments]
        self._keep(names, [state[t.name("left")] for state, t in held], found, moments.shape)
        if self.plan.predicts and treatments[0].in_logits:
            for state, treatment in held:
                state[treatment.name("left_moment")].copy_(factors.left(treatment, damped=False))
        if self.config.joint and treatments[0].in_logits:
            for state, treatment in held:
                own = self._own_moment(treatment).to(moments.dtype)
                found = _root("inverse", own, damping)
                name = f"{treatment.placed.matrix.name} (own factor)"
                self._keep([name], [state[treatment.name("own")]], found, own[None].shape)

    def _own_moment(self, treatment: Treatment) -> Tensor:
        """A_Q for q, A_K for k: what the joint correction takes out of the other factor's space."""
        block = treatment.block
        assert block is not None
        damped = self.config.covariant_damping
        if treatment.role == "q":
            return self.factors.queries(block, damped)
        return self.factors.keys(block, damped)

    def _keep(
        self,
        names: Sequence[str],
        held: Sequence[Tensor],
        found: roots.Refreshed,
        shape: torch.Size,
        packed: bool = False,
    ) -> None:
        """Copy new factors into the state where they are usable."""
        values = found.value.view(shape)
        usable = found.usable.view(*shape[:-2], 1, 1)
        if packed:
            values, usable = pack(values), usable[..., 0]
        for place, tensor in enumerate(held):
            tensor.copy_(torch.where(usable[place], values[place].to(tensor.dtype), tensor))
        self.failures.watch("factor", names, ~found.usable.view(len(held), -1).all(1))
        self.count("failed_refreshes", (~found.usable).sum())
        self.count("identity_factors", found.identity.sum())


def _root(
    kind: str, moments: Tensor, damping: float, mean: Tensor | None = None, blocks: int = 1
) -> roots.Refreshed:
    """The factors of a kind of a batch ``[n, s, s]``."""
    if kind == "root":
        return roots.inverse_sqrt(moments, damping, mean, blocks)
    return (roots.inverse if kind == "inverse" else roots.inverse_factor)(moments, damping, mean)


def name_of_right(right: RightFactor) -> str:
    """A right factor's name in messages."""
    return f"{right.anchor.matrix.name} (input factor {right.key})"


def name_of_left(treatment: Treatment) -> str:
    """A left factor's name in messages."""
    return f"{treatment.placed.matrix.name} (left factor)"


def _right_batch(r: RightFactor) -> tuple:
    return r.shape, r.kind, r.anchor.dtype, r.anchor.weight.device


def _left_batch(t: Treatment) -> tuple:
    return t.heads, t.rows, t.left, t.in_logits, t.placed.dtype, t.placed.weight.device
