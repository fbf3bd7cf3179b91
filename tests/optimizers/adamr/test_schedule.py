"""The steps on which AdamR's bases are refreshed: even loads, and no basis waits for long."""

from itertools import pairwise

import pytest
import torch

from hf_precond.optimizers.adamr.refresh import UNSCHEDULED, DueBasis, RefreshSchedule
from hf_precond.optimizers.adamr.tiling import SIDES, Tiling
from hf_precond.optimizers.base.parameters import ParamView

SQUARE = Tiling(1, 8, 8, "rows", True, True)
LONG = Tiling(1, 32, 8, "rows", False, True)
UNKNOWN = {
    f"{side}_{name}": value
    for side in SIDES
    for name, value in (("phase", UNSCHEDULED), ("refreshed", 0))
}


def views(*tilings):
    """Views without values: all that a schedule reads is their counters."""
    nothing = torch.empty(0)
    states = [{"step": 0} | UNKNOWN for _ in tilings]
    made = [ParamView(nothing, nothing, state, "", {}) for state in states]
    return list(zip(made, tilings, strict=True))


def simulate(schedule, tiled, steps, needs_refresh):
    """The cost of each step past the first interval, and the steps that refresh each basis."""
    loads, refreshed = [], {}
    for step in range(steps):
        for view, _ in tiled:
            view["step"] = step
        poor = [due for due in schedule.due(tiled) if needs_refresh(due, step)]
        selected = schedule.select(poor, schedule.average(tiled))
        for due in selected:
            refreshed.setdefault((id(due.view), due.side), []).append(step)
        loads.append(sum(due.cost for due in selected))
    return loads[schedule.interval :], refreshed


def test_equal_costs_are_spread_evenly_and_stay():
    schedule, tiled = RefreshSchedule(4), views(*[SQUARE] * 8)
    schedule.spread(tiled)
    loads, refreshed = simulate(schedule, tiled, 60, lambda due, step: True)
    assert set(loads) == {4 * SQUARE.refresh_cost["left"]}
    for steps in refreshed.values():
        assert {late - early for early, late in pairwise(steps)} == {4}


def test_steps_are_even_again_where_costly_bases_stay_as_they_are():
    schedule, tiled = RefreshSchedule(3), views(LONG, LONG, *[SQUARE] * 4)
    schedule.spread(tiled)
    unit = SQUARE.refresh_cost["left"]

    def square(due, step):
        return due.cost == unit

    loads, refreshed = simulate(schedule, tiled, 90, square)
    assert max(loads[:9]) > 3 * unit  # four of the eight bases began on the step without a LONG one
    assert max(loads[12:]) <= 3 * unit and min(loads[12:]) >= 2 * unit
    for steps in refreshed.values():
        gaps = [late - early for early, late in pairwise(steps)]
        assert max(gaps) <= 5 and gaps[-20:] == [3] * 20


def test_bases_that_come_and_go_keep_every_step_near_the_average():
    schedule, tiled = RefreshSchedule(5), views(*[SQUARE] * 20)
    schedule.spread(tiled)
    generator = torch.Generator().manual_seed(0)
    loads, refreshed = simulate(
        schedule, tiled, 400, lambda due, step: torch.rand((), generator=generator) < 0.7
    )
    unit = SQUARE.refresh_cost["left"]
    assert max(loads) <= 8 * unit + unit / 2  # 40 bases in 5 steps
    for steps in refreshed.values():
        assert len(steps) > 0.6 * 0.7 * 400 / 5


@pytest.mark.parametrize(("interval", "count"), [(3, 2), (3, 5), (10, 7), (10, 12), (4, 9)])
def test_equal_bases_keep_their_interval_however_they_divide(interval, count):
    schedule, tiled = RefreshSchedule(interval), views(*[SQUARE] * count)
    schedule.spread(tiled)
    loads, refreshed = simulate(schedule, tiled, 12 * interval, lambda due, step: True)
    assert max(loads) - min(loads) <= SQUARE.refresh_cost["left"]
    for steps in refreshed.values():
        assert {late - early for early, late in pairwise(steps)} == {interval}


def test_a_young_view_keeps_no_older_one_from_its_refresh():
    """Each view counts its own steps: what matters is how long a basis has waited."""
    schedule, tiled = RefreshSchedule(3), views(LONG, SQUARE, SQUARE)
    schedule.spread(tiled)
    refreshed = {}
    for step in range(240):
        for number, (view, _) in enumerate(tiled):
            view["step"] = step + (1000 if number == 0 else 0)
        for due in schedule.select(schedule.due(tiled), schedule.average(tiled)):
            refreshed[id(due.view), due.side] = refreshed.get((id(due.view), due.side), 0) + 1
    assert all(count >= 240 / 4 for count in refreshed.values()) and len(refreshed) == 5


def test_new_views_take_the_steps_that_others_leave_free():
    schedule, tiled = RefreshSchedule(4), views(SQUARE)
    schedule.spread(tiled)
    for side, phase in (("left", 0), ("right", 1)):
        tiled[0][0][f"{side}_phase"] = phase
    # The first call of a new view, whose steps count from the next.
    tiled[0][0]["step"] = 4 * 9 + 3
    late = views(SQUARE)
    schedule.spread([*tiled, *late])
    assert {late[0][0]["left_phase"], late[0][0]["right_phase"]} == {2, 3}


def test_those_that_have_waited_longest_come_first():
    schedule, tiled = RefreshSchedule(3), views(SQUARE, SQUARE)
    schedule.spread(tiled)
    poor = []
    for number, (view, tiling) in enumerate(tiled):
        view["step"] = 30
        for place, side in enumerate(tiling.sides):
            view[f"{side}_phase"], view[f"{side}_refreshed"] = 0, 28 - 2 * number - place
            poor.append(DueBasis(view, side, 1.0))
    selected = schedule.select(poor, average=2.0)
    assert [(due.view, due.side) for due in selected] == [
        (tiled[1][0], "right"), (tiled[1][0], "left"),
    ]  # fmt: skip
    assert [due.view[f"{due.side}_phase"] for due in poor] == [1, 1, 0, 0]
    assert [due.view[f"{due.side}_refreshed"] for due in selected] == [30, 30]


@pytest.mark.parametrize("interval", [1, 2, 7])
def test_a_lone_matrix_is_never_postpone(interval):
    schedule, tiled = RefreshSchedule(interval), views(SQUARE)
    schedule.spread(tiled)
    _, refreshed = simulate(schedule, tiled, 70, lambda due, step: True)
    for steps in refreshed.values():
        assert len(steps) == len(range(interval, 70, interval))


def test_an_interval_of_one_refreshes_everything_at_every_step():
    schedule, tiled = RefreshSchedule(1), views(LONG, SQUARE, SQUARE)
    schedule.spread(tiled)
    # All were good for long, so that an average step refreshes nothing.
    _, refreshed = simulate(schedule, tiled, 40, lambda due, step: step > 30)
    assert all(steps == list(range(31, 40)) for steps in refreshed.values())
    assert len(refreshed) == 5


def test_an_endless_interval_costs_nothing_at_its_start():
    """``basis_interval=10**9``: the bases of the first steps for good."""
    schedule, tiled = RefreshSchedule(10**9), views(*[SQUARE] * 8, LONG)
    schedule.spread(tiled[:6])
    phases = [view[f"{side}_phase"] for view, tiling in tiled[:6] for side in tiling.sides]
    assert sorted(phases) == list(range(12))
    schedule.spread(tiled)
    assert max(view[f"{side}_phase"] for view, tiling in tiled for side in tiling.sides) < 20
