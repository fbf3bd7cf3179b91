"""``hf-precond bench FILE``: optimizers tuned alike on tasks, and compared on fresh seeds."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

EXAMPLE = """\
The file, TOML or JSON, names tasks, optimizers, grids, seeds and budgets:

  steps = 300
  trials = 8               # settings tried, the same number for each optimizer
  tuning_seeds = [0]       # apart from the seeds that are reported
  seeds = [1, 2, 3]
  reference = "adamw"      # others are timed to the loss that it ends with

  [tasks.gpt]              # or vit, mixtral, deepseek, banking77, …
  [tasks.mine]             # or your own:
  function = "my_task.py:make"  # make(seed) -> model, batches, evaluate
  [tasks.glue]             # or a script with a Trainer:
  script = "run_glue.py"
  args = ["--model_name_or_path", "my_model", "--do_train", "--do_eval"]

  [optimizers.adamw]
  fields = {beta2 = 0.95}  # not tuned
  grid = {lr = [2e-3, 4e-3, 8e-3], beta1 = [0.8, 0.9], weight_decay = [0, 0.1]}
  [optimizers.afopt]
  grid = {lr = [1e-3, 2e-3, 4e-3], momentum = [0.7, 0.8, 0.9]}
  [optimizers.afopt.on.mine]    # another grid on one task
  grid = {lr = [1e-4, 2e-4, 4e-4]}

`make` returns a model whose output has a loss; batches, a list, DataLoader or
function of the step; evaluate, a function of the model that returns the loss,
or {"loss": ..., "accuracy": ...}. examples/benchmarks/tasks.py has two.

Fields are tuned one after the other: rate, momentum, weight decay, then others
in the file's order. A grid whose best value lies at its end is extended, and
trials that remain refine the best. Finished runs are files: started again, the
command goes on where it was stopped.

  hf-precond bench compare.toml --jobs 2 --output out/compare
"""


def add_command(commands: Any) -> None:
    """Add the command to the parser of ``hf-precond``.

    Args:
        commands: the parser's subparsers.
    """
    parser = commands.add_parser(
        "bench",
        help="compare optimizers on tasks, each tuned with as many trials",
        description="Tune optimizers alike on tasks, and compare them on fresh seeds.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="what is compared, in TOML or JSON")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="folder of the results (default: the file's)"
    )
    parser.add_argument(
        "--data", default=None, metavar="DIR", help="data folder, in place of the file's"
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no picture")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--table", action="store_true", help="run nothing; print the table of what is there"
    )
    parser.set_defaults(act=bench_command)


def bench_command(arguments: argparse.Namespace) -> int:
    """Run what is missing of a comparison; write JSON, tables and picture, print the table.

    Args:
        arguments: ``file``, ``jobs``, ``output``, ``data``, ``no_plot``, ``quiet``, ``table``.

    Returns:
        0; 1 when a run failed; 2 when the file is not usable; 130 when stopped.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.jobs < 1:
        return _refuse(f"--jobs {arguments.jobs}: it is a number of processes, at least 1.")
    from hf_precond.bench import plot, spec
    from hf_precond.bench.report import Report, save
    from hf_precond.bench.runner import Comparison, execute

    try:
        if not arguments.no_plot:
            plot.require_matplotlib()
        loaded = spec.load(arguments.file, arguments.data)
    except (ValueError, OSError, RuntimeError) as error:
        return _refuse(str(error))
    output = Path(arguments.output or loaded.output)
    comparison = Comparison(loaded, output)
    if not arguments.table:
        try:
            execute(comparison, arguments.jobs, arguments.quiet)
        except KeyboardInterrupt:
            print(f"hf_precond: stopped; the same command goes on from {output}.", file=sys.stderr)
            return 130
    report = Report(comparison)
    save(report, output)
    if not arguments.no_plot:
        plot.draw(report, output / "loss.png")
    print(report.text())
    if not arguments.quiet:  # not into the table, which the clock does not change
        print(f"\n{report.costs()}", file=sys.stderr)
    for failure in comparison.failed.values():
        print(f"hf_precond: {failure}", file=sys.stderr)
    return 1 if comparison.failed else 0


def _refuse(sentence: str) -> int:
    print(f"hf_precond: {sentence}", file=sys.stderr)
    return 2
