"""AFOpt: attention stepped in the space of its logits and features."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hf_precond.linalg.matrix_functions import largest_entry, pack, packed_size, unpack
from hf_precond.optimizers.afopt import scaling
from hf_precond.optimizers.afopt.averages import average
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.diagnostics import EntropyMonitor, report
from hf_precond.optimizers.afopt.directions import TwoSidedPreconditioner, resting
from hf_precond.optimizers.afopt.factors import AttentionFactors, Refresh, heads_of
from hf_precond.optimizers.afopt.plan import AFOptPlan, MatrixPlan, RightFactor, observes
from hf_precond.optimizers.base.fallback import FallbackOptimizer
from hf_precond.optimizers.base.muon import MuonFallback
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import (
    Bound,
    BoundMatrix,
    Kind,
    ParamView,
    Preconditioned,
    fit,
    grouped,
    split_stack,
    stacked_gradients,
)
from hf_precond.statistics.requests import Request, Statistic, request_shape

CHUNK = 1 << 25
"""Elements that are stepped in one batch, to bound the memory of temporaries."""


class AFOpt(PrecondOptimizer):
    """Descent along the gradient of attention in the space of its features.

    For each head of q, k and v, ``Ĝ`` the gradient of ``[W | b]``::

        A_R  = E[x̂ x̂ᵀ]                            second moment of the input
        A_L  = A_K (q), A_Q (k), W_oᵀ W_o (v), identity (o and other linear layers)
        M    ← β M + (1-β) Ĝ ;  N = β M + (1-β) Ĝ    (Nesterov)
        U    = W_L msign(W_Lᵀ N W_R) W_Rᵀ ,  W Wᵀ = (A + λ·tr(A)/n·I)⁻¹
        U    ← m·βᵏ·U·0.2·√numel/‖U‖_F              per tensor, all heads together
        [W | b] ← (1 - lr·wd) [W | b] - lr·U

    U is the steepest descent under a bound on the spectral norm of ``A_L^(1/2) δW A_R^(1/2)``: on
    whitened features, of the change of the logits (q, k) or of the module's output. After k steps
    in a row without a gradient (an expert that got no token) it fades, as Adam's. The other
    directions, and ``joint``: :mod:`~hf_precond.optimizers.afopt.directions`; other scalings:
    :mod:`~hf_precond.optimizers.afopt.scaling`; ``space``, ``center``, ``rope``, the damping:
    :mod:`~hf_precond.optimizers.afopt.factors`; when: :mod:`~hf_precond.optimizers.afopt.factors`.

    The thesis (Ying Sun, "Designing effective preconditioned optimizers for
    deep neural network training", PolyU 2024) gives AFOpt in its abstract
    only; this is a reconstruction.

    Kept per matrix in float32: M, and of every input that several may share
    the moment and its inverse, one triangle each: ``4·n²`` bytes, n the width
    (``6·n²`` for square matrices, whose root is a full one), and ``4·d_h²`` a
    head. ``state_dtype="bfloat16"`` halves these.

    A step larger than the attention can bear shows as a loss that jumps and
    stays: lower ``lr_scale``, or take ``scaling="cap"``. Where a factor has
    no data yet (a module that was not used, a weight that is zero) it is the
    identity, counted as ``identity_factors`` in :meth:`diagnostics`.

    Args:
        param_groups: as for any torch optimizer.
        blocks: what was found in the model.
        config: the validated config.

    Raises:
        ValueError: for fields that contradict each other or the model.
    """

    config: AFOptConfig
    watch: EntropyMonitor | None = None
    _plan: AFOptPlan | None

    def _bind(self) -> None:
        super()._bind()
        self._plan = None
        if self.config.attention_entropy:
            self.watch = EntropyMonitor(self.structure.attention)
        self._check()

    def _check(self) -> None:
        """Refuse what the model cannot have, and say what it gets instead of averaged factors."""
        config = self.config
        for block in self.structure.attention:
            if config.joint and (block.heads.group > 1 or observes(block, config)):
                raise ValueError(
                    f"joint=True: {block.name} has grouped, rotated or normed queries and keys, "
                    "for which the joint solution is not known; set joint=False (or "
                    "rope='ignored' where they are only rotated)."
                )
        attentions = self.structure.attention
        blind = [block.name for block in attentions if block.rotary and not block.observed]
        if blind and config.rope == "averaged" and config.space == "logits":
            warnings.warn(
                f"afopt: the rotated queries and keys of {len(blind)} attentions ({blind[0]}, …) "
                "cannot be read, so their factors follow from the inputs and weights alone, as "
                "with rope='ignored'.",
                stacklevel=2,
            )

    @property
    def plan(self) -> AFOptPlan:
        """Which factors each matrix has; made anew for a copy."""
        if self.__dict__.get("_plan") is None:
            self._plan = AFOptPlan(self.bound, self.structure, self.config)
        assert self._plan is not None
        return self._plan

    @property
    def factors(self) -> AttentionFactors:
        """The left factors, from the state as it stands."""
        return AttentionFactors(self.plan, self.state, self.config)

    def uses_fallback(self, bound: Bound) -> bool:
        return self.config.scaling in ("norm_recovery", "graft")

    # The matrices left, under base="muon" ------------------------------------

    def make_fallback(self) -> FallbackOptimizer:
        fallback = super().make_fallback()
        if isinstance(fallback, MuonFallback):
            fallback.is_hidden = self._is_hidden
        return fallback

    def _is_hidden(self, view: ParamView) -> bool:
        """Whether a view is a matrix of a hidden linear layer outside the scope."""
        others = {id(self.state[matrix.weight_parameter]) for matrix in self.structure.others}
        return id(view.state) in others and len(view.shape) == 2

    # Statistics ------------------------------------------------------------

    def requests(self) -> Sequence[Request]:
        watched = self.watch.requests() if self.watch is not None else []
        return [moment.request for moment in self.plan.moments] + watched

    def due(self, step: int) -> bool:
        return step % self.config.stat_interval == 0

    def allocate(self, bound: BoundMatrix) -> None:
        plan, config = self.plan, self.config
        treatment = plan.of[bound]
        held, weight = treatment.held(self.state), bound.weight
        dtype = config.factor_dtype(weight.dtype)

        def identities(name: str, *shape: int, packed: bool = False) -> None:
            if name in held:
                size = (*shape[:-2], packed_size(shape[-1])) if packed else shape
                fit(held, name, size, dtype, weight.device)
            else:
                eye = torch.eye(shape[-1], dtype=dtype, device=weight.device).expand(*shape)
                held[name] = pack(eye) if packed else eye.clone()

        def zeros(name: str, dtype: torch.dtype, *shape: int) -> None:
            if name not in held:
                held[name] = torch.zeros(shape, dtype=dtype, device=weight.device)
            fit(held, name, shape, dtype, weight.device)

        if config.scaling != "norm_recovery":
            shape = (bound.matrix.shape[0], bound.matrix.columns)
            zeros(treatment.name("momentum"), bound.dtype, *shape)
            zeros(treatment.name("fade"), bound.dtype)
        per_head = (treatment.heads, treatment.rows, treatment.rows)
        if treatment.left is not None:
            identities(treatment.name("left"), *per_head)
        if plan.predicts and treatment.in_logits:
            zeros(treatment.name("left_moment"), dtype, *per_head)
        if config.joint and treatment.in_logits:
            identities(treatment.name("own"), *per_head)
        for right in plan.rights_at.get(bound, ()):
            identities(right.key, *right.shape, packed=right.packed)
        for moment in plan.moments_at.get(bound, ()):
            *lead, size, _ = request_shape(moment.request)
            zeros(moment.key, dtype, *lead, packed_size(size))
            zeros(f"{moment.key}_updates", torch.int64)

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        if self.watch is not None:
            self.watch.keep(statistics)
        dropped = average(self.plan.moments, statistics, self.state, self.config.stat_decay)
        self.count_dropped("statistics_dropped", dropped)

    # Refresh ---------------------------------------------------------------

    def refreshing(self) -> Refresh:
        """What recomputes the factors, and reads moments and weights."""
        return Refresh(self.plan, self.state, self.config, self.count, self.failures)

    def refresh(self) -> None:
        self.refreshing().run(self.steps)

    # The step ----------------------------------------------------------------

    def precondition(self, bound: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        for batch in self._batches(bound):
            items = [treatment.bound for treatment in batch]
            raw = stacked_gradients(items)
            if self.config.scaling == "norm_recovery":
                size = largest_entry(raw)
                target = scaling.norms(raw.div_(size))
                directions = self._directions(batch, raw)
                directions *= size * (target / scaling.norms(directions))
            else:
                base = self._base_norms(batch, raw)
                # The length is set below: with entries near 1 no square vanishes or overflows.
                momentum = self._momentum(batch, raw)
                directions = self._directions(batch, momentum.div_(largest_entry(momentum)))
                directions *= self._scale(batch, directions, base)
            kind: Kind = "gradient" if self.config.scaling == "norm_recovery" else "direction"
            parts = split_stack(items, directions)
            for item, matrix, part in zip(items, directions, parts, strict=True):
                yield Preconditioned(item, matrix, kind, part)

    def _batches(self, bound: Sequence[BoundMatrix]) -> Iterator[list[MatrixPlan]]:
        treatments = [self.plan.of[item] for item in bound]
        for same in grouped(treatments, self._batch_key):
            size = same[0].bound.matrix.shape[0] * same[0].bound.matrix.columns
            length = max(1, CHUNK // size)
            for start in range(0, len(same), length):
                yield same[start : start + length]

    def _batch_key(self, treatment: MatrixPlan) -> tuple:
        bound = treatment.bound
        special = treatment.in_logits and (self.plan.predicts or self.config.joint)
        block = treatment.block if special else None
        return (
            bound.matrix.shape,
            bound.matrix.columns,
            treatment.heads,
            treatment.form,
            treatment.left,
            treatment.right is None,
            special,
            block and (block.heads, block.logit_scale),
            (bound.group, bound.bias_rests),
            (bound.weight.dtype, bound.weight.device),
        )

    def _momentum(self, batch: Sequence[MatrixPlan], raw: Tensor) -> Tensor:
        """``M ← β M + (1-β) G``; N (or M) in the place of G."""
        beta = self.param_groups[batch[0].bound.group]["momentum"]
        held, fades = self._held(batch, "momentum"), self._held(batch, "fade")
        torch._foreach_copy_(fades, scaling.fade(torch.stack(fades), raw, beta).unbind())
        gradients = list(raw.unbind())
        torch._foreach_lerp_(held, gradients, 1 - beta)
        if self.config.nesterov:
            torch._foreach_lerp_(gradients, held, beta)
        else:
            torch._foreach_copy_(gradients, held)
        return raw

    def _held(self, batch: Sequence[MatrixPlan], name: str) -> list[Tensor]:
        return [t.held(self.state)[t.name(name)] for t in batch]

    def preconditioner(self, batch: Sequence[MatrixPlan]) -> TwoSidedPreconditioner:
        """The factors of a batch of equal treatments."""
        first, dtype = batch[0], batch[0].bound.dtype
        left = torch.cat(self._held(batch, "left")).to(dtype) if first.left is not None else None
        rights = None
        if first.right is not None:
            kept = self._rights_of(dict.fromkeys(t.right for t in batch if t.right), dtype)
            if first.bound.bias_rests:
                kept = {r: resting(factor, r.kind, r.columns) for r, factor in kept.items()}
            rights = [kept[t.right] for t in batch if t.right]
        return TwoSidedPreconditioner(first.heads, first.form, left, rights, self.config.precision)

    def _rights_of(
        self, rights: Iterable[RightFactor], dtype: torch.dtype
    ) -> dict[RightFactor, Tensor]:
        """Right factors, those of one shape unpacked together."""
        kept: dict[RightFactor, Tensor] = {}
        for alike in grouped(rights, lambda right: (right.shape, right.packed)):
            held = [right.tensor(self.state) for right in alike]
            whole = list(unpack(torch.stack(held)).unbind()) if alike[0].packed else held
            kept.update(zip(alike, (factor.to(dtype) for factor in whole), strict=True))
        return kept

    def _directions(self, batch: Sequence[MatrixPlan], gradients: Tensor) -> Tensor:
        """The unscaled directions of ``[n, out, c]``."""
        preconditioner = self.preconditioner(batch)
        if self.config.direction == "spectral":
            return preconditioner.spectral(gradients)
        directions = preconditioner.linear(gradients)
        if self.config.joint and batch[0].in_logits:
            directions = directions - 0.5 * self._joint(batch, preconditioner, gradients)
        return directions

    def _joint(self, batch: Sequence[MatrixPlan], preconditioner: TwoSidedPreconditioner, gradients: Tensor) -> Tensor:
        """``A_L⁻¹ G Ŵᵀ A⁻¹ Ŵ`` per head, Ŵ and A the matrix's own: the part counted twice."""
        weights = torch.cat([heads_of(t.bound.matrix.read(), t.heads) for t in batch])
        own = torch.cat(self._held(batch, "own"))
        weights, own = weights.to(gradients.dtype), own.to(gradients.dtype)
        parts = gradients.reshape(weights.shape)
        assert preconditioner.left is not None
        small = torch.bmm(preconditioner.left, torch.bmm(parts, weights.mT))
        return torch.bmm(torch.bmm(small, own), weights).view_as(gradients)

    # Scaling -------------------------------------------------------------------

    def _base_norms(self, batch: Sequence[MatrixPlan], raw: Tensor) -> Tensor | None:
        if self.config.scaling != "graft":
            return None
        steps = [
            scaling.base_step_norm(
                self.fallback, t.bound.views(gradient, self.param_groups, self.state, {})
            )
            for t, gradient in zip(batch, raw, strict=True)
        ]
        return torch.stack(steps)[:, None, None].to(raw.dtype)

    def _scale(self, batch: Sequence[MatrixPlan], directions: Tensor, base: Tensor | None) -> Tensor:
        """What the directions are multiplied with, ``[n, 1, 1]``."""
        config = self.config
        if base is not None:
            return base / scaling.norms(directions)
        scale = scaling.to_rms(directions) * config.lr_scale
        if self.plan.predicts and batch[0].in_logits:
            per_unit = self.logit_rms(batch, directions)[:, None, None]
            allowed = config.rho / per_unit.clamp(min=torch.finfo(per_unit.dtype).tiny)
            bounded = torch.minimum(scale, allowed)
            moves = per_unit > 0
            scale = torch.where(moves, allowed, scale) if config.scaling == "logit_rms" else bounded
        return scale * torch.stack(self._held(batch, "fade"))[:, None, None]

    def logit_rms(self, batch: Sequence[MatrixPlan], steps: Tensor) -> Tensor:
        """Predicted rms change of the logits that each step alone makes, ``[n]``.

        Args:
            batch: treatments of queries or keys, of one shape.
            steps: ``[n, out, c]``.
        """
        return self._logit_squares(batch, steps).sum(1).sqrt()

    def _logit_squares(self, batch: Sequence[MatrixPlan], steps: Tensor) -> Tensor:
        left = torch.cat(self._held(batch, "left_moment"))
        refresh = self.refreshing()
        moments = [refresh.right_moment(t.right)[0] for t in batch if t.right]
        block = batch[0].block
        assert block is not None
        squares = scaling.logit_change(
            steps, left.to(steps.dtype), moments, batch[0].heads, block.logit_scale
        )
        return squares / block.heads.query

    # What a person sees ----------------------------------------------------------

    @torch.no_grad()
    def last_steps(self) -> dict[MatrixPlan, tuple[Tensor, Tensor]]:
        """Momentum (its largest entry 1) and ``lr·U`` of every matrix, from the state.

        Empty before the first step of this process, and under a scaling that needs the base
        rule's step.
        """
        found: dict[MatrixPlan, tuple[Tensor, Tensor]] = {}
        ready = [t.bound for t in self.plan.matrices if t.name("momentum") in t.held(self.state)]
        if self.config.scaling == "graft" or not self.rates:
            return found
        for batch in self._batches(ready):
            momentum = torch.stack(self._held(batch, "momentum"))
            momentum /= largest_entry(momentum)
            directions = self._directions(batch, momentum)
            directions = directions * self._scale(batch, directions, None)
            for treatment, before, after in zip(batch, momentum, directions, strict=True):
                found[treatment] = (before, after * self.rates[treatment.bound.group])
        return found

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Counters, and what :func:`~hf_precond.optimizers.afopt.diagnostics.report` says.

        With ``attention_entropy``, what
        :meth:`~hf_precond.optimizers.afopt.diagnostics.EntropyMonitor.values` says
        too. Costs about as much as a step: call it when logging.
        """
        watched = {} if self.watch is None else self.watch.values()
        return super().diagnostics() | report(self) | watched
