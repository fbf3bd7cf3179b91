"""AFOpt: attention stepped in the space of its logits and features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.blocks import Statistic
from hf_precond.blocks.found import Request
from hf_precond.configs import AFOptConfig
from hf_precond.linalg import roots
from hf_precond.optim import scaling
from hf_precond.optim.attention_factors import AttentionFactors, heads_of, merged, quadratic
from hf_precond.optim.attention_plan import Plan, RightFactor, Treatment
from hf_precond.optim.base import Preconditioned, PrecondOptimizer, request_shape
from hf_precond.optim.directions import Sandwich
from hf_precond.optim.leaf import grouped
from hf_precond.optim.moments import mean_of, update_moment
from hf_precond.optim.placed import PlacedMatrix

CHUNK = 1 << 25
"""Elements that are stepped in one batch, to bound the memory of temporaries."""


class AFOpt(PrecondOptimizer):
    """Descent along the gradient of attention in the space of its features.

    For each head of q, k and v, ``Ĝ`` the gradient of ``[W | b]``::

        A_R  = E[x̂ x̂ᵀ]                            second moment of the input
        A_L  = A_K (q), A_Q (k), W_oᵀ W_o (v), identity (o and other linear layers)
        M    ← β M + (1-β) Ĝ ;  N = β M + (1-β) Ĝ    (Nesterov)
        U    = W_L msign(W_Lᵀ N W_R) W_Rᵀ ,  W Wᵀ = (A + λ·tr(A)/n·I)⁻¹
        U    ← m·U·0.2·√numel/‖U‖_F                 per tensor, all heads together
        [W | b] ← (1 - lr·wd) [W | b] - lr·U

    U is the steepest descent under a bound on the spectral norm of
    ``A_L^(1/2) δW A_R^(1/2)``: on whitened features, of the change of the
    logits (q, k) or of the module's output. ``direction="inverse"`` takes
    ``A_L⁻¹ N A_R⁻¹`` instead, the least-squares step along ``-∂L/∂S`` in the
    logits ``S = QKᵀ/√d``; ``"inverse_sqrt"`` the exponent -1/2.

    The thesis (Ying Sun, "Designing effective preconditioned optimizers for
    deep neural network training", PolyU 2024) gives AFOpt in its abstract
    only; this is a reconstruction.

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
    _plan: Plan | None

    def _bind(self) -> None:
        super()._bind()
        self._plan = None

    @property
    def plan(self) -> Plan:
        """Which factors each matrix has; made anew for a copy."""
        if self.__dict__.get("_plan") is None:
            self._plan = Plan(self.placed, self.blocks, self.config)
        assert self._plan is not None
        return self._plan

    @property
    def factors(self) -> AttentionFactors:
        """The left factors, from the state as it stands."""
        return AttentionFactors(self.plan, self.state, self.config)

    @property
    def finishes(self) -> bool:  # type: ignore[override]
        """Whether the base rule keeps no state of the matrices in scope."""
        return self.config.scaling not in ("norm_recovery", "graft")

    @property
    def _predicts(self) -> bool:
        return self.config.scaling in ("logit_rms", "cap")

    # Statistics ------------------------------------------------------------

    def requests(self) -> Sequence[Request]:
        return [moment.request for moment in self.plan.moments]

    def due(self, step: int) -> bool:
        return step % self.config.stat_interval == 0

    def allocate(self, placed: PlacedMatrix) -> None:
        plan, treatment = self.plan, self.plan.by_placed[placed]
        held = treatment.held(self.state)
        if treatment.name("allocated") in held:
            return
        held[treatment.name("allocated")] = True
        weight, dtype = placed.weight, self.config.factor_dtype(placed.weight.dtype)

        def identities(*shape: int) -> Tensor:
            eye = torch.eye(shape[-1], dtype=dtype, device=weight.device)
            return eye.expand(*shape).clone()

        if self.config.scaling != "norm_recovery":
            shape = (placed.matrix.shape[0], placed.matrix.columns)
            held[treatment.name("momentum")] = torch.zeros(
                *shape, dtype=placed.dtype, device=weight.device
            )
        heads, rows = treatment.heads, treatment.rows
        if treatment.left is not None:
            held[treatment.name("left")] = identities(heads, rows, rows)
        if self._predicts and treatment.in_logits:
            held[treatment.name("left_moment")] = identities(heads, rows, rows).zero_()
        if self.config.joint and treatment.in_logits:
            held[treatment.name("own")] = identities(heads, rows, rows)
        for right in plan.rights:
            if right.anchor is placed:
                held[right.key] = identities(*right.shape)
        for moment in plan.moments:
            if moment.anchor is placed:
                moment.allocate(self.state, request_shape(moment.request), self.config)

    def commit(self, statistics: Mapping[str, Statistic]) -> None:
        dropped = []
        for moment in self.plan.moments:
            statistic = statistics.get(moment.request.key)
            if statistic is None:
                continue
            held = moment.tensor(self.state)
            mean = mean_of(statistic.sum, statistic.count).to(held.device)
            dropped.append(
                update_moment(held, moment.updates(self.state), mean, self.config.stat_decay)
            )
        if dropped:
            self.count("statistics_dropped", torch.stack(dropped).sum())

    # Refresh ---------------------------------------------------------------

    def _refreshes(self, phase: int) -> bool:
        """At the first three statistics for all, then staggered over the interval."""
        step, config = self.steps, self.config
        if step <= 2 * config.stat_interval and step % config.stat_interval == 0:
            return True
        return step % config.inverse_interval == phase

    def refresh(self) -> None:
        rights = [right for right in self.plan.rights if self._refreshes(right.phase)]
        for batch in grouped(rights, _right_batch):
            self._refresh_rights(batch)
        lefts = [t for t in self.plan.treatments if t.left and self._refreshes(t.phase)]
        for alike in grouped(lefts, _left_batch):
            self._refresh_lefts(alike)

    def _refresh_rights(self, rights: Sequence[RightFactor]) -> None:
        moments, means = zip(*(self._right_moment(right) for right in rights), strict=True)
        batch = torch.stack(moments)
        blocks = batch.shape[1] if batch.dim() == 4 else 1
        size = batch.shape[-1]
        mean = torch.stack(means).repeat_interleave(blocks)
        work = batch.view(-1, size, size)
        found = _root(rights[0].kind, work, self.config.damping, mean, blocks)
        self._keep([right.tensor(self.state) for right in rights], found, batch.shape)

    def _right_moment(self, right: RightFactor) -> tuple[Tensor, Tensor]:
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

    def _refresh_lefts(self, treatments: Sequence[Treatment]) -> None:
        factors = self.factors
        moments = torch.stack([factors.left(treatment) for treatment in treatments])
        kind = treatments[0].left
        assert kind is not None
        damping = factors.damping(moments.dtype)
        found = _root(kind, moments.flatten(0, 1), damping)
        held = [(t.held(self.state), t) for t in treatments]
        self._keep([state[t.name("left")] for state, t in held], found, moments.shape)
        if self._predicts and treatments[0].in_logits:
            for state, treatment in held:
                state[treatment.name("left_moment")].copy_(factors.left(treatment, damped=False))
        if self.config.joint and treatments[0].in_logits:
            for state, treatment in held:
                own = self._own_moment(treatment).to(moments.dtype)
                found = _root("inverse", own, damping)
                self._keep([state[treatment.name("own")]], found, own[None].shape)

    def _own_moment(self, treatment: Treatment) -> Tensor:
        """A_Q for q, A_K for k: what the joint correction takes out of the other factor's space."""
        block = treatment.block
        assert block is not None
        damped = self.config.covariant_damping
        if treatment.role == "q":
            return self.factors.queries(block, damped)
        return self.factors.keys(block, damped)

    def _keep(self, held: Sequence[Tensor], found: roots.Refreshed, shape: torch.Size) -> None:
        """Copy new factors into the state where they are usable."""
        values = found.value.view(shape)
        usable = found.usable.view(*shape[:-2], 1, 1)
        for place, tensor in enumerate(held):
            tensor.copy_(torch.where(usable[place], values[place].to(tensor.dtype), tensor))
        self.count("failed_refreshes", (~found.usable).sum())
        self.count("identity_factors", found.identity.sum())

    # The step ----------------------------------------------------------------

    def precondition(self, placed: Sequence[PlacedMatrix]) -> Iterable[Preconditioned]:
        for batch in self._batches(placed):
            raw = torch.stack([_gradient(treatment.placed) for treatment in batch])
            if self.config.scaling == "norm_recovery":
                target = scaling.norms(raw)
                directions = self._directions(batch, raw)
                directions *= target / scaling.norms(directions)
            else:
                base = self._base_norms(batch, raw)
                directions = self._directions(batch, self._momentum(batch, raw))
                directions *= self._scale(batch, directions, base)
            finished = self.config.scaling != "norm_recovery"
            for treatment, matrix in zip(batch, directions, strict=True):
                yield Preconditioned(treatment.placed, matrix, finished)

    def _batches(self, placed: Sequence[PlacedMatrix]) -> Iterator[list[Treatment]]:
        treatments = [self.plan.by_placed[item] for item in placed]
        for same in grouped(treatments, self._batch_key):
            size = same[0].placed.matrix.shape[0] * same[0].placed.matrix.columns
            length = max(1, CHUNK // size)
            for start in range(0, len(same), length):
                yield same[start : start + length]

    def _batch_key(self, treatment: Treatment) -> tuple:
        placed = treatment.placed
        return (
            placed.matrix.shape,
            placed.matrix.columns,
            treatment.heads,
            treatment.form,
            treatment.left,
            treatment.right is None,
            treatment.in_logits and (self._predicts or self.config.joint),
            placed.weight_slot[0],
            placed.weight.dtype,
            placed.weight.device,
        )

    def _momentum(self, batch: Sequence[Treatment], raw: Tensor) -> Tensor:
        """``M ← β M + (1-β) G``; N (or M) in the place of G."""
        beta = self.param_groups[batch[0].placed.weight_slot[0]]["momentum"]
        held = [t.held(self.state)[t.name("momentum")] for t in batch]
        gradients = list(raw.unbind())
        torch._foreach_lerp_(held, gradients, 1 - beta)
        if self.config.nesterov:
            torch._foreach_lerp_(gradients, held, beta)
        else:
            torch._foreach_copy_(gradients, held)
        return raw

    def sandwich(self, batch: Sequence[Treatment]) -> Sandwich:
        """The factors of a batch of equal treatments."""
        first, dtype = batch[0], batch[0].placed.dtype
        left = None
        if first.left is not None:
            left = torch.cat([t.held(self.state)[t.name("left")] for t in batch]).to(dtype)
        rights = None
        if first.right is not None:
            kept = {t.right: t.right.tensor(self.state).to(dtype) for t in batch if t.right}
            rights = [kept[t.right] for t in batch if t.right]
        return Sandwich(first.heads, first.form, left, rights, self.config.precision)

    def _directions(self, batch: Sequence[Treatment], gradients: Tensor) -> Tensor:
        """The unscaled directions of ``[n, out, c]``."""
        sandwich = self.sandwich(batch)
        if self.config.direction == "spectral":
            return sandwich.spectral(gradients)
        directions = sandwich.linear(gradients)
        if self.config.joint and batch[0].in_logits:
            directions = directions - 0.5 * self._joint(batch, sandwich, gradients)
        return directions

    def _joint(self, batch: Sequence[Treatment], sandwich: Sandwich, gradients: Tensor) -> Tensor:
        """``A_L⁻¹ G Ŵᵀ A⁻¹ Ŵ`` per head, Ŵ and A the matrix's own: the part counted twice."""
        weights = torch.cat([heads_of(t.placed.matrix.read(), t.heads) for t in batch])
        own = torch.cat([t.held(self.state)[t.name("own")] for t in batch])
        weights, own = weights.to(gradients.dtype), own.to(gradients.dtype)
        parts = gradients.reshape(weights.shape)
        assert sandwich.left is not None
        small = torch.bmm(sandwich.left, torch.bmm(parts, weights.mT))
        return torch.bmm(torch.bmm(small, own), weights).view_as(gradients)

    # Scaling -------------------------------------------------------------------

    def _base_norms(self, batch: Sequence[Treatment], raw: Tensor) -> Tensor | None:
        if self.config.scaling != "graft":
            return None
        steps = [
            scaling.base_step_norm(
                self.rule, t.placed.leaves(gradient, self.param_groups, self.state, {})
            )
            for t, gradient in zip(batch, raw, strict=True)
        ]
        return torch.stack(steps)[:, None, None].to(raw.dtype)

    def _scale(self, batch: Sequence[Treatment], directions: Tensor, base: Tensor | None) -> Tensor:
        """What the directions are multiplied with, ``[n, 1, 1]``."""
        config = self.config
        if base is not None:
            return base / scaling.norms(directions)
        scale = scaling.to_rms(directions) * config.lr_scale
        if self._predicts and batch[0].in_logits:
            per_unit = self.logit_rms(batch, directions)[:, None, None]
            allowed = config.rho / per_unit.clamp(min=torch.finfo(per_unit.dtype).tiny)
            bounded = torch.minimum(scale, allowed)
            moves = per_unit > 0
            scale = torch.where(moves, allowed, scale) if config.scaling == "logit_rms" else bounded
        return scale

    def logit_rms(self, batch: Sequence[Treatment], steps: Tensor) -> Tensor:
        """Predicted rms change of the logits that each step alone makes, ``[n]``.

        Args:
            batch: treatments of queries or keys, of one shape.
            steps: ``[n, out, c]``.
        """
        return self._logit_squares(batch, steps).sum(1).sqrt()

    def _logit_squares(self, batch: Sequence[Treatment], steps: Tensor) -> Tensor:
        left = torch.cat([t.held(self.state)[t.name("left_moment")] for t in batch])
        moments = [self._right_moment(t.right)[0] for t in batch if t.right]
        squares = scaling.logit_change(
            steps, left.to(steps.dtype), moments, batch[0].heads, 1.0
        )
        scales = steps.new_tensor([_logit_scale(t) ** 2 / _query_heads(t) for t in batch])
        return squares * scales[:, None]


def _gradient(placed: PlacedMatrix) -> Tensor:
    gradient = placed.gradient()
    assert gradient is not None
    return gradient


def _root(
    kind: str, moments: Tensor, damping: float, mean: Tensor | None = None, blocks: int = 1
) -> roots.Refreshed:
    """The factors of a kind of a batch ``[n, s, s]``."""
    if kind == "root":
        return roots.inverse_sqrt(moments, damping, mean, blocks)
    return (roots.inverse if kind == "inverse" else roots.inverse_factor)(moments, damping, mean)


def _right_batch(r: RightFactor) -> tuple:
    return r.shape, r.kind, r.anchor.dtype, r.anchor.weight.device


def _left_batch(t: Treatment) -> tuple:
    return t.heads, t.rows, t.left, t.in_logits, t.placed.dtype, t.placed.weight.device


def _logit_scale(treatment: Treatment) -> float:
    """What the logits are multiplied with: the module's own word, or ``1/√d_h``."""
    assert treatment.block is not None
    own = getattr(treatment.block.module, "scaling", None)
    return own if isinstance(own, float) else treatment.block.heads.size**-0.5


def _query_heads(treatment: Treatment) -> int:
    assert treatment.block is not None
    return treatment.block.heads.query
