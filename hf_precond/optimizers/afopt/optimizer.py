"""AFOpt: attention stepped in the space of its logits and features."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.attention import find_attention
from hf_precond.compat import devices
from hf_precond.distributed import collectives
from hf_precond.linalg.matrix_functions import (
    frobenius_norm,
    gram_newton_schulz,
    largest_entry,
    newton_schulz,
    unpack,
)
from hf_precond.linalg.products import Precision, arithmetic
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.factors import CHUNK, Factors, times_right
from hf_precond.optimizers.afopt.plan import (
    AFOptPlan,
    Form,
    MatrixPlan,
    Moment,
    RightFactor,
)
from hf_precond.optimizers.afopt.scope import announce, attention_matrices, warn_of_unread
from hf_precond.optimizers.base.agreement import agreement
from hf_precond.optimizers.base.checkpoint import KEY
from hf_precond.optimizers.base.layout import kept, state_of
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import (
    Bound,
    BoundMatrix,
    Kind,
    Preconditioned,
    allocate,
    grouped,
    in_batches,
    split_stack,
    stacked_gradients,
)
from hf_precond.registry import register_optimizer
from hf_precond.statistics.requests import Request, Statistic

if TYPE_CHECKING:
    from hf_precond.optimizers.afopt.diagnostics import EntropyMonitor, ObservedStep
    from hf_precond.optimizers.base.experts import Assembly

RMS = 0.2
"""Root mean square of a step's entries per unit of learning rate: what AdamW's usually is."""
logger = logging.getLogger(__name__)

EARLIER_ADAPTERS = (
    "afopt: this state is of an earlier release, which left %d matrices of adapters outside the "
    "attention to %s; they are preconditioned now, and their state begins anew. "
    "scope=attention in a new training leaves them."
)
NORM_DECAY = 0.99
"""Decay of the running mean of a gradient's norm under ``scaling="adaptive"``."""
NORMS = 20
"""Gradients after which the running mean of their norms is no longer zero: LoRA's A has none at
first."""
LONGEST = 2.0
"""Length under ``scaling="adaptive"`` over that of gradients that are noise, at most."""


