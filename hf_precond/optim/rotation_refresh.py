"""When and how the bases of AdamR turn, and what turns with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_precond.configs import AdamRConfig, compute_dtype
from hf_precond.linalg import eigenbasis, fallback
from hf_precond.linalg.workspace import Workspace
from hf_precond.optim.failures import Failures
from hf_precond.optim.leaf import Leaf
from hf_precond.optim.rotation_batch import Batch
from hf_precond.optim.rotation_plan import RotationPlan

CLEAN_EVERY = 8
"""Refreshes of a basis between two corrections of its orthogonality."""


class BasisRefresh:
    """Refreshes the bases that are due, and counts.

    A basis is refreshed at Adam's steps 0, 1, 2, 4, 8, … below
    ``basis_interval`` and then once an interval, each on a step of its own so
    that no step is much longer than the others; a basis that is still good is
    left as it is. The first is an
    eigendecomposition; from then on the basis is followed by
    :func:`hf_precond.linalg.eigenbasis.refresh`.

    Args:
        config: AdamR's fields.
        workspace: memory for intermediate results.
    """

    def __init__(self, config: AdamRConfig, workspace: Workspace) -> None:
        self.config = config
        self.workspace = workspace
        self.counters: dict[str, int | Tensor] = {}
        self.failures = Failures()
        self.gradients: list[bool | Tensor] = []
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
            leaf[f"{side}_energy"] = _host_scalar(device, dtype, float("inf"))
            leaf[f"{side}_strikes"] = 0
            leaf[f"{side}_updates"] = 0

    def due(self, batch: Batch) -> dict[str, list[int]]:
        """Per side, the leaves whose basis turns now; sides without any are left out.

        A basis whose turn it is stays as it is while the off-diagonal energy
        found at its previous turn was below ``basis_tolerance``.
        """
        step, interval = batch.number("step"), self.config.basis_interval
        everything = list(range(len(batch.leaves)))
        if step < interval:
            return {side: everything for side in batch.plan.sides if step & (step - 1) == 0}
        chosen = {}
        for side in batch.plan.sides:
            turns = [
                n for n in everything if step % interval == batch.leaves[n][f"{side}_phase"]
            ]
            stale = [n for n in turns if not self._is_good(batch.leaves[n], side)]
            if turns:
                self._measure(batch.part(turns), side)
                self._count("basis_skipped", len(turns) - len(stale))
            if stale:
                chosen[side] = stale
        return chosen

    def _is_good(self, leaf: Leaf, side: str) -> bool:
        """Whether the energy found at the previous turn was small; counts what is not finite."""
        energy = leaf[f"{side}_energy"]
        value = float(energy)
        if value != value and leaf.param.is_cuda:  # NaN: perhaps the copy is still under way
            torch.cuda.current_stream(leaf.param.device).synchronize()
            value = float(energy)
        failed = value != value
        if failed:
            self._count("basis_kept", 1)
        strikes = fallback.strikes(leaf[f"{side}_strikes"], failed, name_of(leaf, side))
        leaf[f"{side}_strikes"] = strikes
        return value < self.config.basis_tolerance

    def _measure(self, batch: Batch, side: str) -> None:
        """Off-diagonal energies, copied to the host where they are read an interval later."""
        factor = batch.read(f"{side}_factor").to(batch.leaves[0]["exp_avg"].dtype)
        energies = eigenbasis.off_diagonal_energy(factor, self.workspace)
        energies = energies.view(len(batch.leaves), -1).amax(1)
        for leaf, energy in zip(batch.leaves, energies.unbind(), strict=True):
            if leaf.param.is_cuda:
                fresh = _host_scalar(leaf.param.device, energy.dtype, float("nan"))
                leaf[f"{side}_energy"] = fresh
            leaf[f"{side}_energy"].copy_(energy, non_blocking=True)

    def usable(self, squares: Tensor) -> Tensor | None:
        """Where a gradient may enter the factors; ``None``, on a CPU, where all may.

        Args:
            squares: ``‖G‖²``, which bounds what it would add to a factor.
        """
        usable = torch.isfinite(squares)
        if not squares.is_cpu:
            self.gradients.append(usable.all().logical_not())
            return usable
        self.gradients.append(not bool(usable.all()))
        return usable if self.gradients[-1] else None

    def judge(self) -> None:
        """Count the calls that brought a gradient no factor could take; stop where that goes on."""
        known = [bad for bad in self.gradients if isinstance(bad, bool)]
        flags = [bad for bad in self.gradients if isinstance(bad, Tensor)]
        if known:
            self._count("gradients_dropped", int(any(known)))
            self.failures.note("gradient", "adamr", any(known))
        if flags:
            bad = torch.stack([flag.to(flags[0].device) for flag in flags]).any()
            self._count("gradients_dropped", bad.to(torch.int64))
            self.failures.watch("gradient", ["adamr"], bad[None])
        self.failures.check()

    def refresh(self, batch: Batch, side: str) -> Tensor | None:
        """Turn the bases of one side of a batch; the moments follow.

        Returns:
            The rotation P; ``None`` where not all of the bases turned at once,
            because a solver failed or memory ran out.
        """
        rotations: list[Tensor] = []

        def work(chosen: Sequence[int]) -> None:
            rotations.append(self._turn(batch.part(chosen), side))

        everything = range(len(batch.leaves))
        self.failures.attempt(
            work, everything, lambda n: name_of(batch.leaves[n], side), self._count
        )
        whole = len(rotations) == 1 and len(rotations[0]) == len(batch.leaves) * batch.plan.tiles
        return rotations[0] if whole else None

    def _turn(self, batch: Batch, side: str) -> Tensor:
        """:meth:`refresh` of a batch, which changes all or, where it raises, nothing."""
        step, interval = batch.number("step"), self.config.basis_interval
        factor = batch.read(f"{side}_factor").to(batch.leaves[0]["exp_avg"].dtype)
        moments: dict[str, Tensor] = {}
        if step == 0:
            record = fallback.Record()
            basis, factor = eigenbasis.eigenbasis(factor, record)
            rotation = basis
            record.counted("basis", self._count)
        else:
            sweeps = 2 if step < interval else 1
            rotation, factor = eigenbasis.refresh(factor, sweeps, self.workspace)
            held = batch.read(f"{side}_basis")
            basis = turn("right", rotation, held, self.workspace, "turned basis")
            if step // interval % CLEAN_EVERY == 0:
                basis = eigenbasis.orthonormal(basis)
            moments = self._transported(batch, side, rotation)
        found = {f"{side}_factor": factor, f"{side}_basis": basis} | moments
        for name, value in found.items():
            batch.write(name, value)
        self._count("basis_refreshes", len(batch.leaves))
        return rotation

    def _transported(self, batch: Batch, side: str, rotation: Tensor) -> dict[str, Tensor]:
        """The moments in the new basis: ``Pᵀ M``, and V by overlap or with its columns.

        V that stays is raised to ``M̂² <= V̂`` where the momentum turned into a
        direction that had none: Adam's ratio would have no bound there. While
        the factors are young their null spaces turn freely, and V always
        follows by overlap.
        """
        first = turn(side, rotation, batch.read("exp_avg"), self.workspace)
        step, second = batch.number("step"), batch.read("exp_avg_sq")
        if self.config.transport == "overlap" or step < self.config.basis_interval:
            second = turn(
                side, eigenbasis.overlap(rotation), second, self.workspace, "turned second"
            )
            return {"exp_avg": first, "exp_avg_sq": second}
        beta1, beta2 = batch.group["betas"]
        lowest = self.workspace.take("turned second", first.shape, first)
        torch.mul(first, first, out=lowest)
        lowest.mul_((1 - beta2**step) / (1 - beta1**step) ** 2)
        second = torch.maximum(second, lowest, out=lowest)
        mean = second.mean((1, 2), keepdim=True)
        return {"exp_avg": first, "exp_avg_sq": second, "mean_sq": mean}

    def _count(self, name: str, by: int | Tensor) -> None:
        self.counters[name] = self.counters.get(name, 0) + by


def name_of(leaf: Leaf, side: str) -> str:
    """A leaf's name in messages."""
    name = getattr(getattr(leaf, "matrix", None), "name", f"weight {tuple(leaf.param.shape)}")
    return f"{name} ({side} side)"


