"""``hf-precond compare RUN_DIR…``: what trainings reached, from their ``trainer_state.json``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_precond.cli.text import distinct, table, terminal_width, wrapped
from hf_precond.config.hub import CONFIG_FILE

STATE_FILE = "trainer_state.json"
LOWER_IS_BETTER = ("loss", "perplexity", "wer", "cer", "ter", "error", "mse", "rmse", "mae")
SKIPPED = ("_runtime", "_per_second", "_time")
EXAMPLES = """examples:
  hf-precond compare out/adamw out/afopt
  hf-precond compare out/* --png curves.png

A RUN_DIR is an output_dir of a Trainer: its trainer_state.json is read, or that
of its newest checkpoint, and eval_results.json where no evaluation was logged.
trainer.save_state() after trainer.train() records the seconds, as the example
scripts do. Folders without a training are left out."""


@dataclass
class Run:
    """A training as its Trainer recorded it.

    Args:
        name: the folder as it was given.
        optimizer: from ``optimizer_config.json``; ``-`` for other packages'.
        steps: taken.
        seconds: of the whole training; ``None`` where they were not recorded.
        history: the Trainer's log entries.
    """

    name: str
    optimizer: str
    steps: int
    seconds: float | None
    history: list[dict[str, Any]]

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Step and value of every log that has a key.

        Args:
            key: the key.
        """
        pairs = {entry["step"]: entry[key] for entry in self.history if key in entry}
        return [(step, float(value)) for step, value in sorted(pairs.items())]

    def metrics(self) -> list[str]:
        """The keys of the evaluations that are results, not timings."""
        keys = dict.fromkeys(key for entry in self.history for key in entry)
        return [
            key for key in keys
            if key.startswith("eval_") and not key.endswith(SKIPPED)
            and all(isinstance(entry.get(key, 0), int | float) for entry in self.history)
        ]  # fmt: skip

    @property
    def train_loss(self) -> float | None:
        """The last training loss that was logged; that of the whole training where none was."""
        logged = self.curve("loss") or self.curve("train_loss")
        return logged[-1][1] if logged else None


def add_command(commands: Any) -> None:
    """Add the command to the parser of ``hf-precond``.

    Args:
        commands: the parser's subparsers.
    """
    parser = commands.add_parser(
        "compare",
        help="what trainings reached: a table, and curves as PNG",
        description=wrapped(
            "Compare trainings by what their Trainers recorded: final and best "
            "evaluation, training loss, steps and seconds, and curves as PNG."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output_dir of a training")
    parser.add_argument(
        "--png", default="compare.png", metavar="FILE",
        help="file of the curves (default compare.png); `none` for no file",
    )  # fmt: skip
    parser.set_defaults(act=compare_command)


def compare_command(arguments: argparse.Namespace) -> int:
    """Print the comparison, and write the curves.

    Args:
        arguments: ``runs`` and ``png``.

    Returns:
        0; 2 where a folder holds no training, or the PNG cannot be written.
    """
    try:
        runs = read_runs(arguments.runs)
        print(comparison(runs, terminal_width()))
        if arguments.png.lower() != "none":
            print(f"\n{_draw(runs, arguments.png)}")
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(f"hf_precond: {error}", file=sys.stderr)
        return 2
    return 0


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read several trainings; what else a pattern such as ``out/*`` matches is told and left out.

    Args:
        folders: as for :func:`read_run`.

    Raises:
        FileNotFoundError: none of them holds a training.
        ValueError: a state cannot be read.
    """
    runs: list[Run] = []
    others: list[FileNotFoundError] = []
    for folder in dict.fromkeys(folders):
        try:
            runs.append(read_run(folder))
        except FileNotFoundError as error:
            others.append(error)
    if not runs:
        raise others[0]
    for other in others:
        print(f"hf_precond: left out: {other}", file=sys.stderr)
    return runs


def read_run(folder: str) -> Run:
    """Read a training.

    Args:
        folder: the Trainer's ``output_dir``, or one of its checkpoints.

    Returns:
        The run.

    Raises:
        FileNotFoundError: there is no such folder, or no state in it.
        ValueError: the state cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such folder; give the output_dir of a training."
        )
    numbers = {
        int(path.parent.name.rpartition("-")[2]): path
        for path in root.glob(f"checkpoint-*/{STATE_FILE}")
        if path.parent.name.rpartition("-")[2].isdigit()
    }
    found = [root / STATE_FILE] * (root / STATE_FILE).is_file()
    found += [numbers[max(numbers)]] if numbers else []
    if not found:
        raise FileNotFoundError(
            f"{folder}: there is no {STATE_FILE} in it or in a checkpoint; give the output_dir of "
            "a Trainer that has saved a checkpoint, or called trainer.save_state()."
        )
    states = [_read(path) for path in found]
    state = max(states, key=lambda state: state["global_step"])
    history = [entry for entry in state["log_history"] if isinstance(entry.get("step"), int)]
    if not any(key.startswith("eval_") for entry in history for key in entry):
        # Scripts that evaluate once, after training, may save its results alone.
        history += [{"step": state["global_step"], **_results(root)}]
    runtimes = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    for name in ("train_results.json", "all_results.json"):
        if not runtimes and (root / name).is_file():
            runtimes = [_number(root / name, "train_runtime")]
    known = [seconds for seconds in runtimes if seconds is not None]
    config = next((p for p in (root / CONFIG_FILE, found[0].parent / CONFIG_FILE) if p.is_file()),
                  None)  # fmt: skip
    optimizer = "-" if config is None else str(json.loads(config.read_text()).get("optimizer"))
    return Run(folder, optimizer, state["global_step"], known[-1] if known else None, history)


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
        state["global_step"] = int(state["global_step"])
        state["log_history"] = list(state["log_history"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: it is no state of a Trainer ({error!r}); give another folder."
        ) from None
    return state


def _results(root: Path) -> dict[str, Any]:
    """The evaluation that ``trainer.save_metrics("eval", …)`` has written."""
    for name in ("eval_results.json", "all_results.json"):
        try:
            found = json.loads((root / name).read_text())
            return {k: v for k, v in found.items() if k.startswith("eval_")}
        except (OSError, ValueError, AttributeError):
            continue
    return {}


def _number(path: Path, key: str) -> float | None:
    try:
        return float(json.loads(path.read_text())[key])
    except (ValueError, KeyError, TypeError):
        return None


def comparison(runs: Sequence[Run], width: int) -> str:
    """The tables: one of the trainings, and one of each evaluation metric.

    Args:
        runs: the trainings.
        width: columns.

    Returns:
        The text.
    """
    rows = [("run", "optimizer", "steps", "seconds", "train loss")]
    rows += [
        (run.name, run.optimizer, str(run.steps), _shown(run.seconds, 1), _shown(run.train_loss))
        for run in runs
    ]
    tables = [table(rows, width)]
    for metric in dict.fromkeys(metric for run in runs for metric in run.metrics()):
        rows = [(metric, "final", "best", "at step", "at second")]
        for run in runs:
            curve = run.curve(metric)
            finite = [pair for pair in curve if math.isfinite(pair[1])]
            if not curve:
                rows.append((run.name, "-", "-", "-", "-"))
                continue
            choose = min if lower_is_better(metric) else max
            step, best = choose(finite, key=lambda pair: pair[1], default=(0, math.nan))
            at = None if run.seconds is None else run.seconds * step / max(run.steps, 1)
            rows.append((run.name, _shown(curve[-1][1]), _shown(best), str(step), _shown(at, 1)))
        tables.append(table(rows, width))
    if all(run.seconds is None for run in runs):
        tables.append("No seconds: trainer.save_state() after trainer.train() records them.")
    if not any(run.metrics() for run in runs):
        tables.append("No evaluation was logged: train with --eval_strategy steps.")
    return "\n\n".join(tables)


def lower_is_better(metric: str) -> bool:
    """Whether the best value of a metric is its smallest.

    Args:
        metric: such as ``eval_loss``.
    """
    return metric.rpartition("_")[2].lower() in LOWER_IS_BETTER


def _shown(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _draw(runs: Sequence[Run], file: str) -> str:
    """Write the curves, and say where."""
    folder = os.path.dirname(os.path.abspath(file))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--png {file}: there is no folder {folder}; make it first.")
    if not file.lower().endswith(".png"):
        raise ValueError(f"--png {file}: the name of the file must end in .png.")
    try:
        import matplotlib
    except ImportError:
        return "No curves: matplotlib is not installed (pip install matplotlib)."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = ["loss", *dict.fromkeys(metric for run in runs for metric in run.metrics())]
    keys = [key for key in keys if any(run.curve(key) for run in runs)]
    if not keys:
        return "No curves: nothing was logged (--logging_steps)."
    labels = distinct([run.name for run in runs], 40)
    shown = [run for run in runs if run.seconds is not None]
    columns = 2 if shown else 1
    size = (5.2 * columns, 3.1 * len(keys) + 0.6)
    figure, axes = pyplot.subplots(len(keys), columns, figsize=size, squeeze=False, sharey="row")
    for row, key in zip(axes, keys, strict=True):
        for run in runs:
            curve = run.curve(key)
            style = {"label": labels[run.name], "marker": "." if len(curve) < 30 else ""}
            color = f"C{list(runs).index(run)}"
            row[0].plot([s for s, _ in curve], [v for _, v in curve], color=color, **style)
            if run.seconds is not None and columns == 2:
                pace = run.seconds / max(run.steps, 1)
                seconds = [step * pace for step, _ in curve]
                row[1].plot(seconds, [value for _, value in curve], color=color, **style)
        row[0].set_ylabel("training loss" if key == "loss" else key.replace("_", " "))
        for axis in row:
            axis.grid(alpha=0.3)
    axes[-1][0].set_xlabel("optimizer step")
    if columns == 2:
        axes[-1][1].set_xlabel("seconds of training, at the run's mean pace")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=min(3, len(runs)), frameon=False)
    rows = math.ceil(len(runs) / 3)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.28 * rows / size[1] - 0.02))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return f"Curves: {file}"
