"""When and how the bases of AdamR are refreshed, and what follows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.linalg import eigenbasis
from hf_precond.linalg.banded import banded, symmetric
from hf_precond.linalg.factorization import RETRIES
from hf_precond.optimizers.adamr.batch import Batch, stacked
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.tiling import SIDES, Side
from hf_precond.optimizers.base.parameters import ParamView, grouped, states
from hf_precond.optimizers.base.refresh import FailureRecord, ShardedRefresh

Count = Callable[[str, int | Tensor], None]

COUNTERS = ("basis_refreshes", *(f"basis_{retry}" for retry in RETRIES))
ORTHOGONALIZE_EVERY = 8
"""Refreshes of a basis between two corrections of its orthogonality."""
PHASES = 4096
"""Most steps of an interval that refreshes are spread over."""
PORTION = 3 << 25
"""Entries of the factors that are refreshed together on a GPU, 384 MiB: all of BERT-base's."""
UNSCHEDULED = -1
"""Phase of a basis that has none yet."""


@dataclass(frozen=True, eq=False)
class Basis:
    """One basis of a view.

    Its own state stands in the view's, each name behind the side: ``left_phase``, the step of an
    interval on which it is due; ``left_refreshed``, Adam's step at its last refresh;
    ``left_energy``, the off-diagonal energy of its factor when it was last due.

    Args:
        view: the view.
        side: ``left`` or ``right``.
        cost: of its refresh, any unit.
        name: the matrix's, for messages.
    """

    view: ParamView
    side: Side
    cost: float
    name: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.view[f"{self.side}_{name}"]

    def __setitem__(self, name: str, value: Any) -> None:
        self.view[f"{self.side}_{name}"] = value

    @property
    def waited(self) -> int:
        """Steps since its last refresh."""
        waited: int = self.view["step"] - self["refreshed"]
        return waited


def values(bases: Sequence[Basis], name: str) -> list[Any]:
    """State of one name of every basis.

    Args:
        bases: the bases.
        name: of the state, without the side.
    """
    return [basis.view.state[f"{basis.view.prefix}{basis.side}_{name}"] for basis in bases]


