"""On which step of an interval each basis of AdamR turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_precond.optimizers.adamr.tiling import Tiling
from hf_precond.optimizers.base.parameters import ParamView

CLEAN_EVERY = 8
"""Refreshes of a basis between two corrections of its orthogonality."""
PHASES = 4096
"""Steps of an interval that turns are spread over, so that an endless one has no endless lists."""


@dataclass(frozen=True, eq=False)
class Due:
    """One basis of a leaf at the step of its turn.

    Args:
        leaf: the leaf.
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

    Kept in a leaf's state, for each rotated side: ``left_phase``, the step of
    an interval on which it turns; ``left_clean``, the interval of
    :data:`CLEAN_EVERY` in which it is made orthogonal again; ``left_turned``,
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
            new: leaves at their first call, with the plan of each.
            present: those that have their steps.
        """
        loads = [0.0] * min(self.interval, PHASES)
        cleans = [[0.0] * CLEAN_EVERY for _ in loads]
        for view, plan in present:
            for side, cost in plan.turn_cost.items():
                # A new leaf's steps begin to count one call from now.
                place = (view[f"{side}_phase"] - view["step"] - 1) % self.interval
                if place < len(loads):
                    loads[place] += cost
                    cleans[place][view[f"{side}_clean"]] += cost
        costs = [(cost, view, s) for view, plan in new for s, cost in plan.turn_cost.items()]
        for cost, view, side in sorted(costs, key=lambda found: -found[0]):
            phase = min(range(len(loads)), key=loads.__getitem__)
            clean = min(range(CLEAN_EVERY), key=cleans[phase].__getitem__)
            loads[phase] += cost
            cleans[phase][clean] += cost
            view[f"{side}_phase"], view[f"{side}_clean"] = phase, clean
            view[f"{side}_turned"] = 0

    def is_clean(self, view: ParamView, side: str) -> bool:
        """Whether a basis that turns at this step is made orthogonal again."""
        clean: int = view[f"{side}_clean"]
        return view["step"] // self.interval % CLEAN_EVERY == clean

    def due(self, planned: Sequence[tuple[ParamView, Tiling]]) -> list[Due]:
        """The bases whose step of the interval it is, of leaves past their first interval."""
        found = []
        for view, plan in planned:
            place = view["step"] % self.interval
            if view["step"] >= self.interval:
                sides = [side for side in plan.sides if place == view[f"{side}_phase"]]
                found += [Due(view, side, plan.turn_cost[side]) for side in sides]
        return found

    def average(self, planned: Sequence[tuple[ParamView, Tiling]]) -> float:
        """Cost of an average step: all bases but those that did not turn for two intervals."""
        total = 0.0
        for view, plan in planned:
            oldest = view["step"] - 2 * self.interval
            for side, cost in plan.turn_cost.items():
                total += cost if view[f"{side}_turned"] > oldest else 0.0
        return total / self.interval

    def put_off(self, stale: Sequence[Due], average: float) -> list[Due]:
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
        turning: list[Due] = []
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
