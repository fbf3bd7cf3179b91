"""When and how the bases of AdamR turn, and what turns with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg import eigenbasis, factorization
from hf_precond.linalg.workspace import Workspace
from hf_precond.optimizers.adamr.batch import Batch, host_tensor
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.tiling import Tiling
from hf_precond.optimizers.base.parameters import ParamView, grouped
from hf_precond.optimizers.base.refresh import FailureRecord, ShardedRefresh

ORTHOGONALIZE_EVERY = 8
"""Refreshes of a basis between two corrections of its orthogonality."""
PHASES = 4096
"""Steps of an interval that turns are spread over, so that an endless one has no endless lists."""


@dataclass(frozen=True, eq=False)
class DueBasis:
    """One basis of a view at the step of its turn.

    Args:
        view: the view.
        side: ``left`` or ``right``.
        cost: of a step that turns it, any unit.
    """

    view: ParamView
    side: str
    cost: float

    @property
    def waited(self) -> int:
        """Steps since it turned last."""
        waited: int = self.view["step"] - self.view[f"{self.side}_turned"]
        return waited


class RefreshSchedule:
    """Spreads the turns of bases over the steps, so that no step is much longer than the others.

    Kept in a view's state, for each rotated side: ``left_phase``, the step of
    an interval on which it turns; ``left_clean``, the interval of
    :data:`ORTHOGONALIZE_EVERY` in which it is made orthogonal again; ``left_turned``,
    Adam's step at which it turned last.

    The phases are spread by cost when the state is made. Bases that are left
    as they are make their steps short and the others too long by comparison,
    so a step that has more to turn than an average one puts some off to the
    next.

    Args:
        interval: steps between two turns of a basis, >= 1.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def spread(
        self,
        new: Sequence[tuple[ParamView, Tiling]],
        present: Sequence[tuple[ParamView, Tiling]] = (),
    ) -> None:
        """Give new bases their steps, the costliest first.

        Args:
            new: views at their first call, with the tiling of each.
            present: those that have their steps.
        """
        loads = [0.0] * min(self.interval, PHASES)
        cleans = [[0.0] * ORTHOGONALIZE_EVERY for _ in loads]
        for view, tiling in present:
            for side, cost in tiling.turn_cost.items():
                # A new view's steps begin to count one call from now.
                place = (view[f"{side}_phase"] - view["step"] - 1) % self.interval
                if place < len(loads):
                    loads[place] += cost
                    cleans[place][view[f"{side}_clean"]] += cost
        costs = [(cost, view, s) for view, tiling in new for s, cost in tiling.turn_cost.items()]
        for cost, view, side in sorted(costs, key=lambda found: -found[0]):
            phase = min(range(len(loads)), key=loads.__getitem__)
            clean = min(range(ORTHOGONALIZE_EVERY), key=cleans[phase].__getitem__)
            loads[phase] += cost
            cleans[phase][clean] += cost
            view[f"{side}_phase"], view[f"{side}_clean"] = phase, clean
            view[f"{side}_turned"] = 0

    def orthogonalizes(self, view: ParamView, side: str) -> bool:
        """Whether a basis that turns at this step is made orthogonal again."""
        clean: int = view[f"{side}_clean"]
        return view["step"] // self.interval % ORTHOGONALIZE_EVERY == clean

    def due(self, tiled: Sequence[tuple[ParamView, Tiling]]) -> list[DueBasis]:
        """The bases whose step of the interval it is, of views past their first interval."""
        found = []
        for view, tiling in tiled:
            place = view["step"] % self.interval
            if view["step"] >= self.interval:
                sides = [side for side in tiling.sides if place == view[f"{side}_phase"]]
                found += [DueBasis(view, side, tiling.turn_cost[side]) for side in sides]
        return found

    def average(self, tiled: Sequence[tuple[ParamView, Tiling]]) -> float:
        """Cost of an average step: all bases but those that did not turn for two intervals."""
        total = 0.0
        for view, tiling in tiled:
            oldest = view["step"] - 2 * self.interval
            for side, cost in tiling.turn_cost.items():
                total += cost if view[f"{side}_turned"] > oldest else 0.0
        return total / self.interval

    def postpone(self, stale: Sequence[DueBasis], average: float) -> list[DueBasis]:
        """Leave to the next steps what makes this one longer than an average one.

        Those that have waited longest turn first, one of them at least. A
        basis of cost c turns while the load before it is at most ``average -
        c / interval``: were that exceeded at each of ``interval`` steps, the
        others would cost more than all together do, so nobody waits longer.
        With an ``interval`` of 1 all turn.

        Args:
            stale: the bases that are due and not good any more.
            average: see :meth:`average`.

        Returns:
            Those that turn at this step.
        """
        turning: list[DueBasis] = []
        load, rounding = 0.0, 1e-9 * average
        for due in sorted(stale, key=lambda due: due.waited, reverse=True):
            room = average - due.cost / self.interval + rounding
            if self.interval == 1 or not turning or load <= room:
                turning.append(due)
                load += due.cost
                due.view[f"{due.side}_turned"] = due.view["step"]
            else:
                phase = due.view[f"{due.side}_phase"]
                due.view[f"{due.side}_phase"] = (phase + 1) % self.interval
        return turning


