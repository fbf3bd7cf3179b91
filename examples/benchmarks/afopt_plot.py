"""Evaluation losses that ``afopt.py`` recorded, as curves: one panel a task.

    python examples/benchmarks/afopt_plot.py afopt.jsonl --output afopt.png \
        --curve gpt 3 AdamW adamw:lr=4e-3,beta2=0.95 --curve gpt 3 Muon muon:lr=1.6e-2

Each ``--curve`` is a task, a seed, a label and the run as it was given to ``afopt.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("records", type=Path, nargs="+", help="files of afopt.py's --output")
    parser.add_argument(
        "--curve", nargs=4, action="append", required=True, metavar=("TASK", "SEED", "LABEL", "RUN")
    )
    parser.add_argument("--output", type=Path, default=Path("afopt.png"))
    options = parser.parse_args()
    records = [json.loads(line) for path in options.records for line in path.open()]
    found = {(r["task"], str(r["seed"]), r["run"]): r["evaluations"] for r in records}
    tasks = list(dict.fromkeys(task for task, *_ in options.curve))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.2), squeeze=False)
    panels = dict(zip(tasks, axes[0], strict=True))
    for task, seed, label, run in options.curve:
        if (task, seed, run) not in found:
            raise SystemExit(f"no record of {task}, seed {seed}, {run}")
        points = found[task, seed, run]
        panels[task].plot([p["step"] for p in points], [p["loss"] for p in points], label=label)
        panels[task].set(title=f"{task}, seed {seed}", xlabel="step")
    axes[0][0].set_ylabel("eval loss")
    for panel in axes[0]:
        panel.set_yscale("log")
        panel.minorticks_off()
        low, high = panel.get_ylim()
        decades = [10.0**power for power in range(-6, 2)]
        known = decades if high > 30 * low else [0.5 * number for number in range(1, 20)]
        ticks = [tick for tick in known if low <= tick <= high]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