@register_optimizer(
    "afopt",
    config=AFOptConfig,
    select=attention_matrices,
    description="orthogonalised steps between inverse roots of the features' moments",
    memory="mn momentum; n(n+1)/2 an input's moment, as much or n² its root; d² a head",
    start="1e-3",
)
class AFOpt(PrecondOptimizer):
    """Descent along the gradient of attention in the space of its features.

    For each head of q, k and v, ``Ĝ`` the gradient of ``[W | b]``::

        A_R  = E[x̂ x̂ᵀ]                            second moment of the input
        A_L  = A_K (q), A_Q (k), W_oᵀ W_o (v), identity (o and other linear layers)
        M    ← β M + (1-β) Ĝ ;  N = β M + (1-β) Ĝ    (Nesterov)
        U    = W_L msign(W_Lᵀ N W_R) W_Rᵀ ,  W Wᵀ = (A + λ·tr(A)/n·I)⁻¹
        g    ← .99 g + .01 ‖G‖_F ;  s = min(2, ‖M‖_F/(g r₀)) ,   r₀² = (1-β)/(1+β)
        U    ← m·s·U·0.2·√numel/‖U‖_F               per tensor, all heads together
        [W | b] ← (1 - lr·wd) [W | b] - lr·U

    U is the steepest descent under a bound on the spectral norm of ``A_L^(1/2) δW A_R^(1/2)``: on
    whitened features, of the change of the logits (q, k) or of the module's output. Its length s
    (of G and M without the bias) is 1 where gradients are noise of a constant size; it grows where
    they agree, and falls as they vanish: where the training set is learned, or an expert gets no
    token. The other directions and scalings: :mod:`~hf_precond.optimizers.afopt.variants`; what A_L
    and A_R are made of, ``rope``, the damping, when factors are recomputed:
    :mod:`~hf_precond.optimizers.afopt.factors`.

    The thesis (Ying Sun, "Designing effective preconditioned optimizers for deep neural network
    training", PolyU 2024) gives AFOpt in its abstract only; this is a reconstruction.

    Kept per matrix in float32: M, and of every input that several may share the moment and its
    inverse, one triangle each: ``4·n²`` bytes, n the width (``6·n²`` for square matrices, whose
    root is a full one), and ``4·d_h²`` a head. ``state_dtype="bfloat16"`` halves these.

    A step larger than the attention can bear shows as a loss that jumps and stays: lower
    ``lr_scale``, or take ``scaling="cap"``. Where a factor has no data yet (a module that was not
    used, a weight that is zero) it is the identity, counted as ``identity_factors`` in
    :meth:`diagnostics`.

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
        ValueError: for a field that is not legal, or that the model has no use for.
    """

    config: AFOptConfig
    entropy: EntropyMonitor | None = None
    observed: ObservedStep | None = None
    _plan: AFOptPlan | None = None
    _announced = False
    _late: Mapping[Moment, Sequence[int]] = MappingProxyType({})

    def _bind(self) -> None:
        super()._bind()
        self._plan = None
        self._seen: Counter[str] = Counter()  # statistics by key, since the state was loaded
        self._norms_seen: Counter[BoundMatrix] = Counter()  # likewise, of gradients
        if not self._announced and self.structure.model is not None:
            announce(self.structure, self.config.base)
            self._announced = True
        warn_of_unread(self.structure.attention, self.config)
        self._begin_adapters()
        if self.config.attention_entropy:
            from hf_precond.optimizers.afopt.diagnostics import EntropyMonitor

            self.entropy = EntropyMonitor(self.structure.attention)

    def attach(self, model: nn.Module) -> None:
        """Read ``model`` again; what several matrices share keeps its state.

        Args:
            model: the model, whose parameters this optimizer holds.

        Raises:
            RuntimeError: the optimizer was not built by ``create_optimizer``.
        """
        from hf_precond.optimizers.afopt.rebinding import carry_over

        before = self.plan
        super().attach(model)
        carry_over(before, self.plan, self.state)

    def _begin_adapters(self) -> None:
        """Forget how an earlier release stepped LoRA's A and B outside attention."""
        if self.state:
            from hf_precond.optimizers.afopt.rebinding import begin_adapters

            count = begin_adapters(self.plan, self.state)
            if count and collectives.rank() == 0:
                logger.warning(EARLIER_ADAPTERS, count, self.config.base)

    @property
    def plan(self) -> AFOptPlan:
        """Which factors each matrix has; made anew for a copy of the optimizer."""
        if self._plan is None:
            self._plan = AFOptPlan(self.bound, self.structure, self.config)
        return self._plan

    @property
    def factors(self) -> Factors:
        """The object that computes moments and factors from the current state."""
        return Factors(self.plan, self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`PrecondOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._seen.clear()
        self._norms_seen.clear()
        self._begin_adapters()

    def __getstate__(self) -> dict[str, Any]:
        """As of the base; a copy says nothing anew."""
        seen: dict[str, Any] = {"_seen": Counter(), "_norms_seen": Counter()}
        return super().__getstate__() | {"_announced": self._announced} | seen

    def decided_by(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """As of the base; of a state without an identity by the matrices that have a momentum."""
        decided = super().decided_by(state_dict)
        model = self.structure.model
        if KEY in state_dict or not decided or model is None:
            return decided
        from hf_precond.optimizers.afopt.rebinding import with_momentum

        held = with_momentum(state_dict, self.param_groups)
        attention = {
            id(matrix.weight_parameter)
            for block in find_attention(model)
            for role, layer in block.roles().items()
            for matrix in (layer, *(m for p in block.pairs(role) for m in (p.down, p.up)))
        }
        if held:
            decided["scope"] = "attention" if held <= attention else "all_linear"
        return decided

    def requests(self) -> Sequence[Request]:
        """One request for each moment, and those of the entropies."""
        entropies = [] if self.entropy is None else self.entropy.requests()
        return [moment.request for moment in self.plan.moments] + entropies

    def needs(self) -> Mapping[BoundMatrix, Sequence[str]]:
        """The moments that the factors of each matrix are made of."""
        return {
            plan.bound: [moment.request.key for moment in plan.moments]
            for plan in self.plan.matrices
        }

    def due(self, step: int) -> bool:
        """Every ``stat_interval`` steps."""
        return step % self.config.stat_interval == 0

    def uses_fallback(self, bound: Bound) -> bool:
        """Whether ``scaling`` needs the fallback optimizer's step."""
        return self.config.scaling == "norm_recovery"

    def allocate(self, bound: BoundMatrix) -> None:
        """Makes momentum, moments (zeros) and factors (identities)."""
        state, device = self.state[bound.weight], bound.weight.device
        if self.config.scaling != "norm_recovery":
            stack = bound.matrix.stack
            shape = (*stack, bound.matrix.shape[0], bound.matrix.columns)
            allocate(state, f"{bound.prefix}momentum", shape, bound.dtype, device)
            allocate(state, bound.prefix + self.trend, stack, bound.dtype, device)
        dtype = self.config.factor_dtype(bound.weight.dtype)
        for stored in self.plan.stored[bound]:
            stored.allocate(state, dtype)

    # The step, from statistics and gradients to directions ---------------------------------

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        """``A ← b A + (1 - b) E[·]``."""
        if self.entropy is not None:
            self.entropy.update(statistics)
        factors = self.factors
        self.count_dropped("statistics_dropped", factors.average(statistics))
        self._late = factors.late(self.steps, statistics, self._seen)

    def refresh(self) -> None:
        """``W Wᵀ = (A + λ·tr(A)/n·I)⁻¹`` of the factors that are due."""
        late, self._late = self._late, {}
        self.factors.refresh(self.steps, self.failures, self.count, late)

    def precondition(self, ready: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """From Ĝ to the scaled direction U, matrices of one shape together."""
        kind: Kind = "gradient" if self.config.scaling == "norm_recovery" else "direction"
        observed = self._observed_step() if self.observing else None
        assembly: Assembly | None = None
        for batch in kept("batches", ready, partial(self._batches_of, ready)):
            if self._in_half(batch[0]) and observed is None:
                from hf_precond.optimizers.afopt.batched import step_in_half

                found = step_in_half(self, batch)
                if found is not None:
                    yield from found
                    continue
            bound = [plan.bound for plan in batch]
            gradients, trends = self.gradients(batch), None
            if kind == "direction":
                trends = self._momentum(batch, gradients)
            if not self._in_half(batch[0]):
                # The length is set below: with entries near 1 no square vanishes or overflows.
                gradients.div_(largest_entry(gradients))
            directions = self.directions(batch, gradients)
            lengths = self.lengths(batch, directions, trends)
            if observed is not None:
                observed.add(batch, gradients, directions * lengths)
            if batch[0].experts is not None:
                from hf_precond.optimizers.base.experts import Assembly

                directions *= lengths
                assembly = assembly or Assembly()
                sizes = [_experts(plan) for plan in batch]
                for plan, part in zip(batch, directions.split(sizes), strict=True):
                    whole = assembly.add(plan.bound, plan.experts or (0, 0), part)
                    if whole is not None:
                        yield Preconditioned(plan.bound, whole, kind)
                continue
            parts = split_stack(bound, directions, lengths)
            if None in parts:  # else the parts alone are stepped
                directions *= lengths
            for item, direction, part in zip(bound, directions, parts, strict=True):
                yield Preconditioned(item, direction, kind, part)

    def _batches_of(self, ready: Sequence[BoundMatrix]) -> list[Sequence[MatrixPlan]]:
        return list(self.batches([self.plan.of[bound] for bound in ready]))

    def _in_half(self, plan: MatrixPlan) -> bool:
        """Whether the sign is computed in half precision, which scales what it is given."""
        kind = arithmetic(self.config.precision, plan.bound.weight, "sign")
        spectral = self.config.direction == "spectral" and plan.experts is None
        return kind == "half" and spectral

    def batches(self, plans: Sequence[MatrixPlan]) -> Iterator[Sequence[MatrixPlan]]:
        """Yields matrices that are stepped alike, with one parameter group, dtype and device.

        Args:
            plans: of the matrices to be stepped.

        Yields:
            Plans whose gradients are stacked; at most :data:`CHUNK` entries, or one matrix.
        """

        def key(plan: MatrixPlan) -> tuple:
            bound, matrix = plan.bound, plan.bound.matrix
            block = plan.block if plan.left_moment else None
            logits = block and (block.heads, block.logit_scale, len(block.borrowers))
            right = plan.right.shape, plan.right.kind
            sizes = matrix.shape, matrix.columns, matrix.stack
            alike = *sizes, plan.heads, plan.left is None, right, logits
            return *alike, bound.group, bound.bias_rests, bound.weight.dtype, bound.weight.device

        for alike in grouped(plans, key):
            matrix = alike[0].bound.matrix
            size = matrix.shape[0] * matrix.columns
            if not matrix.stack:
                yield from in_batches(alike, size, CHUNK)
                continue
            from hf_precond.optimizers.base.experts import runs

            parts = [p.part(*run) for p in alike for run in runs(p.bound, size, CHUNK)]
            for equal in grouped(parts, _experts):
                yield from in_batches(equal, size * _experts(equal[0]), CHUNK)

    def gradients(self, batch: Sequence[MatrixPlan]) -> Tensor:
        """``[dW | db]`` of a batch, ``[n, out, in(+1)]``; experts count one by one. A copy.

        Args:
            batch: matrices that are stepped alike, with gradients.
        """
        if batch[0].experts is None:
            return stacked_gradients([plan.bound for plan in batch])
        from hf_precond.optimizers.base import experts

        parts = [experts.gradients(p.bound, p.experts) for p in batch if p.experts is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensors(self, batch: Sequence[MatrixPlan], name: str) -> list[Tensor]:
        """The tensors of one name in the state of each matrix.

        Args:
            batch: the matrices.
            name: the state's, without the prefix of fused weights.

        Returns:
            One a matrix; views of it, one an expert, where it is a stack.
        """
        held = state_of([plan.bound for plan in batch], self.state, name)
        if batch[0].experts is None:
            return held
        runs = [slice(*plan.experts) for plan in batch if plan.experts is not None]
        return [own for t, run in zip(held, runs, strict=True) for own in t[run].unbind()]

    def _momentum(self, batch: Sequence[MatrixPlan], gradients: Tensor) -> Tensor:
        """``M ← β M + (1-β) G``, N (or M) in the place of G; returns :meth:`trends`, advanced."""
        beta = self.param_groups[batch[0].bound.group]["momentum"]
        momenta, held = self.tensors(batch, "momentum"), self.tensors(batch, self.trend)
        before, ahead = torch.stack(held), gradients.unbind()
        adaptive = self.config.scaling == "adaptive"
        if adaptive:
            self.average_norms(batch, before, self._norms(batch, ahead))
            after = before
        else:
            largest = torch.linalg.vector_norm(gradients, float("inf"), dim=(1, 2))
            after = before.mul_(beta).masked_fill_(largest != 0, 1.0)
        torch._foreach_copy_(held, after.unbind())
        torch._foreach_lerp_(momenta, ahead, 1 - beta)
        torch._foreach_lerp_(ahead, momenta, beta if self.config.nesterov else 1.0)
        trends = agreement(self._norms(batch, momenta), after, beta, LONGEST) if adaptive else after
        return trends[:, None, None]

    def average_norms(self, batch: Sequence[MatrixPlan], usual: Tensor, norms: Tensor) -> None:
        """``g ← .99 g + .01 ‖G‖`` in place, from the first norm on that is not zero.

        That norm is looked for until a matrix had :data:`NORMS` of them; after that, in one kernel,
        only in stacks of experts. A norm that is not finite counts as 0: its step is lost, and with
        such an average every later one would be.

        Args:
            batch: matrices that are stepped alike.
            usual: g of each, 0 before the first.
            norms: of their gradients.
        """
        norms = norms.nan_to_num(0.0, 0.0)
        if self.have_norms(batch):
            usual.lerp_(norms, 1 - NORM_DECAY)
        else:
            usual.copy_(torch.where(usual > 0, usual.lerp(norms, 1 - NORM_DECAY), norms))

    def have_norms(self, batch: Sequence[MatrixPlan]) -> bool:
        """Whether every average of norms has begun; counts this step.

        Args:
            batch: matrices that are stepped alike.
        """
        counts, bound = self._norms_seen, [plan.bound for plan in batch]
        if batch[0].experts is None and min(map(counts.__getitem__, bound)) >= NORMS:
            return True
        counts.update(bound)
        return False

    @staticmethod
    def _norms(batch: Sequence[MatrixPlan], tensors: Sequence[Tensor]) -> Tensor:
        """Frobenius norms of what belongs to the weights, not the biases, ``[n]``."""
        columns, first = batch[0].bound.matrix.shape[1], tensors[0]
        wide = None if devices.is_accelerator(first) else torch.float64  # no square vanishes
        norms = torch._foreach_norm([t[..., :columns] for t in tensors], dtype=wide)
        return torch.stack(norms).to(first.dtype)

    def directions(self, batch: Sequence[MatrixPlan], gradients: Tensor) -> Tensor:
        """The directions of gradients; their lengths are set afterwards.

        Args:
            batch: matrices that are stepped alike.
            gradients: of each, or the momentum, ``[n, out, in(+1)]``.

        Returns:
            ``[n, out, in(+1)]``.
        """
        preconditioner = self.preconditioner(batch)
        if self.config.direction == "spectral":
            return preconditioner.spectral(gradients)
        return preconditioner.linear(gradients)

    def preconditioner(self, batch: Sequence[MatrixPlan]) -> TwoSidedPreconditioner:
        """The factors of a batch.

        Args:
            batch: matrices that are stepped alike.
        """
        first, dtype = batch[0], batch[0].bound.dtype
        if devices.is_accelerator(first.bound.weight) and first.experts is None:
            from hf_precond.optimizers.afopt.batched import batched

            return batched(self, batch)
        rights = [plan.right for plan in batch]
        if first.experts is not None:
            stacks = self._rights_of_experts(batch)
            return TwoSidedPreconditioner(1, first.form, None, stacks, self.config.precision)
        unpacked: dict[RightFactor, Tensor] = {}
        for alike in grouped(dict.fromkeys(rights), lambda right: right.shape):
            stored = [right.stored(self.state) for right in alike]
            whole = unpack(torch.stack(stored)).unbind() if alike[0].packed else stored
            unpacked |= zip(alike, (factor.to(dtype) for factor in whole), strict=True)
        if first.bound.bias_rests:
            from hf_precond.optimizers.afopt.variants import without_bias

            unpacked = {right: without_bias(right, f) for right, f in unpacked.items()}
        left = None
        if first.left is not None:
            left = torch.cat(self.tensors(batch, "left")).to(dtype)
        factors = [unpacked[right] for right in rights]
        return TwoSidedPreconditioner(first.heads, first.form, left, factors, self.config.precision)

    def _rights_of_experts(self, batch: Sequence[MatrixPlan]) -> Tensor:
        """The right factors of experts, one tensor for all."""
        right = batch[0].right
        stored = [p.right.part(*p.experts).stored(self.state) for p in batch if p.experts]
        factors = torch.cat(stored)
        factors = (unpack(factors) if right.packed else factors).to(batch[0].bound.dtype)
        if batch[0].bound.bias_rests:
            from hf_precond.optimizers.afopt.variants import without_bias

            factors = torch.stack([without_bias(right, factor) for factor in factors])
        return factors

    def lengths(
        self, batch: Sequence[MatrixPlan], directions: Tensor, trends: Tensor | None = None
    ) -> Tensor:
        """``m·s·0.2·√numel/‖U‖_F``, or another ``scaling``.

        Args:
            batch: matrices that are stepped alike.
            directions: U of each, ``[n, out, in(+1)]``.
            trends: :meth:`trends` of the batch, where they are at hand.

        Returns:
            What each direction is multiplied by, ``[n, 1, 1]``.
        """
        if self.config.scaling not in ("adaptive", "rms"):
            from hf_precond.optimizers.afopt.variants import SCALINGS

            return SCALINGS[self.config.scaling](self, batch, directions)
        trends = self.trends(batch) if trends is None else trends
        if devices.is_accelerator(directions):  # in two kernels
            size = RMS * math.sqrt(directions[0].numel()) * self.config.lr_scale
            return trends * size / frobenius_norm(directions)
        return self.rms_lengths(directions) * trends

    def rms_lengths(self, directions: Tensor) -> Tensor:
        """``m·0.2·√numel/‖U‖_F``, ``[n, 1, 1]``.

        Args:
            directions: U of each matrix, ``[n, out, in(+1)]``.
        """
        rms = RMS * math.sqrt(directions[0].numel()) / frobenius_norm(directions)
        return rms * self.config.lr_scale

    @property
    def trend(self) -> str:
        """The state that :meth:`trends` are made of: the gradient's usual norm, or its absence."""
        return "gradient_norm" if self.config.scaling == "adaptive" else "fade"

    def trends(self, batch: Sequence[MatrixPlan]) -> Tensor:
        """How long steps are for what the gradients did, ``[n, 1, 1]``.

        ``min(2, ‖M‖_F/(g r₀))`` under ``scaling="adaptive"``, otherwise ``βᵏ`` after k steps in a
        row without a gradient.

        Args:
            batch: matrices that are stepped alike.

        Returns:
            What the usual length is multiplied by.
        """
        held = torch.stack(self.tensors(batch, self.trend))
        if self.config.scaling == "adaptive":
            beta = self.param_groups[batch[0].bound.group]["momentum"]
            norms = self._norms(batch, self.tensors(batch, "momentum"))
            held = agreement(norms, held, beta, LONGEST)
        return held[:, None, None]

    # ------------------------------------------------------------------------------------

    def counted(self) -> dict[str, float]:
        """The counters, and the entropies under ``attention_entropy``."""
        return super().counted() | ({} if self.entropy is None else self.entropy.values())

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """See :func:`~hf_precond.optimizers.afopt.diagnostics.report`."""
        from hf_precond.optimizers.afopt.diagnostics import report

        return report(self)

    def _observed_step(self) -> ObservedStep:
        from hf_precond.optimizers.afopt.diagnostics import ObservedStep

        self.observing = False
        self.observed = ObservedStep(self, self.steps + 1)
        return self.observed


def _experts(plan: MatrixPlan) -> int:
    """How many experts of a stack are meant."""
    first, last = plan.experts or (0, 0)
    return last - first


@dataclass
class TwoSidedPreconditioner:
    """The factors around a batch of gradients ``[n, out, c]``.

    Args:
        heads: row groups of each matrix.
        form: how the matrix sign is computed.
        left: ``[n · heads, rows, rows]``, or ``None`` for the identity.
        rights: one a matrix, ``[c, c]`` or blocks ``[b, w, w]``, the same tensor object for
            siblings. One tensor for all of experts.
        precision: of products on GPUs.
    """

    heads: int
    form: Form
    left: Tensor | None
    rights: Sequence[Tensor] | Tensor
    precision: Precision = "highest"

    def linear(self, gradient: Tensor) -> Tensor:
        """``P_L G P_R``: the direction ``inverse``."""
        return self._times_left(self._split(self._times_right(gradient))).view_as(gradient)

    def spectral(self, gradient: Tensor) -> Tensor:
        """``W_L msign(W_Lᵀ G W_R) W_Rᵀ``, ``W Wᵀ = A⁻¹``, which depends on A only, not on W.

        With ``msign(Z) = P Z``, P a polynomial of ``Z Zᵀ``, the form ``rows`` needs ``A⁻¹`` alone
        on the right side; with ``msign(Z) = Z P``, P of ``Zᵀ Z``, ``columns`` on the left one.
        """
        if self.form == "rows":
            return self._by_rows(gradient)
        return self._by_columns(gradient) if self.form == "columns" else self._directly(gradient)

    def _by_rows(self, gradient: Tensor) -> Tensor:
        scaled = self._split(self._times_right(gradient))
        gram = torch.bmm(scaled, self._split(gradient).mT)
        gram = self._times_left(self._times_left(gram, True).mT, True)
        sign = gram_newton_schulz(gram)
        sign = self._times_left(self._times_left(sign).mT)
        return torch.bmm(sign, scaled).view_as(gradient)

    def _by_columns(self, gradient: Tensor) -> Tensor:
        parts = self._split(gradient)
        scaled = self._times_left(parts)
        gram = self._between_rights(torch.bmm(parts.mT, scaled), True)
        sign = self._between_rights(gram_newton_schulz(gram))
        return torch.bmm(scaled, sign).view_as(gradient)

    def _directly(self, gradient: Tensor) -> Tensor:
        z = self._times_left(self._split(self._times_right(gradient)), True)
        low = devices.is_accelerator(z) and z.dtype == torch.float32
        sign = newton_schulz(z.bfloat16()).to(z.dtype) if low else newton_schulz(z)
        return self._times_right(self._times_left(sign).reshape(gradient.shape), True)

    def _split(self, matrices: Tensor) -> Tensor:
        """``[n, out, c] -> [n · heads, rows, c]``."""
        return matrices.reshape(-1, matrices.shape[1] // self.heads, matrices.shape[2])

    def _times_left(self, matrices: Tensor, transposed: bool = False) -> Tensor:
        """``W_L X`` (transposed: ``W_Lᵀ X``) of ``[n · heads, rows, …]``."""
        if self.left is None:
            return matrices
        return torch.bmm(self.left.mT if transposed else self.left, matrices)

    def _times_right(self, matrices: Tensor, transposed: bool = False) -> Tensor:
        """``X W_R`` (transposed: ``X W_Rᵀ``) of ``[n, …, c]``."""
        return times_right(matrices, self.rights, transposed, self.precision)

    def _between_rights(self, symmetric: Tensor, transposed: bool = False) -> Tensor:
        """``W_R S W_Rᵀ`` (transposed: ``W_Rᵀ S W_R``) of symmetric ``[n · heads, c, c]``."""
        stack = (-1, self.heads * symmetric.shape[-1], symmetric.shape[-1])
        once = self._times_right(symmetric.view(stack), not transposed).view_as(symmetric)
        return self._times_right(once.mT.reshape(stack), not transposed).view_as(symmetric)
