"""What AFOpt's steps do to the logits, and how its factors stand: computed when asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_precond.architectures.structure import AttentionBlock
from hf_precond.linalg.matrix_functions import mean_eigenvalue
from hf_precond.optimizers.afopt.directions import times_right
from hf_precond.optimizers.afopt.factors import Refresh, heads_of
from hf_precond.optimizers.afopt.plan import AFOptPlan, MatrixPlan, RightFactor
from hf_precond.statistics.moments import mean_of
from hf_precond.statistics.requests import MomentRequest, Statistic

POWER_STEPS = 12


class Steps(Protocol):
    """What the report needs of the optimizer."""

    @property
    def plan(self) -> AFOptPlan: ...

    def last_steps(self) -> dict[MatrixPlan, tuple[Tensor, Tensor]]: ...

    def refreshing(self) -> Refresh: ...


def report(optimizer: Steps) -> dict[str, float]:
    """Diagnostics of the directions that the momentum gives now.

    ``logit_change/{attention}``: predicted root mean square change of its
    logits by one step of q and k together (first order); ``logit_change_max``:
    that of the head that moves most. ``cosine``: between momentum and
    direction, mean over the matrices. ``condition_input`` and
    ``condition_head``: largest condition numbers of the damped factors, the
    former estimated by power iterations.
    """
    steps = optimizer.last_steps()
    if not steps:
        return {}
    values: dict[str, Tensor] = {}
    cosines = [
        (momentum * step).sum() / (momentum.norm() * step.norm()).clamp(min=1e-30)
        for momentum, step in steps.values()
    ]
    values["cosine"] = torch.stack([c.double().cpu() for c in cosines]).mean()
    refresh = optimizer.refreshing()
    for block, roles in _logit_steps(steps).items():
        change = layer_change(refresh, block, roles)
        values[f"logit_change/{block.name}"] = change.mean().sqrt()
        values[f"logit_change_max/{block.name}"] = change.max().sqrt()
    for name, found in (
        ("condition_input", [_right_condition(refresh, right) for right in optimizer.plan.rights]),
        ("condition_head", [_left_condition(refresh, t) for t in optimizer.plan.matrices]),
    ):
        known = [value.double().cpu() for value in found if value is not None]
        if known:
            values[name] = torch.stack(known).max()
    return {name: float(value) for name, value in values.items()}


def _logit_steps(
    steps: Mapping[MatrixPlan, tuple[Tensor, Tensor]],
) -> dict[AttentionBlock, dict[str, tuple[MatrixPlan, Tensor]]]:
    found: dict[AttentionBlock, dict[str, tuple[MatrixPlan, Tensor]]] = {}
    for plan, (_, step) in steps.items():
        if plan.in_logits and plan.block is not None and plan.right is not None:
            found.setdefault(plan.block, {})[plan.role] = (plan, step)
    return found


def layer_change(
    refresh: Refresh, block: AttentionBlock, roles: Mapping[str, tuple[MatrixPlan, Tensor]]
) -> Tensor:
    """Mean squares of the change of a layer's logits, per query head, ``[H]``.

    ``s²·[tr(A_K δq A_X δqᵀ) + tr(A_Q δk A_X δkᵀ) + 2 tr(δq A_X Ŵ_qᵀ δk A_X Ŵ_kᵀ)]``;
    the last term is left out where queries and keys are rotated or normed.

    Args:
        refresh: reads moments and weights.
        block: the attention.
        roles: ``q`` and ``k``, or one of them, to plan and step ``[out, c]``.
    """
    heads, group = block.heads.query, block.heads.group
    factors, total, cross = refresh.factors, None, []
    for role, (plan, step) in roles.items():
        assert plan.right is not None
        moment = refresh.right_moment(plan.right)[0].to(step.dtype)
        moved = heads_of(times_right(step[None], [moment])[0], plan.heads)
        parts = heads_of(step, plan.heads)
        if role == "k":
            moved, parts = (t.repeat_interleave(group, 0) for t in (moved, parts))
            left = factors.queries(block)
        else:
            left = factors.keys(block).repeat_interleave(group, 0)
        term = (torch.bmm(moved, parts.mT) * left.to(step.dtype)).sum((-2, -1))
        total = term if total is None else total + term
        weight = heads_of(block.effective(role).to(step.dtype), plan.heads)
        weight = weight.repeat_interleave(heads // plan.heads, 0)[..., : moved.shape[-1]]
        cross.append(torch.bmm(moved, weight.mT))
    assert total is not None
    if len(cross) == 2 and not {"query", "key"} & set(refresh.plan.known[block]):
        total = total + 2 * (cross[0] * cross[1].mT).sum((-2, -1))
    return total.clamp(min=0) * block.logit_scale**2


def _right_condition(refresh: Refresh, right: RightFactor) -> Tensor:
    """``(λ_max(A) + λ)·λ_max(P)`` with P the inverse, for the largest of the blocks."""
    moment, mean = refresh.right_moment(right)
    factor = right.read(refresh.state).to(moment.dtype)
    if right.kind == "factor":
        largest = _largest([factor, factor.mT])
    elif right.kind == "root":
        largest = _largest([factor]) ** 2
    else:
        largest = _largest([factor])
    damped = _largest([moment]) + mean * refresh.config.damping
    return (damped * largest).max()


def _largest(factors: Sequence[Tensor]) -> Tensor:
    """Largest eigenvalue of a product of matrices ``[…, n, n]``, by power iterations."""
    size = factors[0].shape[-1]
    vector = torch.linspace(1, 2, size, dtype=factors[0].dtype, device=factors[0].device)
    vector = vector.expand(*factors[0].shape[:-2], size)[..., None]
    norm = vector.norm(dim=-2, keepdim=True)
    for _ in range(POWER_STEPS):
        vector = vector / norm.clamp(min=torch.finfo(vector.dtype).tiny)
        for factor in reversed(factors):
            vector = factor @ vector
        norm = vector.norm(dim=-2, keepdim=True)
    return norm[..., 0, 0]


def _left_condition(refresh: Refresh, plan: MatrixPlan) -> Tensor | None:
    if plan.left is None:
        return None
    moment = refresh.factors.left(plan)
    # A weight that is lost has no condition number; eigvalsh would raise.
    finite = torch.isfinite(moment).all(-1).all(-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], moment, 0.0).double())
    shift = mean_eigenvalue(moment).double() * refresh.factors.damping(moment.dtype)
    floor = torch.finfo(torch.float64).tiny
    condition = (values[..., -1] + shift) / (values[..., 0].clamp(min=0) + shift + floor)
    return torch.where(finite, condition, torch.nan).max()


ROWS = 8
"""Query positions of a sequence that are looked at."""


class EntropyMonitor:
    """Mean entropy of the attention weights per layer, at the last step with statistics.

    Args:
        blocks: the attentions.
    """

    def __init__(self, blocks: Sequence[AttentionBlock]) -> None:
        self.means: dict[str, Tensor] = {}
        self.watched = {f"{block.name}:entropy": block for block in blocks if block.observed}
        blind = [block.name for block in blocks if not block.observed]
        if blind:
            warnings.warn(
                f"afopt: attention_entropy leaves out {len(blind)} attentions ({blind[0]}, …) that "
                "do not call transformers' attention look-up.",
                stacklevel=2,
            )

    def requests(self) -> list[MomentRequest]:
        """One request an attention."""
        return [
            MomentRequest(key, "entropy", block.q, block, rows=ROWS)
            for key, block in self.watched.items()
        ]

    def keep(self, statistics: Mapping[str, Statistic]) -> None:
        """Keep the means of this step's statistics."""
        for key, block in self.watched.items():
            found = statistics.get(key)
            if found is not None:
                self.means[block.name] = mean_of(found.sum, found.count)

    def values(self) -> dict[str, float]:
        """``entropy/{attention}``, the mean over heads, and ``entropy_min``, of the sharpest."""
        values: dict[str, float] = {}
        for name, mean in self.means.items():
            values[f"entropy/{name}"] = float(mean.mean())
            values[f"entropy_min/{name}"] = float(mean.min())
        return values
