"""Adam's step in the eigenbases of a gradient's Kronecker second moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.config.base import OptimizerConfig
from hf_precond.distributed import collectives
from hf_precond.linalg import eigenbasis
from hf_precond.linalg.products import compute_dtype, matmul
from hf_precond.linalg.workspace import Workspace
from hf_precond.optimizers.adamr.batch import (
    CPU_ELEMENTS,
    SLICE,
    Batch,
    Part,
    allocate_state,
    batches,
    convert_state,
)
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.refresh import BasisRefresh, Chosen, RefreshItem
from hf_precond.optimizers.adamr.tiling import Tiling, tile
from hf_precond.optimizers.base.fallback import AdamWFallback, FallbackOptimizer
from hf_precond.optimizers.base.parameters import ParamView

WINDOW = 1 << 25
"""Elements of the gradients that are held while ranks share out a refresh."""


@dataclass(eq=False)
class _Begun:
    """A step of a batch under way.

    Args:
        batch: the batch.
        collects: the sides whose factor has still to take the gradient in.
        started: whether there is a step at all; the first call collects only.
        turns: the bases whose turn it is.
        squares: ``‖G‖²`` of each tile, where somebody asks.
        usable: see :meth:`BasisRefresh.usable`.
        parts: its parts.
        rotated: the gradient in the bases before they turn, where it is held.
    """

    batch: Batch
    collects: list[str]
    started: bool
    turns: list[RefreshItem]
    squares: Tensor | float | None
    usable: Tensor | None
    parts: list[Part]
    rotated: Tensor | None = None


class RotatedAdam(FallbackOptimizer):
    """Rotate the gradient, take Adam's step there, rotate back.

    With ``L`` and ``R`` the averages of ``G Gᵀ`` and ``Gᵀ G`` and their
    eigenvectors ``Q_L`` and ``Q_R``::

        Ĝ = Q_Lᵀ G Q_R;   M ← β₁ M + (1-β₁) Ĝ;   V ← β₂ V + (1-β₂) Ĝ∘Ĝ
        Û = M̂ / (max(√V̂, floor · rms √V̂) + ε)
        p ← (1 - lr·wd) p - lr · Q_L Û Q_Rᵀ

    When a basis turns, ``Q' = Q P``, the momentum follows exactly (``Pᵀ M``)
    and the second moment by the overlap of the coordinates (``(P∘P)ᵀ V``: V
    stays positive and keeps its sum), as always in the first interval, or stays with its columns,
    raised to where ``M̂² <= V̂``. The factors are kept as ``Qᵀ L Q`` and averaged with
    ``b = min(stat_decay, 1 - 1/k)``; a gradient enters them before the bases turn at its step.

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
        self.adamw = AdamWFallback()
        self.workspace = Workspace()
        self.bases = BasisRefresh(config, self.workspace)

    @classmethod
    def under(cls, config: OptimizerConfig) -> RotatedAdam:
        """The rule as another optimizer's base: its defaults, with what ``config`` shares.

        Fields of the same name as another optimizer's factors (``stat_decay``,
        ``max_dim``, …) mean that optimizer's own and are not taken over.
        """
        shared: dict[str, Any] = {"state_dtype": config.state_dtype}
        if hasattr(config, "precision"):
            shared["precision"] = config.precision
        return cls(AdamRConfig.create(**shared))

    # State ------------------------------------------------------------------

    def tiling(self, view: ParamView) -> Tiling:
        """How a view is seen."""
        return tile(view.shape, self.config, view.matrix)

    def allocate(self, views: Sequence[ParamView]) -> None:
        """Make the state of views where it is missing, their refreshes spread over steps."""
        new = {view for view in views if "exp_avg" not in view}
        tiled = [(view, self.tiling(view)) for view in views]
        rotated = [(view, tiling) for view, tiling in tiled if tiling.rotated]
        for view, tiling in rotated:
            if view not in new:
                convert_state(view, tiling, self.config)
        if not new:
            return
        present = [(view, tiling) for view, tiling in rotated if view not in new]
        for view, tiling in tiled:
            if view in new:
                self._make(view, tiling)
        self.bases.schedule.spread([one for one in rotated if one[0] in new], present)

    def _make(self, view: ParamView, tiling: Tiling) -> None:
        """Moments, factors, bases and counters of a view.

        ``step`` counts Adam's steps, ``updates`` the calls that brought
        statistics (``left_updates``, ``right_updates``: to that factor),
        ``observed`` is 1 once these come from the layer's features; ``mean_sq``
        is the mean of ``exp_avg_sq``, which no rotation changes.
        """
        if not tiling.rotated:
            self.adamw.allocate([view])
            return
        dtype, device = compute_dtype(view.param.dtype), view.param.device
        shape = (tiling.tiles, tiling.rows, tiling.columns)
        view["exp_avg_sq"] = torch.zeros(shape, dtype=dtype, device=device)
        view["mean_sq"] = torch.zeros((tiling.tiles, 1, 1), dtype=dtype, device=device)
        allocate_state(view, tiling, self.config)
        view["step"] = 0
        view["updates"] = 0
        view["observed"] = 0

    # The step -----------------------------------------------------------------

    def update(self, views: Sequence[ParamView]) -> None:
        self.allocate(views)
        tiled = [(view, self.tiling(view)) for view in views]
        plain = [view for view, tiling in tiled if not tiling.rotated]
        rotated = [(view, tiling) for view, tiling in tiled if tiling.rotated]
        if plain:
            self.adamw.update(plain)
        self.bases.gradients.clear()
        chosen = self.bases.decide(rotated)
        alone = collectives.world_size() == 1
        for window in self._windows(batches(rotated), 0 if alone else WINDOW):
            started = [self._begin(batch, chosen, hold=alone) for batch in window]
            rotations = self.bases.refresh([turn for begun in started for turn in begun.turns])
            for begun in started:
                self._finish(begun, rotations if alone else {})
        self.bases.judge()

    def _windows(self, found: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
        """Batches that are stepped together, of about ``size`` elements; each alone for 0.

        On one rank a batch stays in the cache from its refresh to its step;
        several ranks share out the refreshes of as many batches as may have
        their gradients held together.
        """
        window: list[Batch] = []
        room = size
        for batch in found:
            elements = sum(view.param.numel() for view in batch.views)
            if window and elements > room:
                yield window
                window, room = [], size
            window.append(batch)
            room -= elements
        if window:
            yield window

    def _begin(self, batch: Batch, chosen: Chosen, hold: bool) -> _Begun:
        """Take the gradient in where a basis turns: it turns towards this gradient too."""
        collects = self._collects(batch)
        parts = self._parts(batch)
        squares = self._squares(batch, parts) if collects or self.config.floor > 0 else None
        usable = self.bases.usable(squares) if collects and squares is not None else None
        if collects:
            for name in ("updates", *(f"{side}_updates" for side in collects)):
                batch.set(name, batch.number(name) + 1)
        started = batch.number("updates") > 1 or batch.number("step") > 0
        turns = self.bases.due(batch, chosen) if started else []
        begun = _Begun(batch, collects, started, turns, squares, usable, parts)
        if started and not turns:
            return begun
        for part in parts:
            rotated = self._rotated(batch, part)
            self._collect(batch, rotated, collects, part.leads, usable)
            if hold and len(parts) == 1 and batch.number("step") > 0:
                begun.rotated = rotated
        begun.collects = []
        return begun

    def _finish(self, begun: _Begun, rotations: Mapping[str, Tensor]) -> None:
        """Adam's step in the bases as they are now."""
        batch = begun.batch
        if not begun.started:
            return
        batch.set("step", batch.number("step") + 1)
        held = self._turned(begun, rotations)
        self._measure(batch, begun.squares)
        for part in begun.parts:
            rotated = self._rotated(batch, part) if held is None else held
            self._collect(batch, rotated, begun.collects, part.leads, begun.usable)
            if part.seen is not None:
                zeros = self.workspace.take("seen", part.gradient.shape, rotated).zero_()
                rotated = zeros.index_copy_(-2, part.seen, rotated)
            self._descend(batch, part, *self._adam(batch, part, rotated))

    def _turned(self, begun: _Begun, rotations: Mapping[str, Tensor]) -> Tensor | None:
        """The rotated gradient that is held, turned with the bases; ``None`` where it cannot be."""
        rotated = begun.rotated
        for side in begun.batch.tiling.sides:
            if rotated is None or not any(side in turn.stale for turn in begun.turns):
                continue
            found = rotations.get(side)
            if found is not None and rotated.dim() == 2:
                found = found[0]
            role = f"held {side}"
            rotated = None if found is None else eigenbasis.rotate(side, found, rotated, self.workspace, role)
        return rotated

    def _parts(self, batch: Batch) -> list[Part]:
        gradient, target = batch.gradient(), batch.target()
        first, second = batch.matrices("exp_avg"), batch.matrices("exp_avg_sq")
        if target is None or not gradient.is_cpu:
            return [Part(gradient, first, second, target)]
        parts = []
        # Rows that a step does not read are put together again, which belongs into the cache.
        size = CPU_ELEMENTS if batch.embeds else SLICE
        slices = batch.slices(size)
        for number, (rows, columns) in enumerate(slices):
            g, m, v, p = gradient, first, second, target
            if len(slices) > 1:
                g, m, v, p = (tensor[rows, columns] for tensor in (g, m, v, p))
            part = Part(g, m, v, p, leads=number == 0)
            if batch.embeds:
                part.norms = torch.linalg.vector_norm(g, dim=1)
                seen = (part.norms != 0).nonzero().squeeze(1)
                part.seen = None if 2 * len(seen) > len(g) else seen
            parts.append(part)
        return parts

    def _collects(self, batch: Batch) -> list[str]:
        """The sides whose factor takes this gradient in.

        Both at the first two calls, then each every ``stat_interval`` steps,
        left and right in turn so that no step is longer than the others.
        """
        if batch.number("observed"):
            return []
        if batch.number("updates") < 2:
            return list(batch.tiling.sides)
        step, interval = batch.number("step"), self.config.stat_interval
        turns = {"left": step, "right": step + interval // 2}
        return [side for side in batch.tiling.sides if turns[side] % interval == 0]

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
            root = rotated if side == "left" else rotated.mT
            factor, keep = batch.matrices(f"{side}_factor"), decay if leads else 1.0
            if usable is not None:
                factor.mul_(torch.where(usable, factor.new_full((), keep), factor.new_ones(())))
                keep = 1.0
            accumulate(factor, root, keep, 1 - decay)

    def observe(self, view: ParamView, means: dict[str, Tensor]) -> Tensor:
        """Put second moments of a layer's features in the place of the gradient's.

        Args:
            view: the view, allocated.
            means: a second moment for each rotated side.

        Returns:
            How many were dropped as not finite: a 0-d tensor.
        """
        view["observed"] = 1
        view["updates"] += 1
        dropped = []
        for side, mean in means.items():
            view[f"{side}_updates"] += 1
            decay = min(self.config.stat_decay, 1 - 1 / view[f"{side}_updates"])
            dropped.append(observe(view, side, mean, decay))
        return torch.stack(dropped).sum()

    def _squares(self, batch: Batch, parts: Sequence[Part]) -> Tensor | float:
        """``‖G‖²``, ``[tiles, 1, 1]`` or ``[1, 1]`` of a lone matrix; on a CPU its is a number."""
        gradient = parts[0].gradient
        if batch.lone and gradient.is_cpu:
            known = [part.gradient if part.norms is None else part.norms for part in parts]
            total = sum(float(torch.linalg.vector_norm(values)) ** 2 for values in known)
            return total if total <= torch.finfo(gradient.dtype).max else math.inf
        return torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True).square_()

    def _measure(self, batch: Batch, squares: Tensor | float | None) -> None:
        """``mean V``: by ``‖Ĝ‖ = ‖G‖`` it follows without looking at V."""
        if self.config.floor > 0 and squares is not None:
            beta2 = batch.group["betas"][1]
            share = (1 - beta2) / (batch.tiling.rows * batch.tiling.columns)
            batch["mean_sq"].mul_(beta2).add_(squares, alpha=share)

    def _rotated(self, batch: Batch, part: Part) -> Tensor:
        """``Q_Lᵀ G Q_R`` (its ``seen`` rows); the gradient itself before there is a basis."""
        matrix = part.gradient
        if part.seen is not None:
            matrix = matrix.index_select(-2, part.seen)
        if batch.number("step") == 0:
            return matrix
        if batch.tiling.left:
            role = "turning" if batch.tiling.right else "rotated"
            matrix = self._product(role, batch.matrices("left_basis").mT, matrix)
        if batch.tiling.right:
            matrix = self._product("rotated", matrix, batch.matrices("right_basis"))
        return matrix

    def _adam(self, batch: Batch, part: Part, rotated: Tensor) -> tuple[Tensor, float]:
        """Adam's direction and what it is to be multiplied with.

        ``M / (max(√V, floor · rms √V) + ε c₂)`` with ``c₂ = √(1-β₂ᵗ)``, to be
        multiplied with the bias corrections ``c₂ / (1-β₁ᵗ)``.
        """
        (beta1, beta2), eps, step = batch.group["betas"], batch.group["eps"], batch.number("step")
        first, second, floor = part.first, part.second, self.config.floor
        direction = self.workspace.take("turning", rotated.shape, rotated)
        if rotated.is_cpu and all(t.is_contiguous() for t in (rotated, first, second)):
            count = torch.tensor(float(step), dtype=torch.float32)
            torch._fused_adamw_(
                [direction.zero_()], [rotated], [first], [second], [], [count],
                lr=-1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            # The kernel knows no floor; mostly there is nothing below it.
            lowest = floor**2 * float(batch["mean_sq"].amax())
            if floor == 0 or float(second.amin()) >= lowest:
                return direction, 1.0
        else:
            first.lerp_(rotated, 1 - beta1)
            second.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        torch.sqrt(second, out=direction)
        if floor > 0:
            direction.clamp_min_(batch.matrices("mean_sq").sqrt().mul_(floor))
        correction = math.sqrt(1 - beta2**step)
        torch.div(first, direction.add_(eps * correction), out=direction)
        return direction, correction / (1 - beta1**step)

    def _descend(self, batch: Batch, part: Part, direction: Tensor, scale: float) -> None:
        """Rotate back and step; ``scale`` goes into the last product."""
        left, right = direction, None
        if batch.tiling.right:
            right = batch.matrices("right_basis").mT
        if batch.tiling.left:
            basis = batch.matrices("left_basis")
            if right is None:
                left, right = basis, direction
            else:
                left = self._product("rotated", basis, direction)
        assert right is not None
        lr = batch.group["lr"]
        if part.target is not None and (part.target.is_cpu or self.config.precision == "highest"):
            keep = 1 - lr * batch.group["weight_decay"]
            part.target.addmm_(left, right, beta=keep, alpha=-lr * scale)
        else:
            batch.descend(matmul(left, right, self.config.precision).mul_(scale))

    def _product(self, role: str, a: Tensor, b: Tensor) -> Tensor:
        out = self.workspace.take(role, (*a.shape[:-1], b.shape[-1]), a)
        return matmul(a, b, self.config.precision, out=out)

    def diagnostics(self) -> dict[str, float]:
        """Refreshes of bases so far, and how often a rung of the fall-back ladder was needed."""
        return {name: float(value) for name, value in self.bases.counters.items()}


def accumulate(factor: Tensor, root: Tensor, keep: float, weight: float) -> None:
    """``B ← keep B + weight X Xᵀ``, at least in the lower triangle.

    Args:
        factor: B, ``[n, n]`` or ``[b, n, n]``, changed in place.
        root: X, ``[…, n, k]``.
        keep: multiplier of B.
        weight: multiplier of ``X Xᵀ``.
    """
    if factor.dtype != root.dtype:
        wide = factor.to(root.dtype).mul_(keep)
        factor.copy_(wide.add_(root @ root.mT, alpha=weight))
    elif factor.dim() == 3:
        factor.baddbmm_(root, root.mT, beta=keep, alpha=weight)
    elif len(factor) < eigenbasis.BANDED or not factor.is_cpu:
        factor.addmm_(root, root.mT, beta=keep, alpha=weight)
    else:
        for rows in eigenbasis.bands(len(factor)):
            band, before = factor[rows, : rows.stop], root[: rows.stop]
            band.addmm_(root[rows], before.mT, beta=keep, alpha=weight)


def observe(view: ParamView, side: str, mean: Tensor, decay: float) -> Tensor:
    """``B ← decay B + (1-decay) Qᵀ S Q`` with a second moment S of the layer's features.

    Args:
        view: the view.
        side: ``left`` or ``right``.
        mean: S, ``[n, n]``; one that is not finite changes nothing.
        decay: in [0, 1).

    Returns:
        1 where S was dropped, else 0: a 0-d tensor.
    """
    factor = view[f"{side}_factor"]
    mean = mean.to(view["exp_avg"].dtype)[None]
    usable = torch.isfinite(mean).all()
    weight = torch.where(usable, 1 - decay, 0.0)
    mean = torch.where(usable, mean, 0.0)
    if view["step"] > 0:
        mean = eigenbasis.congruence(view[f"{side}_basis"], mean)
    factor.copy_(factor.to(mean.dtype).mul_(1 - weight).add_(mean * weight))
    return (~usable).to(torch.int64)
