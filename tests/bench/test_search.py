"""The search on losses with a closed form: brackets, equal numbers of trials, replay."""

import math

import pytest

from hf_precond.bench.search import fewest_trials, key, search

GRID = {"lr": [1e-3, 2e-3, 4e-3], "momentum": [0.8, 0.9], "weight_decay": [0.01, 0.1]}


def bowl(lr, momentum=0.8, weight_decay=0.01):
    """A loss whose fields are tuned apart from each other; logarithms of base 2."""

    def loss(settings):
        total = (math.log2(settings["lr"]) - math.log2(lr)) ** 2
        if "momentum" in settings:
            total += (math.log2(1 - settings["momentum"]) - math.log2(1 - momentum)) ** 2
        if "weight_decay" in settings:
            total += (math.log2(settings["weight_decay"] / weight_decay)) ** 2 / 9
        return total

    return loss


def complete(grid, trials, loss, start=None):
    """Search to the end; the number of rounds in which runs could go side by side too."""
    losses, rounds = {}, 0
    while True:
        found = search(grid, start or {}, trials, losses)
        if not found.wanted:
            return found, rounds
        assert len({key(s) for s in found.wanted} - set(losses)) == len(found.wanted)
        losses |= {key(s): loss(s) for s in found.wanted}
        rounds += 1


@pytest.mark.parametrize("optimum", [2e-3, 2.5e-4, 3.2e-2])
def test_a_grid_is_extended_until_it_brackets(optimum):
    found, _ = complete({"lr": GRID["lr"]}, 9, bowl(optimum))
    assert found.best["lr"] == pytest.approx(optimum) and not found.open_ended
    assert len(found.tried) == 9


@pytest.mark.parametrize("optimum", [(8e-3, 0.95, 0.01), (5e-4, 0.6, 0.1), (2e-3, 0.9, 1.0)])
def test_fields_are_tuned_one_after_the_other(optimum):
    loss = bowl(*optimum)
    found, _ = complete(GRID, 16, loss)
    assert not found.open_ended and len(found.tried) == 16
    assert found.best["lr"] == pytest.approx(optimum[0], rel=0.42)
    assert 1 - found.best["momentum"] == pytest.approx(1 - optimum[1], rel=0.42)
    assert found.best["weight_decay"] == pytest.approx(optimum[2], rel=2.2)
    names = list(GRID)
    changed = []  # the fields of the first settings change in the grid's order
    for (a, _), (b, _) in zip(found.tried, found.tried[1:], strict=False):
        changed += [n for n in names if a[n] != b[n] and n not in changed]
    assert changed == names
    assert loss(found.best) == min(value for _, value in found.tried)


@pytest.mark.parametrize("trials", [5, 6, 7, 9, 12])
@pytest.mark.parametrize("optimum", [1e-6, 2e-3, 10.0])
def test_every_search_makes_the_same_number_of_trials(trials, optimum):
    found, _ = complete(GRID, trials, bowl(optimum))
    assert len({key(s) for s, _ in found.tried}) == len(found.tried) == trials


def test_later_fields_keep_their_trials_and_what_is_not_bracketed_is_said():
    found, _ = complete(GRID, 6, bowl(10.0))
    assert "lr" in found.open_ended
    assert {s["momentum"] for s, _ in found.tried} >= {0.8, 0.9}
    assert {s["weight_decay"] for s, _ in found.tried} >= {0.01, 0.1}


def test_momentum_is_extended_by_its_distance_from_one():
    found, _ = complete({"momentum": [0.8, 0.9]}, 4, lambda s: abs(s["momentum"] - 0.975))
    assert [s["momentum"] for s, _ in found.tried] == pytest.approx([0.8, 0.9, 0.95, 0.975])
    found, _ = complete({"momentum": [0.8, 0.9]}, 6, lambda s: s["momentum"])
    assert found.best["momentum"] == 0 and not found.open_ended  # nothing lies below


def test_words_and_zero_are_not_extended():
    grid = {"variant": ["muon", "normuon"], "weight_decay": [0.0, 0.1]}
    found, _ = complete(grid, 3, lambda s: (s["variant"] == "muon") + s["weight_decay"])
    assert found.best == {"variant": "normuon", "weight_decay": 0.0}
    assert not found.open_ended


def test_whole_numbers_stay_whole():
    found, _ = complete({"basis_interval": [5, 10]}, 5, lambda s: s["basis_interval"])
    assert all(isinstance(s["basis_interval"], int) for s, _ in found.tried)
    assert found.best == {"basis_interval": 1}


def test_runs_that_diverge_lose():
    def loss(settings):
        return math.nan if settings["lr"] > 2e-3 else -settings["lr"]

    found, _ = complete({"lr": GRID["lr"]}, 3, loss)
    assert found.best["lr"] == 2e-3 and found.tried[2][1] == math.inf


def test_a_search_is_a_function_of_the_losses():
    loss = bowl(8e-3, 0.95)
    first, rounds = complete(GRID, 12, loss)
    losses = {key(s): value for s, value in first.tried}
    again = search(GRID, {}, 12, losses)
    assert (again.best, again.tried, again.wanted) == (first.best, first.tried, [])
    assert rounds < 12  # the values of a grid are wanted together


def test_the_fewest_trials_are_those_of_the_grids():
    assert fewest_trials(GRID, {}) == 3 + 1 + 1
    assert fewest_trials(GRID, {"momentum": 0.7}) == 3 + 2 + 1
    found, _ = complete(GRID, 5, bowl(2e-3))
    assert len(found.tried) == 5


def test_a_start_holds_until_its_field_is_tuned():
    found, _ = complete(GRID, 6, bowl(2e-3), {"momentum": 0.9})
    assert [s["momentum"] for s, _ in found.tried[:3]] == [0.9] * 3
