"""Evaluation losses against steps and against seconds, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_precond.bench.report import Report, Row
from hf_precond.bench.tasks import TASKS


def require_matplotlib() -> Any:
    """Matplotlib's ``pyplot``, drawing without a display.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError(
            "the picture needs matplotlib: pip install matplotlib (or hf_precond[bench]), or pass "
            "--no-plot; the results and tables do not need it."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(report: Report, path: Path) -> None:
    """Draw two panels a task: mean loss over the seeds against steps and against seconds.

    Seconds are the processor's on a CPU, which other work on the machine
    disturbs least, and the clock's on a GPU; evaluations are left out. The
    lowest and highest seed are shaded. The title is what a shipped task's first
    sentence says, or the name of a task of one's own.

    Args:
        report: the results.
        path: of the picture.
    """
    pyplot = require_matplotlib()
    tasks = list(report.rows)
    figure, axes = pyplot.subplots(
        len(tasks), 2, figsize=(10, 3.6 * len(tasks)), squeeze=False, sharey="row"
    )
    for pair, task in zip(axes, tasks, strict=True):
        training = report.spec.tasks[task].training
        on_cpu = training.device == "cpu"
        clock = "processor_seconds" if on_cpu else "wall_seconds"
        for row in report.rows[task]:
            curves = _curves(row)
            if not curves:
                continue
            steps = [points[0]["step"] for points in curves]
            losses = [[point["loss"] for point in points] for points in curves]
            mean = [sum(values) / len(values) for values in losses]
            low, high = [min(values) for values in losses], [max(values) for values in losses]
            places = [(pair[0], steps)]
            if all(clock in point for points in curves for point in points):
                seconds = [sum(p[clock] for p in points) / len(points) for points in curves]
                places.append((pair[1], seconds))
            for axis, x in places:
                (line,) = axis.plot(x, mean, label=row.entry.label, lw=1.2)
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)
        pair[0].set(xlabel="step", ylabel="evaluation loss")
        pair[0].set_title(_title(task), loc="left", fontsize=10)
        pair[1].set(xlabel="processor seconds" if on_cpu else "seconds")
        for axis in pair:
            low, high = axis.dataLim.intervaly
            if 0 < 10 * low < high:
                axis.set_yscale("log")
        if pair[0].lines:
            pair[0].legend(fontsize=7)
    seeds = ", ".join(map(str, report.spec.seeds))
    figure.suptitle(f"mean of seeds {seeds}; shaded: lowest and highest", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _title(task: str) -> str:
    """What a task trains, from its docstring."""
    made = TASKS.get(task)
    return (made.__doc__ or task).splitlines()[0].rstrip(".") if made else task


def _curves(row: Row) -> list[list[dict[str, Any]]]:
    """The evaluations that all seeds reached: one list a step, of one a seed."""
    runs = [result["evaluations"] for result in row.results.values() if not result["diverged"]]
    return [list(points) for points in zip(*runs, strict=False)] if runs else []