def _host_scalar(device: torch.device, dtype: torch.dtype, value: float) -> Tensor:
    """A number on the host that a GPU can write to without being waited for."""
    return torch.full((), value, dtype=dtype, pin_memory=device.type == "cuda")


def accumulate(factor: Tensor, root: Tensor, keep: float, weight: float) -> None:
    """``B ← keep B + weight X Xᵀ``, at least in the lower triangle.

    Args:
        factor: B, ``[b, n, n]``, changed in place.
        root: X, ``[b, n, k]``.
        keep: multiplier of B.
        weight: multiplier of ``X Xᵀ``.
    """
    if factor.dtype != root.dtype:
        wide = factor.to(root.dtype)
        factor.copy_(wide.baddbmm_(root, root.mT, beta=keep, alpha=weight))
    elif len(factor) > 1 or factor.shape[-1] < eigenbasis.BANDED or not factor.is_cpu:
        factor.baddbmm_(root, root.mT, beta=keep, alpha=weight)
    else:
        matrix, lower = root[0], factor[0]
        for rows in eigenbasis.bands(len(lower)):
            band, before = lower[rows, : rows.stop], matrix[: rows.stop]
            band.addmm_(matrix[rows], before.mT, beta=keep, alpha=weight)


def observe(leaf: Leaf, side: str, mean: Tensor, decay: float) -> Tensor:
    """``B ← decay B + (1-decay) Qᵀ S Q`` with a second moment S of the layer's features.

    Args:
        leaf: the leaf.
        side: ``left`` or ``right``.
        mean: S, ``[n, n]``; one that is not finite changes nothing.
        decay: in [0, 1).

    Returns:
        1 where S was dropped, else 0: a 0-d tensor.
    """
    factor = leaf[f"{side}_factor"]
    mean = mean.to(leaf["exp_avg"].dtype)[None]
    if leaf["step"] > 0:
        mean = eigenbasis.congruence(leaf[f"{side}_basis"], mean)
    usable = torch.isfinite(mean).all()
    weight = torch.where(usable, 1 - decay, 0.0)
    mean = torch.where(usable, mean, 0.0)
    factor.copy_(factor.to(mean.dtype).mul_(1 - weight).add_(mean * weight))
    return (~usable).to(torch.int64)


def turn(
    side: str,
    rotation: Tensor,
    matrix: Tensor,
    workspace: Workspace | None = None,
    role: str = "turn",
) -> Tensor:
    """``Pᵀ M`` on the left, ``M P`` on the right.

    With a workspace the result's memory is taken over by the next call of the
    same role and shape.
    """
    out = (workspace or Workspace()).take(role, matrix.shape, matrix)
    if side == "left":
        return eigenbasis.product(rotation.mT, matrix, out)
    return eigenbasis.product(matrix, rotation, out)
