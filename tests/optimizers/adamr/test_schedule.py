"""The steps on which AdamR's bases are refreshed: even loads, and no basis waits for long."""

from itertools import pairwise

import pytest
import torch

from hf_precond.compat import devices
from hf_precond.optimizers.adamr.refresh import UNSCHEDULED, Basis, RefreshSchedule
from hf_precond.optimizers.adamr.tiling import Tiling
from hf_precond.optimizers.base.parameters import ParamView

SQUARE = Tiling(1, 8, 8, "rows", True, True)
LONG = Tiling(1, 32, 8, "rows", False, True)


def bases_of(*tilings):
    """The bases of views without values: all that a schedule reads is their counters."""
    nothing, bases = torch.empty(0), []
    for tiling in tilings:
        view = ParamView(nothing, nothing, {"step": 0}, "", {})
        for side, cost in tiling.refresh_cost.items():
            bases.append(Basis(view, side, cost))
            bases[-1]["phase"], bases[-1]["refreshed"] = UNSCHEDULED, 0
    return bases


def simulate(schedule, bases, steps, needs_refresh):
    """The cost of each step past the first interval, and the steps that refresh each basis."""
    loads, refreshed = [], {}
    for step in range(steps):
        for basis in bases:
            basis.view["step"] = step
        poor = [basis for basis in schedule.due(bases) if needs_refresh(basis, step)]
        selected = schedule.select(poor, schedule.average(bases))
        for basis in selected:
            refreshed.setdefault(basis, []).append(step)
        loads.append(sum(basis.cost for basis in selected))
    return loads[schedule.interval :], refreshed


def test_equal_costs_are_spread_evenly_and_stay():
    schedule, bases = RefreshSchedule(4), bases_of(*[SQUARE] * 8)
    schedule.spread(bases)
    loads, refreshed = simulate(schedule, bases, 60, lambda basis, step: True)
    assert set(loads) == {4 * SQUARE.refresh_cost["left"]}
    for steps in refreshed.values():
        assert {late - early for early, late in pairwise(steps)} == {4}


def test_steps_are_even_again_where_costly_bases_stay_as_they_are():
    schedule, bases = RefreshSchedule(3), bases_of(LONG, LONG, *[SQUARE] * 4)
    schedule.spread(bases)
    unit = SQUARE.refresh_cost["left"]

    def square(basis, step):
        return basis.cost == unit

    loads, refreshed = simulate(schedule, bases, 90, square)
    assert max(loads[:9]) > 3 * unit  # four of the eight bases began on the step without a LONG one
    assert max(loads[12:]) <= 3 * unit and min(loads[12:]) >= 2 * unit
    for steps in refreshed.values():
        gaps = [late - early for early, late in pairwise(steps)]
        assert max(gaps) <= 5 and gaps[-20:] == [3] * 20


def test_bases_that_come_and_go_keep_every_step_near_the_average():
    schedule, bases = RefreshSchedule(5), bases_of(*[SQUARE] * 20)
    schedule.spread(bases)
    generator = torch.Generator().manual_seed(0)
    loads, refreshed = simulate(
        schedule, bases, 400, lambda basis, step: torch.rand((), generator=generator) < 0.7
    )
    unit = SQUARE.refresh_cost["left"]
    assert max(loads) <= 8 * unit + unit / 2  # 40 bases in 5 steps
    for steps in refreshed.values():
        assert len(steps) > 0.6 * 0.7 * 400 / 5


@pytest.mark.parametrize(("interval", "count"), [(3, 2), (3, 5), (10, 7), (10, 12), (4, 9)])
def test_equal_bases_keep_their_interval_however_they_divide(interval, count):
    schedule, bases = RefreshSchedule(interval), bases_of(*[SQUARE] * count)
    schedule.spread(bases)
    loads, refreshed = simulate(schedule, bases, 12 * interval, lambda basis, step: True)
    assert max(loads) - min(loads) <= SQUARE.refresh_cost["left"]
    for steps in refreshed.values():
        assert {late - early for early, late in pairwise(steps)} == {interval}


def test_a_young_view_keeps_no_older_one_from_its_refresh():
    """Each view counts its own steps: what matters is how long a basis has waited."""
    schedule, bases = RefreshSchedule(3), bases_of(LONG, SQUARE, SQUARE)
    schedule.spread(bases)
    refreshed = {}
    for step in range(240):
        for number, basis in enumerate(bases):
            basis.view["step"] = step + (1000 if number == 0 else 0)
        for basis in schedule.select(schedule.due(bases), schedule.average(bases)):
            refreshed[basis] = refreshed.get(basis, 0) + 1
    assert all(count >= 240 / 4 for count in refreshed.values()) and len(refreshed) == 5


def test_new_views_take_the_steps_that_others_leave_free():
    schedule, bases = RefreshSchedule(4), bases_of(SQUARE)
    schedule.spread(bases)
    for phase, basis in enumerate(bases):
        basis["phase"] = phase
    # The first call of a new view, whose steps count from the next.
    bases[0].view["step"] = 4 * 9 + 3
    late = bases_of(SQUARE)
    schedule.spread([*bases, *late])
    assert {basis["phase"] for basis in late} == {2, 3}


def test_those_that_have_waited_longest_come_first():
    schedule, bases = RefreshSchedule(3), bases_of(SQUARE, SQUARE)
    schedule.spread(bases)
    for number, basis in enumerate(bases):
        basis.view["step"] = 30
        basis["phase"], basis["refreshed"] = 0, 28 - number
    assert schedule.select(bases, average=2 * bases[0].cost) == [bases[3], bases[2]]
    assert [basis["phase"] for basis in bases] == [1, 1, 0, 0]
    assert [basis["refreshed"] for basis in bases] == [28, 27, 30, 30]


@pytest.mark.parametrize("interval", [1, 2, 7])
def test_a_lone_matrix_is_never_postponed(interval):
    schedule, bases = RefreshSchedule(interval), bases_of(SQUARE)
    schedule.spread(bases)
    _, refreshed = simulate(schedule, bases, 70, lambda basis, step: True)
    for steps in refreshed.values():
        assert len(steps) == len(range(interval, 70, interval))


def test_an_interval_of_one_refreshes_everything_at_every_step():
    schedule, bases = RefreshSchedule(1), bases_of(LONG, SQUARE, SQUARE)
    schedule.spread(bases)
    # All were good for long, so that an average step refreshes nothing.
    _, refreshed = simulate(schedule, bases, 40, lambda basis, step: step > 30)
    assert all(steps == list(range(31, 40)) for steps in refreshed.values())
    assert len(refreshed) == 5


def test_an_endless_interval_costs_nothing_at_its_start():
    """``basis_interval=10**9``: the bases of the first steps for good."""
    schedule, bases = RefreshSchedule(10**9), bases_of(*[SQUARE] * 8, LONG)
    schedule.spread(bases[:12])
    assert sorted(basis["phase"] for basis in bases[:12]) == list(range(12))
    schedule.spread(bases)
    assert max(basis["phase"] for basis in bases) < 20


def test_an_accelerator_refreshes_all_at_one_step(monkeypatch):
    monkeypatch.setattr(devices, "is_accelerator", lambda tensor: True)
    schedule, bases = RefreshSchedule(3), bases_of(LONG, *[SQUARE] * 4)
    schedule.spread(bases)
    _, refreshed = simulate(schedule, bases, 30, lambda basis, step: True)
    assert len(refreshed) == len(bases)
    assert {tuple(steps) for steps in refreshed.values()} == {tuple(range(3, 30, 3))}
