"""Adam's step in the eigenbases of a gradient's Kronecker second moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.configs import AdamRConfig, OptimizerConfig, compute_dtype
from hf_precond.linalg.precision import matmul
from hf_precond.linalg.workspace import Workspace
from hf_precond.optim.leaf import Leaf
from hf_precond.optim.rotation_batch import CPU_ELEMENTS, Batch, batches
from hf_precond.optim.rotation_plan import RotationPlan, plan_rotation
from hf_precond.optim.rotation_refresh import BasisRefresh, accumulate, observe, turn
from hf_precond.optim.rules import AdamWRule, Rule


@dataclass(eq=False)
class Part:
    """Some rows or columns of a batch: views of its gradient, its moments and its parameter.

    Args:
        gradient: G, not to be written to.
        first: M.
        second: V.
        target: the parameter, where a product can be added to it in place.
        leads: whether it is the first part of its batch.
        seen: the rows whose gradient is not zero, where most are (an embedding
            on a CPU, where asking costs nothing): the others need no rotation.
    """

    gradient: Tensor
    first: Tensor
    second: Tensor
    target: Tensor | None
    leads: bool = True
    seen: Tensor | None = None


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

    Args:
        config: AdamR's fields.
    """

    def __init__(self, config: AdamRConfig) -> None:
        self.config = config
        self.adamw = AdamWRule()
        self.workspace = Workspace()
        self.bases = BasisRefresh(config, self.workspace)

    @classmethod
    def under(cls, config: OptimizerConfig) -> RotatedAdamRule:
        """The rule as another optimizer's base: its defaults, with what ``config`` shares.

        Fields of the same name as another optimizer's factors (``stat_decay``,
        ``max_dim``, …) mean that optimizer's own and are not taken over.
        """
        shared: dict[str, Any] = {"state_dtype": config.state_dtype}
        if hasattr(config, "precision"):
            shared["precision"] = config.precision
        return cls(AdamRConfig.create(**shared))

    # State ------------------------------------------------------------------

    def plan(self, leaf: Leaf) -> RotationPlan:
        """How a leaf is seen."""
        return plan_rotation(leaf.param.shape, self.config, getattr(leaf, "matrix", None))

    def allocate(self, leaf: Leaf) -> None:
        """Moments, factors, bases and counters of a leaf.

        ``step`` counts Adam's steps, ``updates`` the calls that brought
        statistics (``left_updates``, ``right_updates``: to that factor),
        ``observed`` is 1 once these come from the layer's features; ``mean_sq``
        is the mean of ``exp_avg_sq``, which no rotation changes.
        """
        if "exp_avg" in leaf:
            return
        plan = self.plan(leaf)
        if not plan.rotated:
            self.adamw.allocate(leaf)
            return
        dtype, device = compute_dtype(leaf.param.dtype), leaf.param.device
        shape = (plan.tiles, plan.rows, plan.columns)
        leaf["exp_avg"] = torch.zeros(shape, dtype=dtype, device=device)
        leaf["exp_avg_sq"] = torch.zeros(shape, dtype=dtype, device=device)
        leaf["mean_sq"] = torch.zeros((plan.tiles, 1, 1), dtype=dtype, device=device)
        self.bases.allocate(leaf, plan)
        leaf["step"] = 0
        leaf["updates"] = 0
        leaf["observed"] = 0

    # The step -----------------------------------------------------------------

    def update(self, leaves: Sequence[Leaf]) -> None:
        plain: list[Leaf] = []
        rotated: list[tuple[Leaf, RotationPlan]] = []
        for leaf in leaves:
            plan = self.plan(leaf)
            if plan.rotated:
                self.allocate(leaf)
                rotated.append((leaf, plan))
            else:
                plain.append(leaf)
        if plain:
            self.adamw.update(plain)
        self.bases.gradients.clear()
        for batch in batches(rotated):
            self._step(batch)
        self.bases.judge()

    def _step(self, batch: Batch) -> None:
        gradient = batch.gradient()
        parts = self._parts(batch, gradient)
        collects = self._collects(batch)
        squares = self._squares(gradient) if collects or self.config.floor > 0 else None
        usable = self.bases.usable(squares) if collects and squares is not None else None
        if collects:
            for name in ("updates", *(f"{side}_updates" for side in collects)):
                batch.set(name, batch.number(name) + 1)
        started = batch.number("updates") > 1 or batch.number("step") > 0
        due = self.bases.due(batch) if started else {}
        held = None
        if due or not started:
            for part in parts:
                held = self._rotated(batch, part)
                self._collect(batch, held, collects, part.leads, usable)
            collects = []
            held = held if len(parts) == 1 and batch.number("step") > 0 else None
            held = self._refresh(batch, due, held)
        if not started:
            return
        batch.set("step", batch.number("step") + 1)
        self._measure(batch, squares)
        for part in parts:
            rotated = self._rotated(batch, part) if held is None else held
            self._collect(batch, rotated, collects, part.leads, usable)
            if part.seen is not None:
                zeros = self.workspace.take("seen", part.gradient.shape, rotated).zero_()
                rotated = zeros.index_copy_(1, part.seen, rotated)
            self._descend(batch, part, self._adam(batch, part, rotated))

    def _refresh(
        self, batch: Batch, due: dict[str, list[int]], rotated: Tensor | None
    ) -> Tensor | None:
        """Turn the bases that are due; returns the rotated gradient turned with them, if it can."""
        for side, chosen in due.items():
            rotation = self.bases.refresh(batch.part(chosen), side)
            whole = len(chosen) == len(batch.leaves)
            if rotated is not None and rotation is not None and whole:
                rotated.copy_(turn(side, rotation, rotated, self.workspace))
            else:
                rotated = None
        return rotated

    def _parts(self, batch: Batch, gradient: Tensor) -> list[Part]:
        first, second, target = batch["exp_avg"], batch["exp_avg_sq"], batch.target()
        if target is None or not gradient.is_cpu:
            return [Part(gradient, first, second, target)]
        parts = []
        for number, (rows, columns) in enumerate(batch.slices(CPU_ELEMENTS)):
            g, m, v, p = (t[:, rows, columns] for t in (gradient, first, second, target))
            seen = g[0].any(dim=1).nonzero().squeeze(1) if batch.embeds else None
            if seen is not None and 2 * len(seen) > g.shape[1]:
                seen = None
            parts.append(Part(g, m, v, p, leads=number == 0, seen=seen))
        return parts

    def _collects(self, batch: Batch) -> list[str]:
        """The sides whose factor takes this gradient in.

        Both at the first two calls, then each every ``stat_interval`` steps,
        left and right in turn so that no step is longer than the others.
        """
        if batch.number("observed"):
            return []
        if batch.number("updates") < 2:
            return list(batch.plan.sides)
        step, interval = batch.number("step"), self.config.stat_interval
        turns = {"left": step, "right": step + interval // 2}
        return [side for side in batch.plan.sides if turns[side] % interval == 0]

    def _collect(
        self,
        batch: Batch,
        rotated: Tensor,
        sides: Sequence[str],
        leads: bool,
        usable: Tensor | None,
    ) -> None:
        """``B ← b B + (1-b) Ĝ Ĝᵀ``, ``b = min(stat_decay, 1 - 1/k)``, part by part.

        A gradient that is not ``usable`` changes nothing.
        """
        if sides and usable is not None:
            rotated = torch.where(usable, rotated, 0.0)
        for side in sides:
            decay = min(self.config.stat_decay, 1 - 1 / batch.number(f"{side}_updates"))
            root, factor = rotated if side == "left" else rotated.mT, batch[f"{side}_factor"]
            keep = decay if leads else 1.0
            if usable is not None:
                factor.mul_(torch.where(usable, keep, 1.0))
                keep = 1.0
            accumulate(factor, root, keep, 1 - decay)

    def observe(self, leaf: Leaf, means: dict[str, Tensor]) -> Tensor:
        """Put second moments of a layer's features in the place of the gradient's.

        Args:
            leaf: the leaf, allocated.
            means: a second moment for each rotated side.

        Returns:
            How many were dropped as not finite: a 0-d tensor.
        """
        leaf["observed"] = 1
        leaf["updates"] += 1
        dropped = []
        for side, mean in means.items():
            leaf[f"{side}_updates"] += 1
            decay = min(self.config.stat_decay, 1 - 1 / leaf[f"{side}_updates"])
            dropped.append(observe(leaf, side, mean, decay))
        return torch.stack(dropped).sum()

    def _squares(self, gradient: Tensor) -> Tensor:
        """``‖G‖²`` of each tile, ``[tiles, 1, 1]``."""
        tiles = gradient.flatten(1)
        if len(tiles) == 1:
            return torch.dot(tiles[0], tiles[0]).view(1, 1, 1)
        return torch.linalg.vector_norm(tiles, dim=1).square_()[:, None, None]

    def _measure(self, batch: Batch, squares: Tensor | None) -> None:
        """``mean V``: by ``‖Ĝ‖ = ‖G‖`` it follows without looking at V."""
        if self.config.floor > 0 and squares is not None:
            size = batch.plan.rows * batch.plan.columns
            batch["mean_sq"].lerp_(squares / size, 1 - batch.group["betas"][1])

    def _rotated(self, batch: Batch, part: Part) -> Tensor:
        """``Q_Lᵀ G Q_R`` (its ``seen`` rows); the gradient itself before there is a basis."""
        matrix = part.gradient
        if part.seen is not None:
            matrix = matrix.index_select(1, part.seen)
        if batch.number("step") == 0:
            return matrix
        if batch.plan.left:
            matrix = self._product("a", batch["left_basis"].mT, matrix)
        if batch.plan.right:
            matrix = self._product("b", matrix, batch["right_basis"])
        return matrix

    def _adam(self, batch: Batch, part: Part, rotated: Tensor) -> Tensor:
        """``M / (max(√V, floor · rms √V) + ε c₂)``, ``c₂ = √(1-β₂ᵗ)``, in ``rotated``'s memory."""
        (beta1, beta2), eps = batch.group["betas"], batch.group["eps"]
        part.first.lerp_(rotated, 1 - beta1)
        part.second.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        denominator = torch.sqrt(part.second, out=rotated)
        if self.config.floor > 0:
            denominator.clamp_min_(batch["mean_sq"].sqrt().mul_(self.config.floor))
        denominator.add_(eps * math.sqrt(1 - beta2 ** batch.number("step")))
        return torch.div(part.first, denominator, out=denominator)

    def _descend(self, batch: Batch, part: Part, direction: Tensor) -> None:
        """Rotate back and step; the bias corrections ``c₂ / (1-β₁ᵗ)`` go into the last product."""
        (beta1, beta2), step = batch.group["betas"], batch.number("step")
        scale = math.sqrt(1 - beta2**step) / (1 - beta1**step)
        factors = (direction, batch["right_basis"].mT) if batch.plan.right else None
        if batch.plan.left:
            if factors is None:
                factors = (batch["left_basis"], direction)
            else:
                factors = (self._product("a", batch["left_basis"], direction), factors[1])
        assert factors is not None
        lr = batch.group["lr"]
        if part.target is not None and (part.target.is_cpu or self.config.precision == "highest"):
            keep = 1 - lr * batch.group["weight_decay"]
            part.target[0].addmm_(factors[0][0], factors[1][0], beta=keep, alpha=-lr * scale)
        else:
            batch.descend(matmul(*factors, self.config.precision).mul_(scale))

    def _product(self, role: str, a: Tensor, b: Tensor) -> Tensor:
        shape = (a.shape[0], a.shape[1], b.shape[2])
        out = self.workspace.take(role, shape, a)
        if len(a) == 1:
            return matmul(a[0], b[0], self.config.precision, out=out[0])[None]
        return matmul(a, b, self.config.precision, out=out)

    def diagnostics(self) -> dict[str, float]:
        """Refreshes of bases so far, and how often a rung of the fall-back ladder was needed."""
        return {name: float(value) for name, value in self.bases.counters.items()}
