"""The factors of AFOpt: what they are made of, when they are recomputed, products with them.

Left factors of a head h, in torch's layout (``Ŵ = [W | b]``, ``x̂ = (x, 1)``):

- q: ``A_K,h = E[k kᵀ] = Ŵ_k,h A_X Ŵ_k,hᵀ`` (its key-value head's, under grouped queries)
- k: ``A_Q,h = Ŵ_q,h A_X Ŵ_q,hᵀ``, summed over the query heads that share the key
- v: ``W_o,hᵀ W_o,h``, summed likewise
- k and v that other attentions use too: these sums over all of them
- parts of queries and keys, latents: :mod:`~hf_precond.optimizers.afopt.latent`
- adapters: :mod:`~hf_precond.optimizers.afopt.variants`

Nothing is collected for A_K and A_Q unless queries and keys are rotated or normed on their way to
the logits: then they are the moments of the vectors that the logits are made of, which under RoPE
are averaged, ``(1/n) Σ_i R_iᵀ C R_i`` over the positions (``rope="averaged"``).

- damping: ``A + λ·tr(A)/n·I``, at least 1e-12
- an input wider than ``max_dim``: ``⌈in / max_dim⌉`` diagonal blocks of equal width of A_X, with
  the mean eigenvalue of all, here too
- averages: ``A ← b A + (1 - b) E[·]``, ``b = min(stat_decay, 1 - 1/k)`` at the k-th statistic

All factors are recomputed at the steps 0, ``stat_interval`` and ``2 stat_interval``, and those
whose moments come later (of a layer that was not used, or was frozen) with the first three
statistics of these; from then on each attention (each linear layer outside) at a step of its own,
``t ≡ i·stat_interval`` modulo ``inverse_interval``, the layers numbered in model order, i their
number modulo ``inverse_interval // stat_interval``.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.compat import devices
from hf_precond.distributed.collectives import is_sharded
from hf_precond.linalg.matrix_functions import (
    inverse,
    inverse_factor,
    mean_eigenvalue,
    pack,
    unpack,
)
from hf_precond.linalg.products import Precision, compute_dtype, matmul
from hf_precond.optimizers.afopt.plan import (
    VECTORS,
    AFOptPlan,
    MatrixPlan,
    Moment,
    RightFactor,
    State,
    StateMatrix,
)
from hf_precond.optimizers.base.parameters import BoundMatrix, grouped, in_batches
from hf_precond.optimizers.base.refresh import FailureRecord, ShardedRefresh
from hf_precond.statistics.moments import mean_of, update_moments
from hf_precond.statistics.requests import Statistic

CHUNK = 1 << 25
"""Elements that are stepped, or averaged on a GPU, in one batch, to bound the temporaries."""
FactorT = TypeVar("FactorT", bound=StateMatrix)

COUNTERS = ("failed_refreshes", "identity_factors")
STARTS = 3
"""Statistics of a moment at each of which its factors are recomputed."""
EVERY_EXPERT = "every expert of "
"""Before the key of a moment: whether each expert of the stack has had more statistics."""


class Factors:
    """Computes moments and factors from the state and the weights as they stand.

    Args:
        plan: which factors there are.
        state: the optimizer's state: moments are read, factors written.
    """

    def __init__(self, plan: AFOptPlan, state: State) -> None:
        self.plan, self.state, self.config = plan, state, plan.config
        self.known: dict[Moment, Tensor] = {}  # moments read together

    # Averages -----------------------------------------------------------------------

    def average(self, statistics: Mapping[str, Statistic]) -> dict[str, Tensor]:
        """Puts means into the running moments, on a GPU those of one shape in a few kernels.

        Args:
            statistics: sums and counts by the keys of the requests; without one a moment stays.

        Returns:
            By layer and moment 1 where a mean was not finite and dropped, else 0: 0-d tensors.
        """
        seen = [
            average
            for moment in self.plan.moments
            if moment.request.key in statistics
            for average in _averages(moment, statistics[moment.request.key], self.state)
        ]
        dropped: dict[str, list[Tensor]] = {}

        def kind(average: _Average) -> tuple[Any, ...]:
            return average.total.shape, average.bound.dtype, average.bound.weight.device

        for alike in grouped(seen, kind):
            limit = CHUNK if devices.is_accelerator(alike[0].bound.weight) else 0
            for batch in in_batches(alike, alike[0].total.numel(), limit):
                counts = torch.stack([average.count for average in batch])
                sums = torch.stack([average.total for average in batch])
                means = pack(mean_of(sums, counts.view(-1, *[1] * (sums.dim() - 1))))
                stored = [average.stored for average in batch]
                updates = [average.updates for average in batch]
                flags = update_moments(stored, updates, means, self.config.stat_decay)
                # Without a single token, on any rank, there was nothing to drop.
                flags = flags * (counts > 0).to(flags)
                for average, flag in zip(batch, flags.unbind(), strict=True):
                    dropped.setdefault(average.title, []).append(flag)
        return {
            title: flags[0] if len(flags) == 1 else torch.stack(flags).amax()
            for title, flags in dropped.items()
        }

    # Refresh ---------------------------------------------------------------------

    def refresh(
        self,
        step: int,
        failures: FailureRecord,
        count: Callable[[str, int | Tensor], None],
        late: Mapping[Moment, Sequence[int]],
    ) -> None:
        """Recomputes the factors that are due, every rank its share, those of one shape together.

        Args:
            step: number of the step.
            failures: the optimizer's record.
            count: the optimizer's counter.
            late: moments whose first statistics come now, not at the first steps, and which of the
                experts of a stack they are of.
        """
        turn = step % self.config.inverse_interval
        if not late and turn not in {0, *self.plan.phases.values()} and not self._starts(step):
            return
        due: list[StateMatrix] = []
        for factor in (*self.plan.rights, *self.plan.lefts):
            if self._is_due(factor, step):
                due += parts_of(factor)
            elif self._is_late(factor, late):
                due += parts_of(factor, late)
        for items in grouped(due, _gathers):
            costs, device = [self._cost(factor) for factor in items], items[0].bound.weight.device
            # Gathering a sharded weight takes all ranks.
            refresh = ShardedRefresh(items, costs, device, COUNTERS, shared=not _gathers(items[0]))
            for alike in grouped(refresh.mine(), _batch_key):
                limit = CHUNK if alike[0].bound.matrix.stack else sys.maxsize
                for batch in in_batches(alike, math.prod(alike[0].shape), limit):
                    refresh.attempt(partial(self._compute, refresh=refresh), batch)
            refresh.share(lambda factor: [factor.stored(self.state)])
            refresh.report(failures, _title, count, zeros=True)

    def _starts(self, step: int) -> bool:
        """Whether this is one of the first steps with statistics, which refresh every factor."""
        interval = self.config.stat_interval
        return step <= 2 * interval and step % interval == 0

    def _is_due(self, factor: StateMatrix, step: int) -> bool:
        if self._starts(step):
            return True
        # An accelerator is busier with the launches of a refresh than with its matrices.
        together = devices.is_accelerator(factor.bound.weight)
        phase = 0 if together else self.plan.phases[factor.bound]
        return step % self.config.inverse_interval == phase

    def late(
        self, step: int, statistics: Mapping[str, Statistic], seen: Counter[str]
    ) -> dict[Moment, Sequence[int]]:
        """The moments that have had :data:`STARTS` statistics or fewer, after the first steps.

        Reads from the device at a moment's first statistics and once after a checkpoint is loaded;
        while an expert of a stack has had so few, at every step with statistics.

        Args:
            step: number of the step.
            statistics: by the keys of the requests that were answered at this step.
            seen: how often each was answered since the checkpoint; added to.

        Returns:
            These moments, and the experts of a stack of which this is so.
        """
        seen.update(statistics.keys())
        if step <= (STARTS - 1) * self.config.stat_interval:
            return {}
        moments = [
            moment
            for moment in self.plan.moments
            if (seen[moment.request.key] in range(1, STARTS + 1))
            or (moment.bound.matrix.stack and not seen[EVERY_EXPERT + moment.request.key])
        ]
        if not moments:
            return {}
        device = moments[0].bound.weight.device
        parts = []
        for moment in moments:
            updates, new = moment.updates(self.state), statistics.get(moment.request.key)
            came = torch.zeros_like(updates) if new is None else (new.count > 0).to(updates)
            parts += [updates.flatten().to(device), came.flatten().to(device)]
        numbers = [part.tolist() for part in torch.cat(parts).cpu().split([len(p) for p in parts])]
        late: dict[Moment, Sequence[int]] = {}
        for moment, updates, came in zip(moments, numbers[::2], numbers[1::2], strict=True):
            key, stack = moment.request.key, moment.bound.matrix.stack
            seen[key] = max(seen[key], *updates)
            seen[EVERY_EXPERT + key] = int(bool(stack) and min(updates) > STARTS)
            pairs = enumerate(zip(updates, came, strict=True))
            own = [e for e, (number, new) in pairs if new and 0 < number <= STARTS]
            if own:
                late[moment] = own
        return late

    def _is_late(self, factor: StateMatrix, late: Mapping[Moment, Sequence[int]]) -> bool:
        if not late:
            return False
        if isinstance(factor, RightFactor):
            return factor.moment in late
        return any(moment in late for moment in self.plan.of[factor.bound].moments)

    def _cost(self, factor: StateMatrix) -> float:
        """Multiplications of a refresh."""
        *copies, size, _ = factor.shape
        if isinstance(factor, RightFactor):
            return math.prod(copies) * size**3
        return math.prod(copies) * size * factor.bound.matrix.columns**2

    def _compute(
        self, factors: Sequence[StateMatrix], refresh: ShardedRefresh[StateMatrix]
    ) -> None:
        """Recomputes factors of one shape and kind; one whose moment has no inverse stays."""
        first, count = factors[0], len(factors)
        stored = [factor.stored(self.state) for factor in factors]
        self._read_together(factors)
        moments, means = zip(*(self.moment(factor) for factor in factors), strict=True)
        self.known.clear()
        if first.kind == "moment":
            torch._foreach_copy_(stored, moments)
            return
        invert = inverse if first.kind == "inverse" else inverse_factor
        result = invert(torch.cat(moments), self.config.damping, torch.cat(means))
        values = result.value.view(count, *first.shape)
        usable = result.usable.view(count, *first.shape[:-2], 1, 1)
        if first.packed:
            values, usable = pack(values), usable[..., 0]
        kept = torch.where(usable, values.to(stored[0].dtype), torch.stack(stored))
        torch._foreach_copy_(stored, kept.unbind())
        refresh.fail(factors, ~result.usable.view(count, -1).all(1))
        refresh.count("failed_refreshes", (~result.usable).sum())
        refresh.count("identity_factors", result.identity.sum())

    # Moments -----------------------------------------------------------------------

    def _read_together(self, factors: Sequence[StateMatrix]) -> None:
        """Unpacks, on an accelerator, the moments under some factors in a few kernels a shape."""
        if not devices.is_accelerator(factors[0].bound.weight):
            return
        moments: list[Moment] = []
        for factor in factors:
            if isinstance(factor, RightFactor):
                moments.append(factor.moment)
            else:
                moments += self.plan.of[factor.bound].moments
        for alike in grouped(dict.fromkeys(moments), lambda m: (m.shape, m.bound.dtype)):
            stored = torch.stack([moment.stored(self.state) for moment in alike])
            whole = unpack(stored).to(alike[0].bound.dtype)
            self.known |= zip(alike, whole.unbind(), strict=True)

    def _read(self, moment: Moment) -> Tensor:
        return self.known[moment] if moment in self.known else moment.read(self.state)

    def moment(self, factor: StateMatrix) -> tuple[Tensor, Tensor]:
        """The moment under a factor, and mean eigenvalues.

        Args:
            factor: left or right.

        Returns:
            ``[k, n, n]``, k heads or diagonal blocks, and ``[k]``: a head's own, and that of all
            blocks together (of an expert, in a stack).
        """
        if isinstance(factor, RightFactor) and factor.bound.matrix.stack:
            moment = factor.moment.read(self.state).flatten(0, -3)
            traces = moment.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, factor.blocks).sum(1)
            return moment, (traces / factor.columns).repeat_interleave(factor.blocks)
        if isinstance(factor, RightFactor):
            moment = self._input_moment(factor)
            trace = moment.diagonal(dim1=-2, dim2=-1).sum()  # of all blocks
            return moment, (trace / factor.columns).expand(len(moment))
        plan = self.plan.of[factor.bound]
        moment = self._left_moment(plan).to(plan.bound.dtype)
        return moment, mean_eigenvalue(moment)

    def _input_moment(self, right: RightFactor) -> Tensor:
        """A_X, or the leading block of it that a narrower matrix reads, ``[blocks, n, n]``."""
        moment, columns = self._read(right.moment), right.columns
        if right.down is not None:
            from hf_precond.optimizers.afopt.variants import up_input_moment

            return up_input_moment(right.down, moment, columns)
        if moment.dim() == 2:
            return moment[None, :columns, :columns]
        block, last = divmod(columns, moment.shape[-1])
        moment[block : block + 1, last:] = 0
        moment[block : block + 1, :, last:] = 0
        return moment

    def _left_moment(self, plan: MatrixPlan) -> Tensor:
        """The moments of a matrix's rows, ``[heads, rows, rows]``."""
        if plan.side:
            from hf_precond.optimizers.afopt.variants import adapter_left_moment

            return adapter_left_moment(self, plan)
        assert plan.block is not None
        moment = self.output_moment(plan.block, plan.role)
        assert moment is not None
        return moment

    def output_moment(self, block: AttentionBlock, role: str) -> Tensor | None:
        """What the output of a role's matrix is weighed by, ``[heads, d_h, d_h]``.

        Args:
            block: the attention.
            role: q, k, v or o.

        Returns:
            ``None`` for the identity.
        """
        if role in block.downs or role in block.parts or role in block.spans:
            from hf_precond.optimizers.afopt import latent

            return latent.output_moment(self, block, role)
        group = block.heads.group
        if role == "q":
            return self.met(block, "k").repeat_interleave(group, 0)
        if role == "k":
            moment = self.met(block, "q")
        elif role == "v":
            outputs = [self._outputs(each) for each in block.meeting("q") if each.o is not None]
            if not outputs:
                return None
            moment = sum(outputs[1:], outputs[0])
        else:
            return None
        return moment.unflatten(0, (-1, group)).sum(1)

    def _outputs(self, block: AttentionBlock) -> Tensor:
        """``W_o,hᵀ W_o,h``, ``[H, d_v, d_v]``."""
        heads, size = block.heads.query, block.heads.value_size
        weight = self.weight(block, "o")[:, : heads * size // block.output_groups]
        parts = weight.unflatten(0, (block.output_groups, -1)).mT.reshape(heads, size, -1)
        if block.paired_values:
            parts = parts.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        return torch.bmm(parts, parts.mT)

    def met(self, block: AttentionBlock, role: str) -> Tensor:
        """A_K that an attention's queries meet (role k), or A_Q that its keys meet (role q).

        The latter is summed over the attentions that use its keys.
        """
        moments = [self.vector_moment(each, role) for each in block.meeting(role)]
        return sum(moments[1:], moments[0])

    def vector_moment(self, block: AttentionBlock, role: str) -> Tensor:
        """A_Q (role q), ``[H, d_h, d_h]``, or A_K (role k), ``[H_kv, d_h, d_h]``."""
        observed = self.plan.moments_of.get(block, {}).get(VECTORS[role])
        if observed is not None:
            return self._read(observed)
        if block.parts or block.spans:
            from hf_precond.optimizers.afopt import latent

            return latent.vector_moment(self, block, role)
        return self.image_moment(block, role)

    def image_moment(self, block: AttentionBlock, role: str) -> Tensor:
        """The moment of what a role's matrix makes of its input, ``[heads, rows, rows]``.

        Args:
            block: the attention.
            role: of the matrix.
        """
        weight = heads_of(self.weight(block, role), block.heads_of(role))
        inputs = self._read(self.plan.moments_of[block][block.reads(role)])
        return quadratic(weight.to(inputs.dtype), inputs)

    def weight(self, block: AttentionBlock, role: str) -> Tensor:
        """``[W | b]`` in the dtype of the mathematics: products of bfloat16 ones lose two digits.

        Args:
            block: the attention.
            role: of the matrix.
        """
        weight = block.effective(role)
        return weight.to(compute_dtype(weight.dtype))


def quadratic(weight: Tensor, moment: Tensor) -> Tensor:
    """``W A Wᵀ`` per head.

    Args:
        weight: ``[H, d_h, c]``; narrower than the moment: its leading block.
        moment: ``[n, n]``, or diagonal blocks ``[blocks, w, w]``.

    Returns:
        ``[H, d_h, d_h]``.
    """
    blocks = moment if moment.dim() == 3 else moment[None]
    width = blocks.shape[-1]
    weight = F.pad(weight, (0, len(blocks) * width - weight.shape[-1]))
    terms = [
        torch.bmm((part.flatten(0, 1) @ block).view(part.shape), part.mT)
        for part, block in zip(weight.split(width, -1), blocks, strict=True)
    ]
    return sum(terms[1:], terms[0])


def heads_of(matrix: Tensor, heads: int) -> Tensor:
    """``[out, …] -> [heads, out / heads, …]``."""
    return matrix.unflatten(0, (heads, -1))


def times_right(
    matrices: Tensor,
    rights: Sequence[Tensor] | Tensor,
    transposed: bool = False,
    precision: Precision = "highest",
) -> Tensor:
    """Every matrix times its own right factor (transposed).

    Args:
        matrices: ``[n, rows, c]``.
        rights: n factors, ``[c, c]`` or diagonal blocks ``[b, w, w]`` with ``b · w >= c``.
            Neighbours with the same tensor (q, k and v) share one product. Those of experts are
            one tensor, ``[n, c, c]`` or ``[n, b, w, w]``.
        transposed: multiply with the factors' transposes.
        precision: of products on GPUs.

    Returns:
        ``[n, rows, c]``.
    """
    matrices, start = matrices.contiguous(), 0
    if isinstance(rights, Tensor):
        rights = rights if rights.dim() == 4 else rights.unsqueeze(1)
        products = [
            matmul(part, (block.mT if transposed else block)[:, : part.shape[-1], : part.shape[-1]],
                   precision)
            for part, block in zip(
                matrices.split(rights.shape[-1], -1), rights.unbind(1), strict=True
            )
        ]  # fmt: skip
        return products[0] if len(products) == 1 else torch.cat(products, -1)
    result = torch.empty_like(matrices)
    for _, siblings in itertools.groupby(rights, id):
        right, *others = siblings
        stop = start + 1 + len(others)
        rows, out = (t[start:stop].flatten(0, 1) for t in (matrices, result))
        blocks, width = right if right.dim() == 3 else right[None], right.shape[-1]
        parts = zip(rows.split(width, 1), out.split(width, 1), blocks, strict=False)
        for part, target, block in parts:
            size = part.shape[1]
            factor = (block.mT if transposed else block)[:size, :size]
            product = matmul(part, factor, precision, target)
            if product is not target:
                target.copy_(product)
        start = stop
    return result


def _gathers(factor: StateMatrix) -> bool:
    """Whether computing a factor gathers a sharded weight."""
    reads_weights = not isinstance(factor, RightFactor) or factor.down is not None
    return reads_weights and is_sharded(factor.bound.weight)


def _batch_key(factor: StateMatrix) -> tuple:
    bound = factor.bound
    return type(factor), factor.shape, factor.kind, bound.dtype, bound.weight.device


def _title(factor: StateMatrix) -> str:
    """A moment's or factor's name in messages."""
    if isinstance(factor, Moment):
        return f"{factor.request.matrix.name} ({factor.name.replace('_', ' ')})"
    side = "input" if isinstance(factor, RightFactor) else "left"
    first, last = factor.experts or (0, 0)
    experts = f" of experts {first} to {last - 1}" if last else ""
    return f"{factor.bound.matrix.name} ({side} factor {factor.key}{experts})"


@dataclass(frozen=True)
class _Average:
    """A running moment, or that of one expert, and what is averaged into it."""

    bound: BoundMatrix
    title: str
    stored: Tensor
    updates: Tensor
    total: Tensor
    count: Tensor


def _averages(moment: Moment, statistic: Statistic, state: State) -> list[_Average]:
    """A moment's; of a stack those of each expert."""
    held = moment.stored(state), moment.updates(state), statistic.sum, statistic.count
    rows = zip(*(t.unbind() for t in held), strict=True) if moment.bound.matrix.stack else [held]
    return [_Average(moment.bound, _title(moment), *row) for row in rows]


def parts_of(
    factor: FactorT, late: Mapping[Moment, Sequence[int]] | None = None
) -> Sequence[FactorT]:
    """A factor; of a stack of experts runs of them, or those that are late one by one.

    Args:
        factor: left or right.
        late: experts by moment.
    """
    if not factor.bound.matrix.stack:
        return [factor]
    from hf_precond.optimizers.base.experts import runs

    assert isinstance(factor, RightFactor)
    if late is not None:
        return [factor.part(expert, expert + 1) for expert in late[factor.moment]]
    return [factor.part(*run) for run in runs(factor.bound, math.prod(factor.shape[1:]), CHUNK)]
