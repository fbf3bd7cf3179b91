"""Successive search: one field after the other, each grid extended until it brackets its best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]
Grid = Mapping[str, Sequence[Any]]

DECAYS = ("momentum", "beta1", "beta2", "stat_decay")
"""Fields whose distance from 1 is what a grid multiplies: .8, .9, .95."""


@dataclass
class Search:
    """Where a search stands, given the losses that are known.

    Args:
        best: the settings with the lowest loss so far.
        wanted: settings to be tried next; empty when the search is over.
        tried: every setting tried, with its loss, in order.
        open_ended: numeric fields whose best value has no tried value on one
            side of it, though there could be one.
    """

    best: Settings = field(default_factory=dict)
    wanted: list[Settings] = field(default_factory=list)
    tried: list[tuple[Settings, float]] = field(default_factory=list)
    open_ended: list[str] = field(default_factory=list)


def key(settings: Settings) -> str:
    """Settings as text that is equal for equal settings."""
    return repr(sorted(settings.items()))


def fewest_trials(grid: Grid, start: Settings) -> int:
    """How many trials a grid takes if no part of it is extended."""
    stages, first = list(grid), _start(grid, start)
    later = sum(len(_others(grid[name], first[name])) for name in stages[1:])
    return len(dict.fromkeys(grid[stages[0]])) + later if stages else 0


def search(grid: Grid, start: Settings, trials: int, losses: Mapping[str, float]) -> Search:
    """Replay a search as far as the known losses lead.

    The fields are tuned in the grid's order (rate, momentum, weight decay),
    each at the best values of those before it, those after it at their start.
    Where the best value lies at an end, the grid is extended by its own step,
    as long as the trials that later fields need are left. Trials that remain
    refine the best: a step of the grid's size to both sides of every field,
    then of its root, and so on, so that every search makes the same number.

    Args:
        grid: field to its values.
        start: values of the fields before they are tuned; by default the
            middle of the grid.
        trials: how many settings are tried in all.
        losses: by :func:`key` of the settings; infinite where a run diverged.

    Returns:
        The search. Calling again with the losses of what it wanted continues it.
    """
    return _Replay(grid, start, trials, losses).run()


class _Pending(Exception):
    """Losses are missing: the search cannot go on."""


class _Replay:
    def __init__(
        self, grid: Grid, start: Settings, trials: int, losses: Mapping[str, float]
    ) -> None:
        self.grid = {name: list(dict.fromkeys(values)) for name, values in grid.items()}
        self.trials, self.losses = trials, losses
        self.current = _start(grid, start)
        self.tried: dict[str, tuple[Settings, float]] = {}

    def run(self) -> Search:
        try:
            for number, name in enumerate(self.grid):
                self._tune(name, list(self.grid)[number + 1 :])
            self._refine()
        except _Pending as pending:
            return Search(self.current, pending.args[0], list(self.tried.values()))
        opened = [name for name in self.grid if self._is_open(name)]
        return Search(self.current, [], list(self.tried.values()), opened)

    def _try(self, wanted: Sequence[Settings], reserve: int = 0) -> bool:
        """Try settings while trials are left; whether any was new. Moves to the best of all."""
        new = {key(s): s for s in wanted if key(s) not in self.tried}
        room = max(0, self.trials - len(self.tried) - reserve)
        chosen = dict(list(new.items())[:room])
        missing = [s for k, s in chosen.items() if k not in self.losses]
        if missing:
            raise _Pending(missing)
        for k, settings in chosen.items():
            loss = self.losses[k]
            self.tried[k] = (settings, math.inf if math.isnan(loss) else loss)
        if self.tried:
            self.current = min(self.tried.values(), key=lambda pair: pair[1])[0]
        return bool(chosen)

    def _tune(self, name: str, later: Sequence[str]) -> None:
        base = dict(self.current)
        reserve = sum(len(_others(self.grid[other], base[other])) for other in later)
        values = list(self.grid[name])
        self._try([base | {name: value} for value in values], reserve)
        while True:
            value = _beyond(name, values, self.current[name])
            if value is None or not self._try([base | {name: value}], reserve):
                return
            values.append(value)

    def _refine(self) -> None:
        share = 1.0
        for _ in range(64):
            if len(self.tried) >= self.trials:
                return
            before = key(self.current)
            for name, values in self.grid.items():
                step = _step(name, values) * share
                near = [_moved(name, self.current[name], by) for by in (step, -step)]
                self._try([self.current | {name: v} for v in near if v is not None])
            if key(self.current) == before:
                share /= 2

    def _is_open(self, name: str) -> bool:
        known = [settings[name] for settings, _ in self.tried.values()]
        return bool(known) and _beyond(name, known, self.current[name]) is not None


def _start(grid: Grid, start: Settings) -> Settings:
    return {name: start.get(name, values[(len(values) - 1) // 2]) for name, values in grid.items()}


def _others(values: Sequence[Any], value: Any) -> list[Any]:
    return [v for v in dict.fromkeys(values) if v != value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scale(name: str, value: float) -> float | None:
    """Where a value lies on the scale on which its grid is even; ``None`` at the scale's end."""
    distance = 1 - value if name in DECAYS else value
    return math.log(distance) if distance > 0 else None


def _step(name: str, values: Sequence[Any]) -> float:
    """The grid's step on that scale: the mean distance of neighbours, ln 2 without any."""
    numbers = [value for value in values if _is_number(value)]
    scaled = sorted(s for s in (_scale(name, v) for v in numbers) if s is not None)
    return (scaled[-1] - scaled[0]) / (len(scaled) - 1) if len(scaled) > 1 else math.log(2)


def _moved(name: str, value: Any, by: float) -> Any:
    """A value moved on its scale, rounded to three digits; ``None`` where that leads nowhere."""
    place = _scale(name, value) if _is_number(value) else None
    if place is None:
        return None
    found: float = float(f"{math.exp(place + by):.3g}")
    if name in DECAYS:
        found = max(0.0, round(1 - found, 6))
    elif isinstance(value, int):
        found = max(1, round(found))
    return None if found == value else found


def _beyond(name: str, values: Sequence[Any], best: Any) -> Any:
    """The value by which the grid is extended when its best lies at an end, else ``None``."""
    if not _is_number(best) or not all(map(_is_number, values)):
        return None
    step = _step(name, values)
    if name in DECAYS:
        step = -step  # towards larger values the distance from 1 falls
    if best >= max(values):
        return _moved(name, best, step)
    return _moved(name, best, -step) if best <= min(values) else None
