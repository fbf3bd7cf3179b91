"""What a comparison found: means with intervals, steps to a peer's loss, cost; as text and JSON."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_precond.bench.results import write
from hf_precond.bench.runner import Comparison, final_loss
from hf_precond.bench.search import Search
from hf_precond.bench.spec import Entry, shown

WIDTH = 80
CONFIDENCE = 0.95


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The quantile t with ``P(|T| < t) = confidence`` of Student's distribution.

    By bisection of the closed form for whole degrees of freedom (Abramowitz
    and Stegun, 26.7.3 and 26.7.4).

    Args:
        degrees: of freedom, >= 1.
        confidence: in (0, 1).
    """
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """``P(|T| < t)``."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = 0.0 if degrees == 1 else (cosine if odd else 1.0)
    for j in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % interval by Student's t.

    Args:
        values: one a seed.

    Returns:
        ``None`` for the interval of one value, and of values that are not finite.
    """
    mean = sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return mean, student_t(len(values) - 1) * spread


def steps_to(loss: float, evaluations: Sequence[Mapping[str, Any]]) -> float | None:
    """The step at which a run first reached a loss, linear between two evaluations.

    Args:
        loss: to be reached.
        evaluations: with ``step`` and ``loss``, in order.

    Returns:
        The step; that of the first evaluation where this is low enough already;
        ``None`` if the loss was not reached.
    """
    before: Mapping[str, Any] | None = None
    for now in evaluations:
        if now["loss"] is None:  # not finite: the run ended there
            break
        if now["loss"] <= loss:
            if before is None or before["loss"] == now["loss"]:
                return float(now["step"])
            share = (before["loss"] - loss) / (before["loss"] - now["loss"])
            return before["step"] + share * (now["step"] - before["step"])
        before = now
    return None


@dataclass
class Row:
    """An optimizer on a task.

    Args:
        entry: the optimizer.
        search: how it was tuned.
        results: of the reported seeds that are done, by seed.
        failed: whether a run of it failed.
    """

    entry: Entry
    search: Search
    results: dict[int, dict[str, Any]]
    failed: bool

    @property
    def losses(self) -> list[float]:
        """The final losses, one a seed."""
        return [final_loss(result) for result in self.results.values()]

    @property
    def settings(self) -> dict[str, Any]:
        """The tuned fields, or all that the file gives where nothing is tuned."""
        return {**({} if self.entry.grid else self.entry.fields), **self.search.best}