class RefreshSchedule:
    """Spreads the refreshes of bases over the steps of an interval, so that all cost the same.

    The phases are spread by cost at the first step. Bases that are left as they are make their
    steps cheap, and the others too costly by comparison; a step that has more to refresh than an
    average one therefore postpones some to the next. On an accelerator, which is busier with the
    launches of a refresh than with its matrices, all bases are refreshed at one step.

    Args:
        interval: steps between two refreshes of a basis, >= 1.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def spread(self, bases: Sequence[Basis]) -> None:
        """Give a phase to every basis that has none, the costliest first.

        Of bases of one cost, neighbours get the same phase: what lies together is refreshed
        together, without a copy.

        Args:
            bases: all of the views that take this step.
        """
        phases = values(bases, "phase")
        new = [b for b, phase in zip(bases, phases, strict=True) if phase == UNSCHEDULED]
        if not new:
            return
        loads = [0.0] * (1 if _on_accelerator(bases) else min(self.interval, PHASES))
        for basis in bases:
            # The steps of a new view are counted from the next one.
            phase = (basis["phase"] - basis.view["step"] - 1) % self.interval
            if basis["phase"] != UNSCHEDULED and phase < len(loads):
                loads[phase] += basis.cost
        for alike in grouped(sorted(new, key=lambda b: -b.cost), lambda basis: basis.cost):
            phases = []
            for basis in alike:
                phases.append(min(range(len(loads)), key=loads.__getitem__))
                loads[phases[-1]] += basis.cost
            alike.sort(key=lambda basis: SIDES.index(basis.side))
            for basis, phase in zip(alike, sorted(phases), strict=True):
                basis["phase"] = phase

    def due(self, bases: Sequence[Basis]) -> list[Basis]:
        """The bases on their step of the interval, of views past the first interval.

        Args:
            bases: all of the views that take this step.
        """
        steps = states([basis.view for basis in bases], "step")
        return [
            basis
            for basis, step, phase in zip(bases, steps, values(bases, "phase"), strict=True)
            if step >= self.interval and step % self.interval == phase
        ]

    def average(self, bases: Sequence[Basis]) -> float:
        """The cost of an average step: all bases but those without a refresh for two intervals.

        Args:
            bases: all of the views that take this step.
        """
        steps = states([basis.view for basis in bases], "step")
        recent = [
            basis.cost
            for basis, step, last in zip(bases, steps, values(bases, "refreshed"), strict=True)
            if step - last < 2 * self.interval
        ]
        return sum(recent) / self.interval

    def select(self, due: Sequence[Basis], average: float) -> list[Basis]:
        """Choose the refreshes of this step; postpone the others to the next one.

        Those that have waited longest come first, one of them at least. A basis of cost c is
        refreshed while the load before it is at most ``average - c / interval``: were that
        exceeded at each of ``interval`` steps, the others would cost more than all together do, so
        none waits for long. With an ``interval`` of 1, and on accelerators, all are refreshed.

        Args:
            due: the bases that need a refresh at this step.
            average: see :meth:`average`.

        Returns:
            Those that are refreshed at this step.
        """
        selected: list[Basis] = []
        load, rounding = 0.0, 1e-9 * average
        every = self.interval == 1 or _on_accelerator(due)
        for basis in sorted(due, key=lambda basis: basis.waited, reverse=True):
            room = average - basis.cost / self.interval + rounding
            if every or not selected or load <= room:
                selected.append(basis)
                load += basis.cost
                basis["refreshed"] = basis.view["step"]
            else:
                basis["phase"] = (basis["phase"] + 1) % self.interval
        return selected


def _on_accelerator(bases: Sequence[Basis]) -> bool:
    return bool(bases) and devices.is_accelerator(bases[0].view.param)


@dataclass(frozen=True, eq=False)
class RefreshItem:
    """A view with bases that are due.

    Args:
        batch: the batch in which the view takes its step.
        index: its index there.
        number: its number among all views that take this step.
        measured: the sides whose off-diagonal energy is measured.
        refreshed: the sides that are refreshed.
    """

    batch: Batch
    index: int
    number: int
    measured: Sequence[Side]
    refreshed: Sequence[Side]

    @cached_property
    def view(self) -> ParamView:
        """The view."""
        return self.batch.views[self.index]

    @property
    def elements(self) -> int:
        """Entries of its factors."""
        tiling = self.batch.tiling
        sizes = {"left": tiling.rows, "right": tiling.columns}
        sides = {*self.measured, *self.refreshed}
        return tiling.tiles * sum([sizes[side] ** 2 for side in sides])

    @property
    def cost(self) -> float:
        """Of its refreshes, in multiplications; to measure a basis takes a look at its factor."""
        cost = self.batch.tiling.refresh_cost
        measuring = 10.0 * self.view.param.numel() * len(self.measured)
        return sum([cost[side] for side in self.refreshed]) + measuring


@dataclass(frozen=True, eq=False)
class Turn:
    """One side of a view whose basis is measured, or refreshed, or both.

    Args:
        item: the view.
        side: the side.
    """

    item: RefreshItem
    side: Side

    def __getitem__(self, name: str) -> Any:
        return self.item.view[f"{self.side}_{name}"]

    @property
    def measured(self) -> bool:
        """Whether its off-diagonal energy is measured."""
        return self.side in self.item.measured

    @property
    def refreshed(self) -> bool:
        """Whether it is refreshed."""
        return self.side in self.item.refreshed

    @property
    def size(self) -> int:
        """Rows of the basis."""
        tiling = self.item.batch.tiling
        return tiling.rows if self.side == "left" else tiling.columns

    @property
    def tiles(self) -> int:
        """Bases of the view on this side."""
        return self.item.batch.tiling.tiles

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is equal where bases are refreshed together, whatever matrices they belong to."""
        factor, batch = self["factor"], self.item.batch
        return self.size, self.tiles, factor.dtype, factor.device, batch.dtype, is_new(batch)


class NewBases(NamedTuple):
    """What a refresh makes of bases of one size.

    Args:
        rotation: P with ``Q' = Q P``, ``[b, n, n]``; Q' itself where there was no basis before.
        factor: the factor in the coordinates of Q', as it is kept.
        change: of :func:`~hf_precond.linalg.eigenbasis.change_of`.
    """

    rotation: Tensor
    factor: Tensor
    change: Tensor | None = None


