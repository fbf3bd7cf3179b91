"""When and how the bases of AdamR turn, and what turns with them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.configs import AdamRConfig, compute_dtype
from hf_precond.linalg import eigenbasis, fallback
from hf_precond.optim.leaf import Leaf
from hf_precond.optim.rotation_batch import Batch
from hf_precond.optim.rotation_plan import RotationPlan

CLEAN_EVERY = 8
"""Refreshes of a basis between two corrections of its orthogonality."""
BANDED = 256
"""Factors at least this wide are accumulated in bands of their lower triangle, on a CPU."""
BANDS = 4


class BasisRefresh:
    """Refreshes the bases that are due, and counts.

    A basis is refreshed at Adam's steps 0, 1, 2, 4, 8, … below
    ``basis_interval`` and then once an interval, each on a step of its own so
    that no step is much longer than the others. The first is an
    eigendecomposition; from then on the basis is followed by
    :func:`hf_precond.linalg.eigenbasis.refresh`.

    Args:
        config: AdamR's fields.
    """

    def __init__(self, config: AdamRConfig) -> None:
        self.config = config
        self.counters: dict[str, int] = {}
        self.loads = [0] * config.basis_interval

    def allocate(self, leaf: Leaf, plan: RotationPlan) -> None:
        """Factors and bases of a leaf.

        ``left_factor`` is ``Q_Lᵀ L Q_L`` (its lower triangle), ``left_phase``
        the step of an interval on which that basis is refreshed.
        """
        dtype, device = compute_dtype(leaf.param.dtype), leaf.param.device
        kept = self.config.factor_dtype(leaf.param.dtype)
        for side, cost in plan.refresh_cost.items():
            size = plan.rows if side == "left" else plan.columns
            square = (plan.tiles, size, size)
            leaf[f"{side}_factor"] = torch.zeros(square, dtype=kept, device=device)
            leaf[f"{side}_basis"] = torch.zeros(square, dtype=dtype, device=device)
            phase = min(range(len(self.loads)), key=self.loads.__getitem__)
            self.loads[phase] += cost
            leaf[f"{side}_phase"] = phase

    def due(self, batch: Batch) -> dict[str, list[int]]:
        """Per side, the leaves whose basis is refreshed now; sides without any are left out."""
        chosen = {
            side: [n for n, leaf in enumerate(batch.leaves) if self._is_due(leaf, side)]
            for side in batch.plan.sides
        }
        return {side: leaves for side, leaves in chosen.items() if leaves}

    def _is_due(self, leaf: Leaf, side: str) -> bool:
        step, interval = leaf["step"], self.config.basis_interval
        if step < interval:
            return step & (step - 1) == 0
        return step % interval == leaf[f"{side}_phase"]

    def refresh(self, batch: Batch, side: str) -> None:
        """Turn the bases of one side of a batch; the moments follow."""
        step, interval = batch.number("step"), self.config.basis_interval
        factor = batch.read(f"{side}_factor").to(batch.leaves[0]["exp_avg"].dtype)
        if step == 0:
            record = fallback.Record()
            basis, factor = eigenbasis.eigenbasis(factor, record)
            record.counted("basis", self._count)
        else:
            rotation, factor = eigenbasis.refresh(factor, sweeps=2 if step < interval else 1)
            basis = batch.read(f"{side}_basis") @ rotation
            if step // interval % CLEAN_EVERY == 0:
                basis = eigenbasis.orthonormal(basis)
            batch.write("exp_avg", turn(side, rotation, batch.read("exp_avg")))
            if self.config.transport == "overlap" or step < interval:
                share = eigenbasis.overlap(rotation)
                batch.write("exp_avg_sq", turn(side, share, batch.read("exp_avg_sq")))
        batch.write(f"{side}_factor", factor)
        batch.write(f"{side}_basis", basis)
        self._count("basis_refreshes", len(batch.leaves))

    def _count(self, name: str, by: int) -> None:
        self.counters[name] = self.counters.get(name, 0) + by


def accumulate(factor: Tensor, root: Tensor, keep: float, weight: float) -> None:
    """``B ← keep B + weight X Xᵀ``, at least in the lower triangle.

    Args:
        factor: B, ``[b, n, n]``, changed in place.
        root: X, ``[b, n, k]``.
        keep: multiplier of B.
        weight: multiplier of ``X Xᵀ``.
    """
    size = factor.shape[-1]
    if factor.dtype != root.dtype:
        wide = factor.to(root.dtype)
        factor.copy_(wide.baddbmm_(root, root.mT, beta=keep, alpha=weight))
    elif len(factor) > 1 or size < BANDED or not factor.is_cpu:
        factor.baddbmm_(root, root.mT, beta=keep, alpha=weight)
    else:
        width = -(-size // BANDS)
        for start in range(0, size, width):
            end = min(start + width, size)
            band, rows, columns = factor[0, start:end, :end], root[0, start:end], root[0, :end]
            band.addmm_(rows, columns.mT, beta=keep, alpha=weight)


def turn(side: str, rotation: Tensor, matrix: Tensor) -> Tensor:
    """``Pᵀ M`` on the left, ``M P`` on the right."""
    return rotation.mT @ matrix if side == "left" else matrix @ rotation
