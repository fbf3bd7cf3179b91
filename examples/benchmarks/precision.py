"""What the arithmetic of accelerators does to trainings, on a CPU.

    python examples/benchmarks/precision.py --tasks gpt,vit --optimizers afopt,muon

Every run of ``precision.toml`` is made twice from the same seed, weights and batches. ``exact`` is
the CPU's own arithmetic. ``rounded`` takes the path of an accelerator with TF32: the operands of
the optimizer's products are cut to TF32, bfloat16 or float16 as the path has them and accumulated
in float32, and second moments are taken of activations rounded to bfloat16, as under autocast. The
model's own passes are exact in both, so the difference is the optimizer's.

Results go to ``outputs/precision``, a file a run; a command that was stopped goes on, and several
with other ``--tasks`` or ``--optimizers`` may run side by side. The table has the mean final
evaluation loss over the seeds with their standard deviation, the mean of the paired differences,
and whether it is below that deviation; it is printed of what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from hf_precond.bench import results  # noqa: E402
from hf_precond.bench.runner import final_loss  # noqa: E402
from hf_precond.bench.spec import Run, Spec, load, runs_of  # noqa: E402
from tests.rounding import accelerator  # noqa: E402

MODES = ("exact", "rounded")


def arithmetic(mode: str) -> AbstractContextManager[Any]:
    """Inside, products are computed as a mode says."""
    return accelerator(activations=torch.bfloat16) if mode == "rounded" else nullcontext()


def runs(spec: Spec, steps: int | None) -> list[Run]:
    """The runs of a comparison, of fewer steps if asked for."""
    found = [
        run
        for task, entries in spec.entries.items()
        for entry in entries.values()
        for run in runs_of(spec, entry, task, {}, spec.seeds, False)
    ]
    if steps is None:
        return found
    shorter = [dataclasses.replace(r.task.training, steps=steps) for r in found]
    return [
        dataclasses.replace(run, task=dataclasses.replace(run.task, training=training))
        for run, training in zip(found, shorter, strict=True)
    ]


def perform(run: Run, output: Path, mode: str) -> None:
    """Make a run unless its result is there."""
    path = run.path(output / mode)
    if results.read(path) is None:
        with arithmetic(mode):
            results.perform(run, path, lambda step: None)
        print(f"{mode} {run.title}: {final_loss(results.read(path)):.4f}", flush=True)


def table(found: list[Run], output: Path) -> list[str]:
    """A row for every optimizer on every task of which both modes of some seed are there."""
    losses: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in found:
        pair = [results.read(run.path(output / mode)) for mode in MODES]
        if None not in pair:
            row = losses.setdefault((run.task.name, run.label), [])
            row.append((final_loss(pair[0]), final_loss(pair[1])))
    lines = [
        "| task | optimizer | exact | rounded | rounded - exact | seeds | within noise |",
        "|---|---|---|---|---|---|---|",
    ]
    for (task, label), pairs in losses.items():
        exact, rounded = (list(column) for column in zip(*pairs, strict=True))
        change = statistics.mean(r - e for e, r in pairs)
        noise = statistics.stdev(exact) if len(pairs) > 1 else float("nan")
        within = "yes" if abs(change) <= noise else "no" if noise == noise else "-"
        cells = [f"{statistics.mean(each):.4f} ± {spread(each):.4f}" for each in (exact, rounded)]
        lines.append(
            f"| {task} | {label} | {' | '.join(cells)} | {change:+.4f} | {len(pairs)} | {within} |"
        )
    return lines


def spread(losses: list[float]) -> float:
    """Standard deviation; 0 of a single loss."""
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def main() -> None:
    """Make the runs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", help="names, divided by commas; all by default")
    parser.add_argument("--optimizers", help="names, divided by commas; all by default")
    parser.add_argument("--seeds", help="numbers, divided by commas; those of the file by default")
    parser.add_argument("--steps", type=int, help="of every run, to try the script")
    parser.add_argument("--data", help="a folder with the full data sets")
    parser.add_argument("--output", type=Path, help="folder of the results")
    given = parser.parse_args()
    spec = load(Path(__file__).with_suffix(".toml"), given.data)
    output = given.output or Path(spec.output)
    chosen = {
        name: None if text is None else text.split(",")
        for name, text in (
            ("tasks", given.tasks), ("optimizers", given.optimizers), ("seeds", given.seeds)
        )
    }  # fmt: skip
    found = [
        run
        for run in runs(spec, given.steps)
        if (chosen["tasks"] is None or run.task.name in chosen["tasks"])
        and (chosen["optimizers"] is None or run.label in chosen["optimizers"])
        and (chosen["seeds"] is None or str(run.seed) in chosen["seeds"])
    ]
    for run in found:
        for mode in MODES:
            perform(run, output, mode)
    print("\n".join(table(found, output)))


if __name__ == "__main__":
    main()