class BasisRefresh:
    """Refreshes the bases that are due.

    The first basis, at Adam's step 0, is an eigendecomposition; from then on
    :func:`hf_precond.linalg.eigenbasis.refresh` follows the eigenvectors. Below ``basis_interval``
    a left basis is refreshed at steps 1, 4, 16, … and a right one at steps 2, 8, 32, …, then each
    once an interval, spread as :class:`RefreshSchedule` says. A basis is left as it is
    where the off-diagonal energy that was measured an interval earlier is below
    ``basis_tolerance``.

    The momentum follows exactly, and so does a gradient that is held; the second moment as
    ``transport`` says.

    Args:
        config: AdamR's fields.
        failures: the optimizer's record.
        count: the optimizer's counter.
    """

    def __init__(self, config: AdamRConfig, failures: FailureRecord, count: Count) -> None:
        self.config = config
        self.failures = failures
        self.count = count
        self.schedule = RefreshSchedule(config.basis_interval)
        self._known: tuple[list[ParamView], list[Basis]] = [], []  # of the last step

    def __getstate__(self) -> dict[str, Any]:
        """A copy of an optimizer has its own views."""
        return self.__dict__ | {"_known": ([], [])}

    # Which bases ------------------------------------------------------------------

    def due(self, batches: Sequence[Batch]) -> list[RefreshItem]:
        """The views with bases that are due at this step, of all that take it.

        Args:
            batches: the views.

        Raises:
            RuntimeError: a factor was not finite at too many refreshes in a row.
        """
        bases = self._bases(batches)
        self.schedule.spread(bases)
        selected = self._select(bases)
        chosen = {view for view, _ in selected}
        items, number = [], -1
        for batch in batches:
            step, sides = batch.number("step"), batch.tiling.sides
            first = step < self.config.basis_interval
            early: Sequence[Side] = [side for side in sides if first and is_early(side, step)]
            for index, view in enumerate(batch.views):
                number += 1
                if not early and view not in chosen:
                    continue
                measured = [side for side in sides if (view, side) in selected]
                refreshed = [side for side in measured if selected[view, side]]
                refreshed = list(early) if first else refreshed
                if measured or refreshed:
                    items.append(RefreshItem(batch, index, number, measured, refreshed))
        return items

    def _bases(self, batches: Sequence[Batch]) -> list[Basis]:
        """The bases of all views, made anew where these are not those of the last step."""
        views = [view for batch in batches for view in batch.views]
        known, bases = self._known
        if list(map(id, views)) != list(map(id, known)):
            costs = [batch.tiling.refresh_cost for batch in batches for _ in batch.views]
            bases = [
                Basis(view, side, cost, name_of(view, number))
                for number, (view, sides) in enumerate(zip(views, costs, strict=True))
                for side, cost in sides.items()
            ]
            self._known = views, bases
        return bases

    def _select(self, bases: Sequence[Basis]) -> dict[tuple[ParamView, Side], bool]:
        """The due bases, less those that are postponed; whether each is refreshed."""
        due = self.schedule.due(bases)
        energies = {basis: self._energy(basis) for basis in due}
        good = [basis for basis in due if energies[basis] < self.config.basis_tolerance]
        poor = [basis for basis in due if basis not in good]
        self.count("basis_skipped", len(good))
        refreshed = self.schedule.select(poor, self.schedule.average(bases)) if poor else []
        for basis in (*good, *refreshed):
            failed = math.isnan(energies[basis])
            self.count("basis_kept", int(failed))
            self.failures.note("factor", f"{basis.name} ({basis.side} side)", failed)
        return {(b.view, b.side): b in refreshed for b in (*good, *refreshed)}

    def _energy(self, basis: Basis) -> float:
        """The off-diagonal energy measured last; NaN where the factor was not finite."""
        param = basis.view.param
        if devices.is_accelerator(param) and math.isnan(basis["energy"]):
            devices.wait(param.device)  # perhaps it is still being copied
        return float(basis["energy"])

    # How ----------------------------------------------------------------------------

    def refresh(self, items: Sequence[RefreshItem]) -> None:
        """Refresh the bases that are due, every rank its share of them.

        Args:
            items: see :meth:`due`.

        Raises:
            RuntimeError: refreshes of a view were interrupted too many times in a row.
        """
        if not items:
            return
        device = items[0].view.param.device
        costs = [item.cost for item in items]
        sharded = ShardedRefresh(items, costs, device, COUNTERS, numbers=len(SIDES))
        done: set[tuple[int, Side]] = set()
        for portion in _portions(sharded.mine()):
            sharded.attempt(partial(self._refresh, sharded, done), portion)
        sharded.share(self._results)
        self._raise_second_moments(sharded)
        _set_energies(sharded)
        sharded.report(self.failures, lambda item: name_of(item.view, item.number), self.count)

    def _refresh(
        self,
        sharded: ShardedRefresh[RefreshItem],
        done: set[tuple[int, Side]],
        items: Sequence[RefreshItem],
    ) -> None:
        """Measure and refresh the bases of some views, but those that are done already."""
        turns = [
            Turn(item, side)
            for side in SIDES
            for item in items
            if side in (*item.measured, *item.refreshed) and (id(item), side) not in done
        ]
        for alike in grouped(turns, lambda turn: turn.kind):
            alike.sort(key=lambda turn: not turn.refreshed)
            size, dtype = alike[0].size, alike[0].item.batch.dtype
            factor = symmetric(stacked([turn["factor"] for turn in alike]), size).to(dtype)
            self._measure(sharded, alike, factor)
            refreshed = [turn for turn in alike if turn.refreshed]
            if refreshed:
                count = len(refreshed) * alike[0].tiles
                runs = self._rotations(sharded, refreshed, factor[:count])
                del factor  # while they run, this is the memory of another one
                for run, new in runs:
                    self._turn(run, new)
                    sharded.count("basis_refreshes", len(run))
                    done |= {(id(turn.item), turn.side) for turn in run}

    def _rotations(
        self, sharded: ShardedRefresh[RefreshItem], turns: Sequence[Turn], factor: Tensor
    ) -> Iterator[tuple[Sequence[Turn], NewBases]]:
        """New bases of one size, for the turns of each batch."""
        precision = self.config.precision
        if is_new(turns[0].item.batch):
            basis, factor = eigenbasis.eigenbasis(factor, lambda r: sharded.count(f"basis_{r}"))
            new = NewBases(basis, banded(factor))
        else:
            rotation = eigenbasis.pair_rotation(factor, precision)
            factor = eigenbasis.turned(factor, rotation, precision)
            new = NewBases(rotation, factor, eigenbasis.change_of(rotation, precision))
        start, tiles = 0, turns[0].tiles
        for run in grouped(turns, lambda turn: (id(turn.item.batch), turn.side)):
            here = slice(start, start + len(run) * tiles)
            change = None if new.change is None else new.change[here]
            yield run, NewBases(new.rotation[here], new.factor[here], change)
            start = here.stop

    def _turn(self, turns: Sequence[Turn], new: NewBases) -> None:
        """Turn one side of views of one batch; nothing changes where that raises."""
        items, side = [turn.item for turn in turns], turns[0].side
        whole, batch = items[0].batch, _part(items)
        results = {f"{side}_basis": new.rotation, f"{side}_factor": new.factor}
        if not is_new(batch):
            results[f"{side}_basis"] = self._turned_basis(turns, batch[f"{side}_basis"], new)
            results |= self._transported(batch, side, new.rotation, new.change)
            if whole.rotated_gradient is not None:
                parts = whole.rotated_gradient.split(whole.tiling.tiles)
                chosen = [parts[item.index] for item in items]
                moved = eigenbasis.rotate(side, new.rotation, stacked(chosen), new.change)
                if batch is whole:
                    whole.rotated_gradient = moved
                else:
                    torch._foreach_copy_(chosen, list(moved.split(whole.tiling.tiles)))
        for name, value in results.items():
            batch.write(name, value)

    def _turned_basis(self, turns: Sequence[Turn], basis: Tensor, new: NewBases) -> Tensor:
        """``Q P``; some by turns are corrected for what rounding does to orthogonality."""
        basis = eigenbasis.rotate("right", new.rotation, basis, new.change, True)
        interval = self.config.basis_interval
        astray = [
            part
            for turn, part in zip(turns, basis.split(turns[0].tiles), strict=True)
            if (turn.item.view["step"] // interval + turn.item.number) % ORTHOGONALIZE_EVERY == 0
        ]
        if astray:
            corrected = eigenbasis.orthonormal(stacked(astray))
            torch._foreach_copy_(astray, list(corrected.split(turns[0].tiles)))
        return basis

    def _transported(
        self, batch: Batch, side: Side, rotation: Tensor, change: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The moments in the new basis: ``Pᵀ M``, and V where it follows by overlap.

        In the first interval the null spaces of the factors rotate freely, and V always follows.
        """
        moments = {"exp_avg": eigenbasis.rotate(side, rotation, batch["exp_avg"], change)}
        if self._spreads(batch.number("step")):
            share = eigenbasis.overlap(rotation)
            moments["exp_avg_sq"] = eigenbasis.rotate(side, share, batch["exp_avg_sq"])
        return moments

    def _spreads(self, step: int) -> bool:
        """Whether V follows a basis by overlap."""
        return self.config.transport == "overlap" or step < self.config.basis_interval

    def _measure(
        self, sharded: ShardedRefresh[RefreshItem], turns: Sequence[Turn], factor: Tensor
    ) -> None:
        """Note the off-diagonal energies of factors of one size."""
        if not any(turn.measured for turn in turns):
            return
        energies = eigenbasis.off_diagonal_energy(factor).view(len(turns), -1).amax(1)
        energies = energies.to(devices.widest(factor.device))
        for turn, energy in zip(turns, energies.split(1), strict=True):
            if turn.measured:
                sharded.put(SIDES.index(turn.side), [turn.item], energy)

    def _results(self, item: RefreshItem) -> list[Tensor]:
        """What the refreshes of a view have changed."""
        names = [f"{side}_{kind}" for side in item.refreshed for kind in ("factor", "basis")]
        if item.refreshed and item.view["step"] > 0:
            names.append("exp_avg")
            if self._spreads(item.view["step"]):
                names.append("exp_avg_sq")
        return [item.view[name] for name in names]

    def _raise_second_moments(self, sharded: ShardedRefresh[RefreshItem]) -> None:
        """Raise V to where ``M̂² <= V̂``, after refreshes of bases that it did not follow.

        The momentum is rotated into directions that had none, where Adam's ratio would have no
        bound. V stays where the host knows that a view's only refresh was interrupted.
        """
        raised = []
        for item in sharded.items:
            step, interrupted = item.view["step"], sharded.interrupted(item)
            known = not isinstance(interrupted, Tensor) and interrupted > 0
            kept = not item.refreshed or (known and len(item.refreshed) == 1)
            if step > 0 and not kept and not self._spreads(step):
                raised.append(item)
        for items in grouped(raised, lambda item: id(item.batch)):
            batch = _part(items)
            step, (beta1, beta2) = batch.number("step"), batch.group["betas"]
            first, ratio = batch["exp_avg"], (1 - beta2**step) / (1 - beta1**step) ** 2
            lowest = torch.addcmul(first.new_zeros(()), first, first, value=ratio)
            second = batch["exp_avg_sq"]
            torch.maximum(second, lowest, out=second)
            batch.write("exp_avg_sq", second)
            batch.write("mean_sq", second.mean((1, 2), keepdim=True))


def is_early(side: Side, step: int) -> bool:
    """Whether a basis is refreshed at a step of the first interval.

    At every power of two one side is, so that no step has all of them to refresh.

    Args:
        side: the side.
        step: Adam's step, from 0.
    """
    if step & (step - 1):
        return False
    return step == 0 or step.bit_length() % 2 == (side == "left")


def is_new(batch: Batch) -> bool:
    """Whether Adam has taken no step with the views of a batch, which have no bases yet."""
    return batch.number("step") == 0


def _part(items: Sequence[RefreshItem]) -> Batch:
    """The views of items of one batch."""
    return items[0].batch.part([item.index for item in items])


def _portions(items: Sequence[RefreshItem]) -> Iterator[list[RefreshItem]]:
    """Items that are refreshed together: on a CPU of a batch, on accelerators of many."""
    if items and not devices.is_accelerator(items[0].view.param):
        yield from grouped(items, lambda item: id(item.batch))
        return
    portion: list[RefreshItem] = []
    elements = 0
    for item in items:
        if portion and elements + item.elements > PORTION:
            yield portion
            portion, elements = [], 0
        portion.append(item)
        elements += item.elements
    if portion:
        yield portion


def _set_energies(sharded: ShardedRefresh[RefreshItem]) -> None:
    """Keep energies on the host, which reads them an interval later; a GPU is not waited for."""
    sent: dict[torch.device, list[tuple[ParamView, str, Tensor]]] = {}
    for item in sharded.items:
        for side in item.measured:
            name, energy = f"{side}_energy", sharded.number(SIDES.index(side), item)
            if isinstance(energy, Tensor) and devices.has_streams(energy.device):
                sent.setdefault(energy.device, []).append((item.view, name, energy))
            else:
                item.view[name].fill_(float(energy))
    for places in sent.values():
        energies = torch.stack([energy for *_, energy in places])
        dtype = places[0][0][places[0][1]].dtype
        held = torch.full(energies.shape, math.nan, dtype=dtype, pin_memory=True)
        held.copy_(energies, non_blocking=True)
        for (view, name, _), value in zip(places, held, strict=True):
            view[name] = value


def name_of(view: ParamView, number: int) -> str:
    """The name of a view's matrix in messages.

    Args:
        view: the view.
        number: its number among all views that take this step.
    """
    shape = tuple(view.param.shape)
    return view.matrix.name if view.matrix else f"rotated matrix number {number}, {shape}"
