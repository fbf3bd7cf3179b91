"""What AFOpt's steps do to the logits, and how its factors stand: computed when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.architectures.computed import effective_step
from hf_precond.compat import devices
from hf_precond.compat.warn import warn
from hf_precond.linalg.inverses import largest_eigenvalue
from hf_precond.linalg.matrix_functions import largest_entry
from hf_precond.optimizers.afopt.factors import CHUNK, Factors, heads_of, parts_of, times_right
from hf_precond.optimizers.afopt.plan import MatrixPlan, RightFactor, StateMatrix
from hf_precond.optimizers.base.parameters import grouped, in_batches
from hf_precond.statistics.moments import mean_of
from hf_precond.statistics.requests import MomentRequest, Statistic

if TYPE_CHECKING:
    from hf_precond.optimizers.afopt.optimizer import AFOpt

ROUNDS = 10
"""Power iterations of an estimated condition number."""
QUERIES = 8
"""Query positions of a sequence whose attention weights enter the entropy."""


class ObservedStep:
    """What :func:`report` needs of a step, kept while the step computes it.

    Args:
        optimizer: the optimizer whose step it is.
        number: the step's, from 1.
    """

    def __init__(self, optimizer: AFOpt, number: int) -> None:
        self.number = number
        self.rates = optimizer.rates
        self.plan = optimizer.plan
        self.plans: list[MatrixPlan] = []
        self.cosines: list[Tensor] = []
        self.logits: dict[AttentionBlock, dict[str, tuple[MatrixPlan, Tensor]]] = {}

    def add(self, batch: Sequence[MatrixPlan], momenta: Tensor, directions: Tensor) -> None:
        """Keep the cosines of a batch, and the steps ``lr·U`` of its queries and keys.

        Args:
            batch: matrices that are stepped alike.
            momenta: what the directions were computed from, ``[n, out, in(+1)]``.
            directions: U of each, scaled, ``[n, out, in(+1)]``.
        """
        self.plans.extend(batch)
        pair = momenta.flatten(1), directions.flatten(1)
        self.cosines.append(torch.cosine_similarity(*pair, dim=1, eps=1e-30))
        for plan, direction in zip(batch, directions, strict=batch[0].experts is None):
            block = plan.block
            if block not in self.plan.moments_of or plan.side or plan.role in block.downs:
                continue
            if block.serves(plan.role) in ("q", "k"):
                step = direction * self.rates[plan.bound.group]
                self.logits.setdefault(block, {})[plan.role] = plan, step


def report(optimizer: AFOpt) -> dict[str, float]:
    """Diagnostics of the last step, and of the factors as they stand.

    ``logit_change/{attention}``: predicted root mean square change of its logits by one step of q
    and k together (first order); ``logit_change_max``: that of the head that moves most.
    ``cosine``: between momentum and direction, mean over the matrices. ``condition_input`` and
    ``condition_head``: largest condition numbers of the damped factors, the former estimated by
    power iterations. Nothing before the first step of this process, and under
    ``scaling="norm_recovery"``. A step that was not observed is computed again, from the
    momentum as it stands.
    """
    observed, optimizer.observed = optimizer.observed, None
    if not optimizer.rates or optimizer.config.scaling == "norm_recovery":
        return {}
    now = optimizer.plan, optimizer.steps
    if observed is None or (observed.plan, observed.number) != now or not observed.cosines:
        observed = last_step(optimizer)
    if not observed.cosines:
        return {}
    cosines = [cosines.cpu().double() for cosines in observed.cosines]
    values = {"cosine": torch.cat(cosines).mean()}
    factors, plan = optimizer.factors, optimizer.plan
    for block in plan.moments_of:
        if block in observed.logits:
            change = layer_change(factors, block, observed.logits[block])
            values[f"logit_change/{block.name}"] = change.mean().sqrt()
            values[f"logit_change_max/{block.name}"] = change.max().sqrt()
    whole = {item.block or item for item in observed.plans}
    rights = [r for r in plan.rights if (plan.of[r.bound].block or plan.of[r.bound]) in whole]
    lefts = [item.left for item in observed.plans if item.left is not None]
    for name, conditions in (
        ("condition_input", _input_conditions(factors, rights)),
        ("condition_head", _head_conditions(factors, lefts)),
    ):
        if conditions:
            values[name] = torch.cat([value.cpu().double() for value in conditions]).max()
    return {name: float(value) for name, value in values.items()}


def last_step(optimizer: AFOpt) -> ObservedStep:
    """The last step computed again from the momentum in the state.

    An attention (a linear layer outside) that was read anew since that step, as after
    ``attach``, is left out until it has all its state.

    Args:
        optimizer: the optimizer.
    """
    observed, state = ObservedStep(optimizer, optimizer.steps), optimizer.state
    others = optimizer.coverage.without_preconditioner
    plans = [plan for plan in optimizer.plan.matrices if plan.bound not in others]

    def is_whole(plan: MatrixPlan) -> bool:
        held, own = state[plan.bound.weight], optimizer.plan.stored[plan.bound]
        return plan.bound.prefix + optimizer.trend in held and all(item.key in held for item in own)

    missing = {plan.block or plan for plan in optimizer.plan.matrices if not is_whole(plan)}
    moved = [plan for plan in plans if (plan.block or plan) not in missing]
    for batch in optimizer.batches(moved):
        momenta = torch.stack(optimizer.tensors(batch, "momentum"))
        momenta /= largest_entry(momenta)
        directions = optimizer.directions(batch, momenta)
        observed.add(batch, momenta, directions * optimizer.lengths(batch, directions))
    return observed


def layer_change(
    factors: Factors, block: AttentionBlock, roles: Mapping[str, tuple[MatrixPlan, Tensor]]
) -> Tensor:
    """Mean squares of the change of a layer's logits, per query head, ``[H]``.

    ``s²·[tr(A_K δq A_X δqᵀ) + tr(A_Q δk A_X δkᵀ) + 2 tr(δq A_X Ŵ_qᵀ δk A_X Ŵ_kᵀ)]``;
    the last term is left out where queries and keys are rotated, normed or made of several tensors.

    Args:
        factors: reads moments and weights.
        block: the attention.
        roles: those of queries and keys, to plan and step ``[out, c]``.
    """
    heads = block.heads.query
    terms, cross = [], []
    for role, (plan, step) in roles.items():
        if plan.bound.matrix.effective is not None:
            step = effective_step(plan.bound.matrix, step)
        moment = factors.moment(plan.right)[0].to(step.dtype)
        moved = heads_of(times_right(step[None], [moment])[0], plan.heads)
        parts = heads_of(step, plan.heads)
        moved, parts = (t.repeat_interleave(heads // plan.heads, 0) for t in (moved, parts))
        other = "k" if block.serves(role) == "q" else "q"
        left = factors.vector_moment(block.meeting(other)[0], other)
        left = left.repeat_interleave(heads // len(left), 0)
        if block.spans or block.parts:
            from hf_precond.optimizers.afopt import latent

            left = latent.in_span(block, role, left)
        terms.append((torch.bmm(moved, parts.mT) * left.to(step.dtype)).sum((-2, -1)))
        weight = heads_of(block.effective(role).to(step.dtype), plan.heads)
        weight = weight.repeat_interleave(heads // plan.heads, 0)[..., : moved.shape[-1]]
        cross.append(torch.bmm(moved, weight.mT))
    several = block.parts or block.spans or {"query", "key"} & set(factors.plan.moments_of[block])
    if len(cross) == 2 and not several:
        terms.append(2 * (cross[0] * cross[1].mT).sum((-2, -1)))
    return torch.stack(terms).sum(0).clamp(min=0) * block.logit_scale**2


def _input_conditions(factors: Factors, rights: Sequence[RightFactor]) -> list[Tensor]:
    """``(λ_max(A) + λ)·λ_max(P)`` with P the inverse, of every block."""

    def kind(right: RightFactor) -> tuple[Any, ...]:
        return right.shape, right.kind, right.bound.dtype, right.bound.weight.device

    conditions = []
    for alike in grouped((part for right in rights for part in parts_of(right)), kind):
        for batch in in_batches(alike, math.prod(alike[0].shape), CHUNK):
            moments, means = zip(*(factors.moment(right) for right in batch), strict=True)
            moment = torch.stack(moments)
            inverse = torch.stack([r.read(factors.state) for r in batch]).view_as(moment)
            if batch[0].kind != "inverse":
                inverse = inverse @ inverse.mT
            damping = torch.stack(means) * factors.config.damping
            largest = largest_eigenvalue(torch.stack([moment, inverse]), rounds=ROUNDS)
            conditions.append(((largest[0] + damping) * largest[1]).flatten())
    return conditions


def _head_conditions(factors: Factors, lefts: Sequence[StateMatrix]) -> list[Tensor]:
    """The same of the factors of heads, from their eigenvalues."""

    def kind(left: StateMatrix) -> tuple[Any, ...]:
        return left.shape[-1], left.bound.dtype, left.bound.weight.device

    conditions = []
    for alike in grouped(lefts, kind):
        moments, means = zip(*(factors.moment(left) for left in alike), strict=True)
        moment = torch.cat(moments)
        # A weight that is lost has no condition number; eigvalsh would raise.
        finite = torch.isfinite(moment).all(-1).all(-1)
        dtype = devices.widest(moment.device)
        usable = torch.where(finite[..., None, None], moment, 0.0).to(dtype)
        values = devices.kernel(torch.linalg.eigvalsh, usable)
        damping = torch.cat(means).to(dtype) * factors.config.damping
        shift = damping + torch.finfo(dtype).tiny
        condition = (values[..., -1] + shift) / (values[..., 0].clamp(min=0) + shift)
        conditions.append(torch.where(finite, condition, torch.nan))
    return conditions


class EntropyMonitor:
    """Mean entropy of the attention weights per layer, at the last step with statistics.

    Args:
        attentions: those with a matrix in scope.
    """

    def __init__(self, attentions: Sequence[AttentionBlock]) -> None:
        self.means: dict[str, Tensor] = {}
        self.blocks = {f"{block.name}:entropy": block for block in attentions if block.observed}
        unread = [block.name for block in attentions if not block.observed]
        if unread:
            warn(
                f"afopt: attention_entropy leaves out {len(unread)} attentions ({unread[0]}, …) "
                "that do not call transformers' attention look-up."
            )

    def requests(self) -> list[MomentRequest]:
        """One request an attention."""
        return [
            MomentRequest(key, "entropy", block.q, block, rows=QUERIES)
            for key, block in self.blocks.items()
        ]

    def update(self, statistics: Mapping[str, Statistic]) -> None:
        """Keeps the means of this step's statistics."""
        for key, block in self.blocks.items():
            if key in statistics:
                self.means[block.name] = mean_of(statistics[key].sum, statistics[key].count)

    def values(self) -> dict[str, float]:
        """``entropy/{attention}``, the mean over heads, and ``entropy_min``, of the sharpest."""
        if not self.means:
            return {}
        pairs = [torch.stack([mean.mean(), mean.min()]) for mean in self.means.values()]
        device, dtype = pairs[0].device, devices.widest(pairs[0].device)
        means, least = torch.stack([pair.to(device, dtype) for pair in pairs]).mT.tolist()
        values = {f"entropy/{name}": value for name, value in zip(self.means, means, strict=True)}
        names = [f"entropy_min/{name}" for name in self.means]
        return values | dict(zip(names, least, strict=True))