class Report:
    """The tables of a comparison, complete or not.

    Args:
        comparison: with its results.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.spec = comparison, comparison.spec
        self.rows = {task: self._rows(task) for task in self.spec.tasks}

    def _rows(self, task: str) -> list[Row]:
        rows = []
        for entry in self.spec.entries[task].values():
            found = self.comparison.search(task, entry)
            runs = [] if found.wanted else self.comparison.reported(task, entry, found.best)
            done = {run.seed: self.comparison.result(run) for run in runs}
            complete = {seed: result for seed, result in done.items() if result is not None}
            folder = self.comparison.output / "runs" / task / entry.label
            failed = any(path.parent == folder for path in self.comparison.failed)
            rows.append(Row(entry, found, complete, failed))
        return rows

    # Text -----------------------------------------------------------------------------

    def text(self) -> str:
        """The tables of losses, in 80 columns; no clock enters them."""
        return "\n\n".join(map(self.quality, self.rows))

    def costs(self) -> str:
        """The tables of seconds and memory, in 80 columns."""
        return "\n\n".join(map(self.cost, self.rows))

    def quality(self, task: str) -> str:
        """Losses, steps and settings on a task; the same however often the runs were interrupted.

        Args:
            task: its name.
        """
        spec, rows = self.spec, self.rows[task]
        seeds = ", ".join(map(str, spec.seeds))
        metric = next((self._metric(row) for row in rows if self._metric(row)), "")
        head = f"{task}: {spec.tasks[task].training.steps} steps, seeds {seeds}"
        if any(row.entry.grid for row in rows):
            head += (
                f"; tuned on {', '.join(map(str, spec.tuning_seeds))}, {spec.trials} trials each"
            )
        columns = f"{'optimizer':<16}{'eval loss':>17}{metric:>17}"
        columns += "".join(f"{'to ' + label[:9]:>14}" for label in spec.reference)
        lines = [*textwrap.wrap(head, WIDTH), "", columns.rstrip()]
        for row in rows:
            line = f"{row.entry.label:<15.15} {self._loss(row):>17}{self._other(row, metric):>17}"
            line += "".join(f"{self._steps(task, row, label):>14}" for label in spec.reference)
            lines.append(line.rstrip())
        lines += ["", "settings"]
        for row in rows:
            open_ended = ", ".join(row.search.open_ended)
            note = f"  ({open_ended} not bracketed)" if open_ended else ""
            words = f"{row.entry.label:<15.15} {shown(row.settings)}{note}"
            lines += textwrap.wrap(words, WIDTH, subsequent_indent=" " * 16)
        return "\n".join(lines + ["", *self._notes()])

    def _notes(self) -> list[str]:
        count = len(self.spec.seeds)
        text = f"±: 95 % interval of the mean over {count} seeds (Student t)." if count > 1 else ""
        if self.spec.reference:
            text += (
                " to ...: mean step at which the loss that this optimizer ended with on the same "
                "seed was reached, linear between evaluations; in brackets how many seeds did."
            )
        return textwrap.wrap(text.strip(), WIDTH)

    def _loss(self, row: Row) -> str:
        if row.failed and len(row.results) < len(self.spec.seeds):
            return "failed"
        if len(row.results) < len(self.spec.seeds):
            return "not done"
        mean, half = interval(row.losses)
        if not math.isfinite(mean):
            return "diverged"
        return f"{mean:.4f}" + (f" ± {half:.4f}" if half is not None else "")

    def _metric(self, row: Row) -> str:
        """The figure beside the loss that is shown: the first that evaluate returned."""
        names = [n for result in row.results.values() for n in result["final"] if n != "loss"]
        return names[0] if names else ""

    def _other(self, row: Row, metric: str) -> str:
        finals = [result["final"].get(metric) for result in row.results.values()]
        if not metric or len(finals) < len(self.spec.seeds) or None in finals:
            return ""
        mean, half = interval([float(value) for value in finals if value is not None])
        return f"{mean:.4f}" + (f" ± {half:.4f}" if half is not None else "")

    def reached(self, task: str, row: Row, label: str) -> list[float | None]:
        """The steps to another optimizer's final loss on the same seed, one a seed.

        Args:
            task: its name.
            row: the optimizer.
            label: the other one.
        """
        other = next(r for r in self.rows[task] if r.entry.label == label)
        seeds = [s for s in row.results if s in other.results]
        if row is other:
            return [float(row.results[seed]["evaluations"][-1]["step"]) for seed in seeds]
        return [
            steps_to(final_loss(other.results[seed]), row.results[seed]["evaluations"])
            for seed in seeds
        ]

    def _steps(self, task: str, row: Row, label: str) -> str:
        if len(row.results) < len(self.spec.seeds) or not all(map(math.isfinite, row.losses)):
            return "-"
        found = self.reached(task, row, label)
        reached = [steps for steps in found if steps is not None]
        if not reached:
            return "-"
        mean = f"{sum(reached) / len(reached):.0f}"
        return mean if len(reached) == len(found) else f"{mean} ({len(reached)}/{len(found)})"

    def cost(self, task: str) -> str:
        """Seconds of a training step and memory of the state on a task.

        Args:
            task: its name.
        """
        rows = [row for row in self.rows[task] if row.results]
        lines = [f"{task}: seconds of a training step, evaluations left out; memory", ""]
        gpu = any("peak_bytes" in result for row in rows for result in row.results.values())
        if any("state_bytes" not in r for row in rows for r in row.results.values()):
            lines[0] = f"{task}: seconds of a step, loading and evaluations of the script included"
        head = f"{'optimizer':<16}{'processor':>12}{'clock':>12}{'state MiB':>12}"
        lines.append(head + f"{'peak MiB':>12}" * gpu)
        for row in rows:
            processor, clock = (
                f"{seconds_per_step(row.results.values(), name):.4f}"
                for name in ("processor_seconds", "wall_seconds")
            )
            state, peak = (
                _mebibytes(row.results.values(), n) for n in ("state_bytes", "peak_bytes")
            )
            line = f"{row.entry.label:<15.15} {processor:>12}{clock:>12}{state:>12}{peak:>12}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    # JSON -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: settings, trials, results by seed, hardware, versions."""
        machines: list[dict[str, Any]] = []
        tasks: dict[str, Any] = {}
        for task, rows in self.rows.items():
            tasks[task] = {row.entry.label: self._row(task, row) for row in rows}
            for row in rows:
                for result in row.results.values():
                    found = {name: result[name] for name in ("hardware", "versions")}
                    if found not in machines:
                        machines.append(found)
        return {
            "file": self.spec.text,
            "seeds": self.spec.seeds,
            "tuning_seeds": self.spec.tuning_seeds,
            "trials": self.spec.trials,
            "machines": machines,
            "tasks": tasks,
            "failed": list(self.comparison.failed.values()),
            "table": self.text(),
        }

    def _row(self, task: str, row: Row) -> dict[str, Any]:
        complete = len(row.results) == len(self.spec.seeds) and all(map(math.isfinite, row.losses))
        mean, half = interval(row.losses) if complete else (None, None)
        return {
            "optimizer": row.entry.optimizer,
            "fields": {**row.entry.fields, **row.search.best},
            "tuned": row.search.best if row.entry.grid else {},
            "not_bracketed": row.search.open_ended,
            "trials": [
                {"settings": settings, "loss": loss if math.isfinite(loss) else None}
                for settings, loss in row.search.tried
            ],
            "mean": mean,
            "interval": half,
            "steps_to": {label: self.reached(task, row, label) for label in self.spec.reference},
            "seeds": {
                str(seed): {name: value for name, value in result.items() if name not in UNREPEATED}
                for seed, result in row.results.items()
            },
        }


UNREPEATED = ("run", "hardware", "versions")
"""What stands in the file of each run, and once for all in the report."""


def seconds_per_step(results: Any, name: str) -> float:
    """Seconds of a step, over all runs.

    Args:
        results: of the runs.
        name: ``processor_seconds`` or ``wall_seconds``.
    """
    found = list(results)
    return sum(r[name] for r in found) / max(1, sum(r["steps"] for r in found))


def _mebibytes(results: Any, name: str) -> str:
    values = [result[name] for result in results if name in result]
    return f"{max(values) / 2**20:.1f}" if values else ""


def save(report: Report, output: Path) -> None:
    """Write ``results.json``, ``table.txt`` and ``cost.txt``.

    Args:
        report: the tables.
        output: the folder.
    """
    write(output / "results.json", report.to_dict())
    (output / "table.txt").write_text(report.text() + "\n")
    (output / "cost.txt").write_text(report.costs() + "\n")
