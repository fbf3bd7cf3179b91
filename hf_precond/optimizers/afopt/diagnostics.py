"""What AFOpt's steps do to the logits, and how its factors stand: computed when asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.architectures.computed import effective_step
from hf_precond.linalg.inverses import largest_eigenvalue
from hf_precond.linalg.matrix_functions import largest_entry
from hf_precond.optimizers.afopt.factors import Factors, heads_of, times_right
from hf_precond.optimizers.afopt.plan import MatrixPlan, RightFactor, StateMatrix
from hf_precond.statistics.moments import mean_of
from hf_precond.statistics.requests import MomentRequest, Statistic

if TYPE_CHECKING:
    from hf_precond.optimizers.afopt.optimizer import AFOpt

QUERIES = 8
"""Query positions of a sequence whose attention weights enter the entropy."""


def report(optimizer: AFOpt) -> dict[str, float]:
    """Diagnostics of the directions that the momentum gives now.

    ``logit_change/{attention}``: predicted root mean square change of its logits by one step of q
    and k together (first order); ``logit_change_max``: that of the head that moves most.
    ``cosine``: between momentum and direction, mean over the matrices. ``condition_input`` and
    ``condition_head``: largest condition numbers of the damped factors, the former estimated by
    power iterations. With ``attention_entropy``, those of :class:`EntropyMonitor`.
    """
    entropies = {} if optimizer.entropy is None else optimizer.entropy.values()
    steps = last_steps(optimizer)
    if not steps:
        return entropies
    pairs = [(momentum.flatten(), step.flatten()) for momentum, step in steps.values()]
    cosines = [torch.cosine_similarity(*pair, dim=0, eps=1e-30) for pair in pairs]
    values = {"cosine": torch.stack([cosine.double().cpu() for cosine in cosines]).mean()}
    factors, plan = optimizer.factors, optimizer.plan
    for block in plan.moments_of:
        moved = {
            item.role: (item, step)
            for item, (_, step) in steps.items()
            if item.block is block and item.role in "qk" and not item.side
        }
        if moved:
            change = layer_change(factors, block, moved)
            values[f"logit_change/{block.name}"] = change.mean().sqrt()
            values[f"logit_change_max/{block.name}"] = change.max().sqrt()
    whole = {item.block or item for item in steps}
    rights = [r for r in plan.rights if (plan.of[r.bound].block or plan.of[r.bound]) in whole]
    lefts = [item.left for item in steps if item.left is not None]
    for name, conditions in (
        ("condition_input", [_input_condition(factors, right) for right in rights]),
        ("condition_head", [_head_condition(factors, left) for left in lefts]),
    ):
        if conditions:
            values[name] = torch.stack([value.double().cpu() for value in conditions]).max()
    return {name: float(value) for name, value in values.items()} | entropies


def last_steps(optimizer: AFOpt) -> dict[MatrixPlan, tuple[Tensor, Tensor]]:
    """Momentum (its largest entry 1) and ``lr·U`` of every matrix, from the state.

    Empty before the first step of this process, and under a scaling by the fallback optimizer's
    gradient or step. An attention (a linear layer outside) that was read anew since the last step,
    as after :meth:`attach`, is left out until it has all its state.
    """
    steps: dict[MatrixPlan, tuple[Tensor, Tensor]] = {}
    if not optimizer.rates or optimizer.config.scaling in ("graft", "norm_recovery"):
        return steps
    state, others = optimizer.state, optimizer.coverage.without_preconditioner
    plans = [plan for plan in optimizer.plan.matrices if plan.bound not in others]

    def is_whole(plan: MatrixPlan) -> bool:
        held, own = state[plan.bound.weight], optimizer.plan.stored[plan.bound]
        return f"{plan.bound.prefix}fade" in held and all(item.key in held for item in own)

    missing = {plan.block or plan for plan in optimizer.plan.matrices if not is_whole(plan)}
    moved = [plan for plan in plans if (plan.block or plan) not in missing]
    for batch in optimizer.batches(moved):
        momentum = torch.stack(optimizer.tensors(batch, "momentum"))
        momentum /= largest_entry(momentum)
        directions = optimizer.directions(batch, momentum)
        directions = directions * optimizer.lengths(batch, directions)
        for plan, before, after in zip(batch, momentum, directions, strict=True):
            steps[plan] = before, after * optimizer.rates[plan.bound.group]
    return steps


def layer_change(
    factors: Factors, block: AttentionBlock, roles: Mapping[str, tuple[MatrixPlan, Tensor]]
) -> Tensor:
    """Mean squares of the change of a layer's logits, per query head, ``[H]``.

    ``s²·[tr(A_K δq A_X δqᵀ) + tr(A_Q δk A_X δkᵀ) + 2 tr(δq A_X Ŵ_qᵀ δk A_X Ŵ_kᵀ)]``;
    the last term is left out where queries and keys are rotated or normed.

    Args:
        factors: reads moments and weights.
        block: the attention.
        roles: ``q`` and ``k``, or one of them, to plan and step ``[out, c]``.
    """
    heads, group = block.heads.query, block.heads.group
    terms, cross = [], []
    for role, (plan, step) in roles.items():
        assert plan.right is not None
        if plan.bound.matrix.effective is not None:
            step = effective_step(plan.bound.matrix, step)
        moment = factors.moment(plan.right)[0].to(step.dtype)
        moved = heads_of(times_right(step[None], [moment])[0], plan.heads)
        parts = heads_of(step, plan.heads)
        if role == "k":
            moved, parts = (t.repeat_interleave(group, 0) for t in (moved, parts))
            left = factors.vector_moment(block, "q")
        else:
            left = factors.vector_moment(block, "k").repeat_interleave(group, 0)
        terms.append((torch.bmm(moved, parts.mT) * left.to(step.dtype)).sum((-2, -1)))
        weight = heads_of(block.effective(role).to(step.dtype), plan.heads)
        weight = weight.repeat_interleave(heads // plan.heads, 0)[..., : moved.shape[-1]]
        cross.append(torch.bmm(moved, weight.mT))
    if len(cross) == 2 and not {"query", "key"} & set(factors.plan.moments_of[block]):
        terms.append(2 * (cross[0] * cross[1].mT).sum((-2, -1)))
    return torch.stack(terms).sum(0).clamp(min=0) * block.logit_scale**2


def _input_condition(factors: Factors, right: RightFactor) -> Tensor:
    """``(λ_max(A) + λ)·λ_max(P)`` with P the inverse, for the largest of the blocks."""
    moment, mean = factors.moment(right)
    factor = right.read(factors.state)
    inverse = factor if right.kind == "inverse" else factor @ factor.mT
    damped = largest_eigenvalue(moment) + mean * factors.damping(right)
    return (damped * largest_eigenvalue(inverse)).max()


def _head_condition(factors: Factors, left: StateMatrix) -> Tensor:
    moment, mean = factors.moment(left)
    # A weight that is lost has no condition number; eigvalsh would raise.
    finite = torch.isfinite(moment).all(-1).all(-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], moment, 0.0).double())
    shift = mean.double() * factors.damping(left) + torch.finfo(torch.float64).tiny
    condition = (values[..., -1] + shift) / (values[..., 0].clamp(min=0) + shift)
    return torch.where(finite, condition, torch.nan).max()


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
            warnings.warn(
                f"afopt: attention_entropy leaves out {len(unread)} attentions ({unread[0]}, …) "
                "that do not call transformers' attention look-up.",
                stacklevel=2,
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
        values = {f"entropy/{name}": float(mean.mean()) for name, mean in self.means.items()}
        least = {f"entropy_min/{name}": float(mean.min()) for name, mean in self.means.items()}
        return values | least
