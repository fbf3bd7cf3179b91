"""Left factors: what stands between the rows of a weight and the attention space.

For a head h, in torch's layout (``Ŵ = [W | b]``, ``x̂ = (x, 1)``):

- q: ``A_K,h = E[k kᵀ] = Ŵ_k,h A_X Ŵ_k,hᵀ`` (its key-value head's, under grouped queries)
- k: ``A_Q,h = Ŵ_q,h A_X Ŵ_q,hᵀ``, summed over the query heads that share the key
- v: ``W_o,hᵀ W_o,h``, summed likewise
- LoRA's B: that of its role; LoRA's A: ``Σ_h B_hᵀ A_h B_h``
- DoRA scales the rows of ``W + s B A`` by D = diag(m / norm), the norm held constant: its B has
  ``D_h A_h D_h`` (o's B the identity all the same), its A ``Σ_h B_hᵀ D_h A_h D_h B_h``

Nothing is collected for A_K and A_Q unless queries and keys are rotated or normed on their way to
the logits: then they are the moments of the vectors that the logits are made of, which under RoPE
are averaged, ``(1/n) Σ_i R_iᵀ C R_i`` over the positions (``rope="averaged"``).

- ``center``: A_K of keys less their sequence's mean; k's right factor that of such inputs, the
  constant 1 among them
- ``space="product"``: ``A_K,h = W_k,h W_k,hᵀ``, A_Q likewise, without bias; no right factors
- damping: ``A + λ·tr(A)/n·I``, at least 1e-12. ``covariant_damping``: the left factors as if A_X
  were damped, ``A_K + λ·tr(A_X)/n·Ŵ_k Ŵ_kᵀ`` (v: ``(1 + λ) W_oᵀ W_o``), and ``8 ε·tr(A)/n·I``
- an input wider than ``max_dim``: ``⌈in / max_dim⌉`` diagonal blocks of equal width of A_X, with
  the mean eigenvalue of all, here too
- averages: ``A ← b A + (1 - b) E[·]``, ``b = min(stat_decay, 1 - 1/k)`` at the k-th statistic

Every factor at the steps 0, ``stat_interval`` and ``2 stat_interval``; from then on each attention
(each linear layer outside) on a step of its own, ``t ≡ i·stat_interval`` modulo
``inverse_interval``, the layers numbered in model order, i their number modulo
``inverse_interval // stat_interval``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.architectures.structure import AttentionBlock
from hf_precond.distributed.collectives import is_sharded
from hf_precond.linalg import matrix_functions
from hf_precond.linalg.matrix_functions import pack
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.plan import AFOptPlan, MatrixPlan, Moment, RightFactor, State
from hf_precond.optimizers.base.parameters import BoundMatrix, grouped
from hf_precond.optimizers.base.refresh import FailureRecord, ShardedRefresh

JITTER = 8
"""Damping beside the covariant one, in units of rounding times the mean eigenvalue (1e-6)."""


def heads_of(matrix: Tensor, heads: int) -> Tensor:
    """``[out, …] -> [heads, out / heads, …]``."""
    return matrix.unflatten(0, (heads, -1))


def quadratic(weight: Tensor, moment: Tensor) -> Tensor:
    """``W A Wᵀ`` per head.

    Args:
        weight: ``[H, d_h, c]``; narrower than the moment: its leading block.
        moment: ``[n, n]``, or diagonal blocks ``[blocks, w, w]``.

    Returns:
        ``[H, d_h, d_h]``.
    """
    blocks = moment if moment.dim() == 3 else moment[None]
    count, width = blocks.shape[0], blocks.shape[-1]
    weight = F.pad(weight, (0, count * width - weight.shape[-1]))
    result = None
    for number in range(count):
        part = weight[..., number * width : (number + 1) * width]
        product = (part.flatten(0, 1) @ blocks[number]).view(part.shape)
        term = torch.bmm(product, part.mT)
        result = term if result is None else result + term
    assert result is not None
    return result


def _exact(weight: Tensor) -> Tensor:
    """A weight in the dtype of the mathematics: products of bfloat16 ones lose two digits."""
    return weight.to(compute_dtype(weight.dtype))


def merged(moment: Tensor, columns: int) -> Tensor:
    """Mean eigenvalue of a moment of ``columns`` columns kept as one or several blocks."""
    total = moment.diagonal(dim1=-2, dim2=-1).sum()
    return total / columns


class AttentionFactors:
    """Computes left factors from the moments and weights as they stand.

    Args:
        plan: who needs what.
        state: the optimizer's state.
        config: the config.
    """

    def __init__(self, plan: AFOptPlan, state: State, config: AFOptConfig) -> None:
        self.plan, self.state, self.config = plan, state, config

    def damping(self, dtype: torch.dtype) -> float:
        """λ of left factors: a jitter where they are damped through the input's moment."""
        covariant = self.config.covariant_damping
        return JITTER * torch.finfo(dtype).eps if covariant else self.config.damping

    def left(self, plan: MatrixPlan, damped: bool = True) -> Tensor:
        """The left moment of a plan, ``[heads, rows, rows]``.

        Args:
            plan: one that has a left factor.
            damped: with the covariant damping, where the config asks for it.
        """
        assert plan.block is not None
        block, damped = plan.block, damped and self.config.covariant_damping
        if plan.side == "down":
            return self._down(plan, damped)
        moment = self.role(block, plan.role, damped)
        assert moment is not None
        scale = block.row_scale(plan.role) if plan.side == "up" else None
        if scale is not None:
            rows = heads_of(scale, moment.shape[0]).to(moment.dtype)
            moment = rows.unsqueeze(-1) * moment * rows.unsqueeze(-2)
        return moment.to(plan.bound.dtype)

    def role(self, block: AttentionBlock, role: str, damped: bool) -> Tensor | None:
        """The left moment of a role, per head; ``None`` for the identity."""
        group = block.heads.group
        if role == "q":
            return self.keys(block, damped).repeat_interleave(group, 0)
        if role == "k":
            return self.queries(block, damped).unflatten(0, (-1, group)).sum(1)
        if role == "v" and block.o is not None:
            return self._outputs(block, damped).unflatten(0, (-1, group)).sum(1)
        return None

    def keys(self, block: AttentionBlock, damped: bool = False) -> Tensor:
        """A_K, ``[H_kv, d_h, d_h]``."""
        which = "centered" if self.config.center else block.reads("k")
        return self._features(block, "k", "key", which, block.heads.key_value, damped)

    def queries(self, block: AttentionBlock, damped: bool = False) -> Tensor:
        """A_Q, ``[H, d_h, d_h]``."""
        return self._features(block, "q", "query", "x", block.heads.query, damped)

    def _features(
        self, block: AttentionBlock, role: str, vectors: str, which: str, heads: int, damped: bool
    ) -> Tensor:
        known: Mapping[str, Moment] = self.plan.known.get(block, {})
        matrix = block.roles()[role]
        weight = _exact(block.effective(role))
        if not self.plan.features:
            weight = heads_of(weight[:, : matrix.shape[1]], heads)
            moment = torch.bmm(weight, weight.mT)
            return moment * (1 + self.config.damping) if damped else moment
        weight = heads_of(weight, heads)
        features = known.get(which)
        if vectors in known:
            moment = known[vectors].read(self.state)
        else:
            assert features is not None
            weight = weight.to(features.anchor.dtype)
            moment = quadratic(weight, features.read(self.state))
        if damped:
            assert features is not None
            moment = moment + self._shift(weight, features)
        return moment

    def _shift(self, weight: Tensor, features: Moment) -> Tensor:
        """``λ·tr(A_X)/n · Ŵ Ŵᵀ``: what damping A_X does to ``Ŵ A_X Ŵᵀ``."""
        shift = torch.bmm(weight, weight.mT) * self.config.damping
        moment = features.read(self.state)
        return shift * merged(moment, features.request.matrix.columns)

    def _outputs(self, block: AttentionBlock, damped: bool) -> Tensor:
        """``W_o,hᵀ W_o,h``, ``[H, d_v, d_v]``."""
        assert block.o is not None
        heads, size = block.heads.query, block.heads.value_size
        weight = _exact(block.effective("o"))[:, : block.o.shape[1]]
        parts = weight.mT.reshape(heads, size, -1)
        moment = torch.bmm(parts, parts.mT)
        return moment * (1 + self.config.damping) if damped else moment

    def _down(self, plan: MatrixPlan, damped: bool) -> Tensor:
        block = plan.block
        assert block is not None
        dtype = plan.bound.dtype
        total = None
        for role, adapter in block.adapters.items():
            if adapter.down is not plan.bound.matrix:
                continue
            up = adapter.up.read()[:, : adapter.up.shape[1]].to(dtype)
            scale = block.row_scale(role)
            if scale is not None:
                up = scale[:, None].to(dtype) * up
            moment = self.role(block, role, damped)
            if moment is None:
                term = up.mT @ up
            else:
                parts = heads_of(up, moment.shape[0])
                term = torch.bmm(parts.mT, torch.bmm(moment.to(dtype), parts)).sum(0)
            total = term if total is None else total + term
        assert total is not None
        return total[None]


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
        lefts = [t for t in self.plan.matrices if t.left and self.due(step, t.phase)]
        due: list[Due] = [*rights, *lefts]
        # Reading a sharded weight takes all ranks.
        together = [item for item in due if not _reads_shards(item)]
        for items, shared in ((together, True), ([i for i in due if _reads_shards(i)], False)):
            if items:
                self._run(items, shared)

    def _run(self, items: Sequence[Due], shared: bool) -> None:
        """Refresh some of what is due."""
        device = _bound(items[0]).weight.device
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

    def _lefts(self, plans: Sequence[Any], pieces: ShardedRefresh[Due]) -> None:
        factors = self.factors
        moments = torch.stack([factors.left(plan) for plan in plans])
        kind = plans[0].left
        assert kind is not None
        damping = factors.damping(moments.dtype)
        found = _root(kind, moments.flatten(0, 1), damping)
        held = [(t.held(self.state), t) for t in plans]
        kept = [state[t.name("left")] for state, t in held]
        self._keep(plans, kept, found, moments.shape, pieces)
        if self.plan.predicts and plans[0].in_logits:
            for state, plan in held:
                state[plan.name("left_moment")].copy_(factors.left(plan, damped=False))
        if self.config.joint and plans[0].in_logits:
            for state, plan in held:
                own = self._own_moment(plan).to(moments.dtype)
                found = _root("inverse", own, damping)
                kept = [state[plan.name("own")]]
                self._keep([plan], kept, found, own[None].shape, pieces)

    def _own_moment(self, plan: MatrixPlan) -> Tensor:
        """A_Q for q, A_K for k: what the joint correction takes out of the other factor's space."""
        block = plan.block
        assert block is not None
        damped = self.config.covariant_damping
        if plan.role == "q":
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


def _bound(item: Due) -> BoundMatrix:
    """The matrix whose state holds a factor."""
    return item.anchor if isinstance(item, RightFactor) else item.bound


def _reads_shards(item: Due) -> bool:
    """Whether computing a factor gathers a sharded weight."""
    reads = isinstance(item, MatrixPlan) or item.down is not None
    return reads and is_sharded(_bound(item).weight)


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