CHECK_EVERY = 8
"""Steps between two looks at what a GPU says of its gradients."""

Chosen = dict[ParamView, dict[str, bool]]
"""The bases whose turn it is, and whether each turns."""

COUNTERS = ("basis_refreshes", *(f"basis_{retry}" for retry in factorization.RETRIES))


@dataclass(eq=False)
class RefreshItem:
    """A view that has bases whose turn it is.

    Args:
        batch: the batch that the view is stepped in.
        place: its place there.
        measured: the sides whose off-diagonal energy is due.
        stale: the sides that are refreshed.
    """

    batch: Batch
    place: int
    measured: tuple[str, ...]
    stale: tuple[str, ...]

    @property
    def view(self) -> ParamView:
        """The view."""
        return self.batch.views[self.place]

    @property
    def name(self) -> str:
        """The view and its sides, for messages."""
        return name_of(self.view, " and ".join(self.stale or self.measured))

    @property
    def cost(self) -> float:
        """Of its refreshes, in multiplications; a skipped one takes a look at its factor."""
        cost = self.batch.tiling.refresh_cost
        size = self.batch.views[self.place].param.numel()
        return sum(cost[side] for side in self.stale) + 10.0 * size * len(self.measured)


class BasisRefresh:
    """Refreshes the bases that are due, and counts.

    A basis is refreshed at Adam's steps 0, 1, 2, 4, 8, … below
    ``basis_interval`` and then once an interval, on steps of their own
    (:class:`~hf_precond.optimizers.adamr.schedule.RefreshSchedule`); a basis that is
    still good is left as it is. The first is an eigendecomposition; from then
    on the basis is followed by :func:`hf_precond.linalg.eigenbasis.refresh`.

    Args:
        config: AdamR's fields.
        workspace: memory for intermediate results.
    """

    def __init__(self, config: AdamRConfig, workspace: Workspace) -> None:
        self.config = config
        self.workspace = workspace
        self.counters: dict[str, int | Tensor] = {}
        self.failures = FailureRecord()
        self.gradients: list[bool | Tensor] = []
        self.calls = 0
        self.schedule = RefreshSchedule(config.basis_interval)

    def decide(self, tiled: Sequence[tuple[ParamView, Tiling]]) -> Chosen:
        """Choose the bases that turn at this step, among those of all views that take it.

        A basis whose turn it is stays as it is while the off-diagonal energy
        found at its previous turn was below ``basis_tolerance``.

        Returns:
            For each view with bases whose turn it is, whether each turns.
        """
        chosen: Chosen = {}
        due = self.schedule.due(tiled)
        if not due:
            return chosen
        stale = [one for one in due if not self._energy(one) < self.config.basis_tolerance]
        turning = self.schedule.postpone(stale, self.schedule.average(tiled))
        skipped = [one for one in due if one not in stale]
        self._count("basis_skipped", len(skipped))
        for one in (*skipped, *turning):
            chosen.setdefault(one.view, {})[one.side] = one not in skipped
            self._strike(one)
        return chosen

    def due(self, batch: Batch, chosen: Chosen) -> list[RefreshItem]:
        """The views of a batch with bases that turn now."""
        step, sides, places = batch.number("step"), batch.tiling.sides, range(len(batch.views))
        if step < self.config.basis_interval:
            return [RefreshItem(batch, n, (), sides) for n in places if step & (step - 1) == 0]
        turns = []
        for place in places:
            turning = chosen.get(batch.views[place], {})
            measured = tuple(side for side in sides if side in turning)
            if measured:
                stale = tuple(side for side in measured if turning[side])
                turns.append(RefreshItem(batch, place, measured, stale))
        return turns

    def _energy(self, due: DueBasis) -> float:
        """The energy found at a basis' previous turn; NaN where it was not finite."""
        energy = due.view[f"{due.side}_energy"]
        value = float(energy)
        if value != value and due.view.param.is_cuda:  # perhaps the copy is still under way
            torch.cuda.current_stream(due.view.param.device).synchronize()
            value = float(energy)
        return value

    def _strike(self, due: DueBasis) -> None:
        """Count how often in a row a basis was found not finite; stop where that goes on."""
        name = f"{due.side}_strikes"
        failed = math.isnan(float(due.view[f"{due.side}_energy"]))
        self._count("basis_kept", int(failed))
        due.view[name] = factorization.strikes(due.view[name], failed, name_of(due.view, due.side))

    def usable(self, squares: Tensor | float) -> Tensor | None:
        """Where a gradient may enter the factors; ``None``, on a CPU, where all may.

        Args:
            squares: ``‖G‖²``, which bounds what it would add to a factor.
        """
        if isinstance(squares, float):
            self.gradients.append(not math.isfinite(squares))
            return torch.tensor(False) if self.gradients[-1] else None
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
        self.calls += 1
        # A copy to the host at every step would cost more than the news is worth.
        if not flags or self.calls % CHECK_EVERY == 0:
            self.failures.check()

    def refresh(self, turns: Sequence[RefreshItem]) -> dict[str, Tensor]:
        """Turn the bases that are due, every rank its share of them; the moments follow.

        Args:
            turns: those of one batch, or of all.

        Returns:
            For ``turns`` of one batch that one rank has turned whole, the
            rotation P of each side.
        """
        if not turns:
            return {}
        device = turns[0].view.param.device
        pieces = ShardedRefresh(turns, [turn.cost for turn in turns], device, COUNTERS, numbers=2)
        rotations: dict[str, Tensor] = {}
        for mine in grouped(pieces.mine(), lambda turn: id(turn.batch)):
            for side in mine[0].batch.tiling.sides:
                left = [t for t in mine if side in t.measured and side not in t.stale]
                self._measure(left, side, pieces)
                rotation = self._refresh([t for t in mine if side in t.stale], side, pieces)
                if rotation is not None:
                    rotations[side] = rotation
        pieces.share(self._results)
        self._raise([turn for turn in turns if turn.stale], pieces)
        self._note_energies(pieces)
        pieces.report(self.failures, lambda turn: turn.name, self._count)
        return rotations

    def _refresh(self, turns: Sequence[RefreshItem], side: str, pieces: ShardedRefresh[RefreshItem]) -> Tensor | None:
        """Turn one side of views of one batch; the rotation, where all of the batch turned."""
        if not turns:
            return None
        batch, rotations = turns[0].batch, []

        def work(chosen: Sequence[RefreshItem]) -> None:
            part = batch.part([turn.place for turn in chosen])
            rotation, energies = self._turn(part, side, pieces)
            rotations.append(rotation)
            if energies is not None:
                self._put(chosen, side, energies, pieces)

        pieces.attempt(work, turns)
        whole = len(rotations) == 1 and len(rotations[0]) == len(batch.views) * batch.tiling.tiles
        return rotations[0] if whole else None

    def _measure(self, turns: Sequence[RefreshItem], side: str, pieces: ShardedRefresh[RefreshItem]) -> None:
        """Off-diagonal energies of one side of views of one batch."""
        if not turns:
            return
        batch = turns[0].batch.part([turn.place for turn in turns])
        factor = batch.read(f"{side}_factor").to(turns[0].view["exp_avg"].dtype)
        self._put(turns, side, eigenbasis.off_diagonal_energy(factor, self.workspace), pieces)

    def _put(
        self, turns: Sequence[RefreshItem], side: str, energies: Tensor, pieces: ShardedRefresh[RefreshItem]
    ) -> None:
        """Note the energies of one side of views of one batch."""
        number = ("left", "right").index(side)
        pieces.put(number, turns, energies.view(len(turns), -1).amax(1))

    def _note_energies(self, pieces: ShardedRefresh[RefreshItem]) -> None:
        """Keep energies on the host, where they are read an interval later."""
        found = []
        for number, side in enumerate(("left", "right")):
            for due in pieces.items:
                if side in due.measured:
                    found.append((due.view, f"{side}_energy", pieces.number(number, due)))
        on_gpu = [(view, name, e) for view, name, e in found if isinstance(e, Tensor)]
        for view, name, energy in found:
            if not isinstance(energy, Tensor):
                view[name].fill_(energy)
        for same in grouped(on_gpu, lambda one: (one[2].device, one[0][one[1]].dtype)):
            energies = torch.stack([energy for _, _, energy in same])
            dtype = same[0][0][same[0][1]].dtype
            copies = host_tensor((len(same),), energies.device, dtype, float("nan"))
            copies.copy_(energies, non_blocking=True)
            for (view, name, _), copy in zip(same, copies.unbind(), strict=True):
                view[name] = copy

    def _results(self, turn: RefreshItem) -> list[Tensor]:
        """What the turn of a view has changed, as it lies in memory."""
        view, step = turn.view, turn.view["step"]
        names = [f"{side}_{kind}" for side in turn.stale for kind in ("factor", "basis")]
        if names and step > 0:
            names.insert(2 if "left" in turn.stale else 0, "exp_avg")
            if self._spreads(step):
                names.append("exp_avg_sq")
        return [view[name] for name in names]

    def _raise(self, turns: Sequence[RefreshItem], pieces: ShardedRefresh[RefreshItem]) -> None:
        """Raise V to where ``M̂² <= V̂``, after bases have turned that it did not follow.

        The momentum turns into directions that had none, where Adam's ratio
        would have no bound. Where the only turn of a view broke off, nothing is raised.
        """
        broken = {t: pieces.interrupted(t) if len(t.stale) == 1 else 0.0 for t in turns}
        turned = [turn for turn, flag in broken.items() if isinstance(flag, Tensor) or not flag]
        for same in grouped(turned, lambda turn: id(turn.batch)):
            batch = same[0].batch.part([turn.place for turn in same])
            step = batch.number("step")
            if step == 0 or self._spreads(step):
                continue
            beta1, beta2 = batch.group["betas"]
            ratio = (1 - beta2**step) / (1 - beta1**step) ** 2
            first, second = batch.read("exp_avg"), batch.read("exp_avg_sq")
            lowest = self.workspace.take("lowest", first.shape, first)
            torch.mul(first, first, out=lowest).mul_(ratio)
            flags = [broken[turn] for turn in same]
            if any(isinstance(flag, Tensor) for flag in flags):  # not known to the host
                usable = torch.stack([first.new_ones(()) * (flag == 0) for flag in flags])
                lowest.mul_(usable.repeat_interleave(batch.tiling.tiles)[:, None, None])
            batch.write("exp_avg_sq", torch.maximum(second, lowest, out=second))
            batch.write("mean_sq", second.mean((1, 2), keepdim=True))

    def _turn(
        self, batch: Batch, side: str, pieces: ShardedRefresh[RefreshItem]
    ) -> tuple[Tensor, Tensor | None]:
        """Turn one side of a batch, which changes all or, where it raises, nothing.

        Returns:
            The rotation, and the off-diagonal energies before it, past the
            first interval.
        """
        step, interval = batch.number("step"), self.config.basis_interval
        factor = batch.read(f"{side}_factor").to(batch.views[0]["exp_avg"].dtype)
        moments: dict[str, Tensor] = {}
        energies = None
        if step == 0:
            basis, factor = eigenbasis.eigenbasis(
                factor, lambda retry: pieces.count(f"basis_{retry}")
            )
            rotation = basis
        else:
            sweeps = 2 if step < interval else 1
            factor = eigenbasis.mirrored(factor, self.workspace)
            if step >= interval:
                energies = eigenbasis.off_diagonal_energy(factor, self.workspace, whole=True)
            rotation, factor = eigenbasis.refresh(factor, sweeps, self.workspace, whole=True)
            held = batch.read(f"{side}_basis")
            basis = eigenbasis.rotate("right", rotation, held, self.workspace, "turned basis")
            for view, part in zip(batch.views, basis.split(batch.tiling.tiles), strict=True):
                if self.schedule.orthogonalizes(view, side):
                    part.copy_(eigenbasis.orthonormal(part))
            moments = self._transported(batch, side, rotation)
        found = {f"{side}_factor": factor, f"{side}_basis": basis} | moments
        for name, value in found.items():
            batch.write(name, value)
        pieces.count("basis_refreshes", len(batch.views))
        return rotation, energies

    def _transported(self, batch: Batch, side: str, rotation: Tensor) -> dict[str, Tensor]:
        """The moments in the new basis: ``Pᵀ M``, and V by overlap where it does not stay.

        While the factors are young their null spaces turn freely, and V always
        follows by overlap.
        """
        moments = {"exp_avg": eigenbasis.rotate(side, rotation, batch.read("exp_avg"), self.workspace)}
        if self._spreads(batch.number("step")):
            share = eigenbasis.overlap(rotation)
            second = batch.read("exp_avg_sq")
            moments["exp_avg_sq"] = eigenbasis.rotate(side, share, second, self.workspace, "turned second")
        return moments

    def _spreads(self, step: int) -> bool:
        """Whether V follows a basis by overlap."""
        return self.config.transport == "overlap" or step < self.config.basis_interval

    def _count(self, name: str, by: int | Tensor) -> None:
        if isinstance(by, Tensor) or by:
            self.counters[name] = self.counters.get(name, 0) + by


def name_of(view: ParamView, side: str) -> str:
    """A view's name in messages."""
    name = view.matrix.name if view.matrix else f"weight {tuple(view.param.shape)}"
    return f"{name} ({side} side)"
