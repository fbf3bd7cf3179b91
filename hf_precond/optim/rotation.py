"""Adam's step in the eigenbases of a gradient's Kronecker second moments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_precond.configs import AdamRConfig, OptimizerConfig, compute_dtype
from hf_precond.linalg import eigenbasis, fallback
from hf_precond.linalg.precision import matmul
from hf_precond.optim.leaf import Leaf
from hf_precond.optim.rotation_batch import Batch, batches
from hf_precond.optim.rotation_plan import RotationPlan, plan_rotation
from hf_precond.optim.rules import AdamWRule, Rule

CLEAN_EVERY = 8
"""Refreshes of a basis between two corrections of its orthogonality."""


class RotatedAdamRule(Rule):
    """Rotate the gradient, take Adam's step there, rotate back.

    With ``L`` and ``R`` the averages of ``G Gᵀ`` and ``Gᵀ G`` and their
    eigenvectors ``Q_L`` and ``Q_R``::

        Ĝ = Q_Lᵀ G Q_R;   M ← β₁ M + (1-β₁) Ĝ;   V ← β₂ V + (1-β₂) Ĝ∘Ĝ
        Û = M̂ / (max(√V̂, floor · rms √V̂) + ε)
        p ← (1 - lr·wd) p - lr · Q_L Û Q_Rᵀ

    When a basis turns, ``Q' = Q P``, the momentum follows exactly (``Pᵀ M``)
    and the second moment by the overlap of the coordinates (``(P∘P)ᵀ V``: V
    stays positive and keeps its sum), or stays with its columns. The factors
    are kept in the coordinates of their basis, ``Qᵀ L Q``.

    The first call only collects statistics: in the basis of its own gradient
    an entry off the diagonal is pure rounding, and Adam would scale it to 1.
    Parameters of one dimension, and those with no side to rotate, are stepped
    by AdamW.

    Source: Ying Sun, "Designing effective preconditioned optimizers for deep
    neural network training", PolyU 2024 (the rotation transformation); the
    step is our reconstruction, related to SOAP (Vyas et al., 2024).
    """

    def __init__(self, config: AdamRConfig) -> None:
        self.config = config
        self.adamw = AdamWRule()
        self.counters: dict[str, int] = {}
        self.loads = [0] * config.basis_interval

    @classmethod
    def under(cls, config: OptimizerConfig) -> RotatedAdamRule:
        """The rule as another optimizer's base: its defaults, with what ``config`` shares.

        Fields of the same name as another optimizer's factors (``stat_decay``,
        ``max_dim``, …) mean that optimizer's own and are not taken over.
        """
        shared = {"state_dtype": config.state_dtype}
        if hasattr(config, "precision"):
            shared["precision"] = config.precision
        return cls(AdamRConfig.create(**shared))

    # State ------------------------------------------------------------------

    def plan(self, leaf: Leaf) -> RotationPlan:
        """How a leaf is seen."""
        return plan_rotation(leaf.param.shape, self.config, getattr(leaf, "matrix", None))

    def allocate(self, leaf: Leaf) -> None:
        """Moments, factors, bases and counters of a leaf.

        ``step`` counts Adam's steps, ``updates`` those of the factors, and
        ``left_phase`` / ``right_phase`` say on which step of an interval a
        basis is refreshed.
        """
        if "exp_avg" in leaf:
            return
        plan = self.plan(leaf)
        if not plan.rotated:
            self.adamw.allocate(leaf)
            return
        dtype = compute_dtype(leaf.param.dtype)
        device = leaf.param.device
        shape = (plan.tiles, plan.rows, plan.columns)
        for name in ("exp_avg", "exp_avg_sq"):
            leaf[name] = torch.zeros(shape, dtype=dtype, device=device)
        kept = self.config.factor_dtype(leaf.param.dtype)
        for side, cost in plan.refresh_cost.items():
            size = plan.rows if side == "left" else plan.columns
            square = (plan.tiles, size, size)
            leaf[f"{side}_factor"] = torch.zeros(square, dtype=kept, device=device)
            leaf[f"{side}_basis"] = torch.zeros(square, dtype=dtype, device=device)
            leaf[f"{side}_phase"] = self._lightest_phase(cost)
        leaf["step"] = 0
        leaf["updates"] = 0

    def _lightest_phase(self, cost: int) -> int:
        phase = min(range(len(self.loads)), key=self.loads.__getitem__)
        self.loads[phase] += cost
        return phase

    # The step -----------------------------------------------------------------

    def update(self, leaves: Sequence[Leaf]) -> None:
        plain: list[Leaf] = []
        rotated: list[tuple[Leaf, RotationPlan]] = []
        for leaf in leaves:
            self.allocate(leaf)
            plan = self.plan(leaf)
            if plan.rotated:
                rotated.append((leaf, plan))
            else:
                plain.append(leaf)
        if plain:
            self.adamw.update(plain)
        for batch in batches(rotated):
            self._step(batch)

    def _step(self, batch: Batch) -> None:
        gradient = batch.gradient()
        steps, updates = batch.leaves[0]["step"], batch.leaves[0]["updates"]
        if steps > 0:
            gradient = self._rotate(batch, gradient)
        if self._collects(batch):
            self._accumulate(batch, gradient, updates + 1)
            batch.set("updates", updates + 1)
        if updates == 0:
            return
        for side in batch.sides:
            due = [i for i, leaf in enumerate(batch.leaves) if self._refreshes(leaf, side)]
            if due:
                gradient = self._refresh(batch, side, due, gradient)
        batch.set("step", steps + 1)
        direction = self._adam(batch, gradient, steps + 1)
        batch.descend(self._rotate_back(batch, direction))

    def _collects(self, batch: Batch) -> bool:
        """Statistics at the first two calls, then every ``stat_interval``."""
        steps, updates = batch.leaves[0]["step"], batch.leaves[0]["updates"]
        return updates < 2 or steps % self.config.stat_interval == 0

    def _refreshes(self, leaf: Leaf, side: str) -> bool:
        """Steps 0, 1, 2, 4, 8, … below the interval; then once an interval, by phase."""
        step, interval = leaf["step"], self.config.basis_interval
        if step < interval:
            return step & (step - 1) == 0
        return step % interval == leaf[f"{side}_phase"]

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if len(a) == 1:
            return matmul(a[0], b[0], self.config.precision)[None]
        return matmul(a, b, self.config.precision)

    def _rotate(self, batch: Batch, matrix: Tensor) -> Tensor:
        if batch.plan.left:
            matrix = self._product(batch["left_basis"].mT, matrix)
        if batch.plan.right:
            matrix = self._product(matrix, batch["right_basis"])
        return matrix

    def _rotate_back(self, batch: Batch, matrix: Tensor) -> Tensor:
        if batch.plan.left:
            matrix = self._product(batch["left_basis"], matrix)
        if batch.plan.right:
            matrix = self._product(matrix, batch["right_basis"].mT)
        return matrix

    def _accumulate(self, batch: Batch, rotated: Tensor, updates: int) -> None:
        """``B ← b B + (1-b) Ĝ Ĝᵀ``, ``b = min(stat_decay, 1 - 1/k)``."""
        decay = min(self.config.stat_decay, 1 - 1 / updates)
        for side in batch.sides:
            factor = batch[f"{side}_factor"]
            root = rotated if side == "left" else rotated.mT
            if factor.dtype == root.dtype:
                factor.baddbmm_(root, root.mT, beta=decay, alpha=1 - decay)
            else:
                wide = factor.to(root.dtype)
                factor.copy_(wide.baddbmm_(root, root.mT, beta=decay, alpha=1 - decay))

    def _refresh(self, batch: Batch, side: str, due: Sequence[int], gradient: Tensor) -> Tensor:
        """Turn the bases of some leaves; their moments and the gradient follow."""
        part = batch.part(due)
        step, interval = part.leaves[0]["step"], self.config.basis_interval
        factor = part.read(f"{side}_factor").to(gradient.dtype)
        if step == 0:
            record = fallback.Record()
            rotation, factor = eigenbasis.eigenbasis(factor, record)
            record.counted("basis", self._count)
            part.write(f"{side}_basis", rotation)
        else:
            rotation, factor = eigenbasis.refresh(factor, sweeps=2 if step < interval else 1)
            basis = part.read(f"{side}_basis") @ rotation
            clean = step // interval % CLEAN_EVERY == 0
            part.write(f"{side}_basis", eigenbasis.orthonormal(basis) if clean else basis)
            part.write("exp_avg", turn(side, rotation, part.read("exp_avg")))
            if self.config.transport == "overlap" or step < interval:
                share = eigenbasis.overlap(rotation)
                part.write("exp_avg_sq", turn(side, share, part.read("exp_avg_sq")))
        part.write(f"{side}_factor", factor)
        self._count("basis_refreshes", len(due))
        return batch.replaced(gradient, due, lambda tiles: turn(side, rotation, tiles))

    def _adam(self, batch: Batch, gradient: Tensor, step: int) -> Tensor:
        """``Û`` in rotated coordinates."""
        (beta1, beta2), eps = batch.group["betas"], batch.group["eps"]
        first, second = batch["exp_avg"], batch["exp_avg_sq"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = math.sqrt(1 - beta2**step)
        denominator = second.sqrt()
        if self.config.floor > 0:
            rms = second.mean((1, 2), keepdim=True).sqrt_().mul_(self.config.floor)
            denominator = denominator.clamp_min_(rms)
        denominator.add_(eps * correction)
        return torch.div(first, denominator, out=denominator).mul_(
            correction / (1 - beta1**step)
        )

    def _count(self, name: str, by: int) -> None:
        self.counters[name] = self.counters.get(name, 0) + by

    def diagnostics(self) -> dict[str, float]:
        """Refreshes of bases so far, and how often a rung of the fall-back ladder was needed."""
        return {name: float(value) for name, value in self.counters.items()}


def turn(side: str, rotation: Tensor, matrix: Tensor) -> Tensor:
    """``Pᵀ M`` on the left, ``M P`` on the right."""
    return rotation.mT @ matrix if side == "left" else matrix @ rotation
