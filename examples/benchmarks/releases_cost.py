"""Processor time of steps of another checkout of this package and of this one, in one run.

    git worktree add ../old a9b219c        # release 0.1
    python examples/benchmarks/releases_cost.py --old ../old

Each checkout has a process of its own, which trains a model of MiniLM's shapes; they take the same
steps in turns, so that what else the machine does falls on both. Whole training steps (forward,
backward, optimizer) with the optimizer's defaults, processor time of one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ARMS = ("afopt", "adamr", "nkfac", "sgdph")


def work(arm: str, tokens: int) -> None:
    """Take a step for every line that is read, and print its seconds.

    Args:
        arm: a name of ``--optim``.
        tokens: a step, in sequences of 128.
    """
    import torch
    import transformers

    from hf_precond import create_optimizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_labels=5
    )
    model = transformers.BertForSequenceClassification(config).train()
    optimizer: Any = create_optimizer(model, arm, lr=1e-4)
    shape = max(1, tokens // 128), 128
    print("ready", flush=True)
    for _ in sys.stdin:
        batch = {
            "input_ids": torch.randint(config.vocab_size, shape),
            "labels": torch.randint(config.num_labels, shape[:1]),
        }
        start = time.process_time()
        optimizer.zero_grad()
        if hasattr(optimizer, "curvature_context"):
            with optimizer.curvature_context():
                loss = model(**batch).loss
                optimizer.probe(loss)
                loss.backward()
        else:
            model(**batch).loss.backward()
        optimizer.step()
        print(time.process_time() - start, flush=True)


def compared(arm: str, folders: list[Path], steps: int, tokens: int) -> str:
    """A row: seconds of a step in each checkout, and their ratio.

    Args:
        arm: a name of ``--optim``.
        folders: the old checkout and the new one.
        steps: that are measured, behind the first two.
        tokens: a step.
    """
    words = [sys.executable, str(Path(__file__).resolve()), "--work", arm, "--tokens", str(tokens)]
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen(
            words, cwd=folder, stdin=pipe, stdout=pipe, text=True, bufsize=1,
            env=os.environ | {"PYTHONPATH": str(folder.resolve())},
        )
        for folder in folders
    ]  # fmt: skip
    times: list[list[float]] = [[], []]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    for number in range(steps + 2):
        for which in (0, 1) if number % 2 else (1, 0):
            worker = workers[which]
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("step\n")
            seconds = float(worker.stdout.readline())
            if number > 1:
                times[which].append(seconds)
        print(".", end="", file=sys.stderr, flush=True)
    for worker in workers:
        worker.communicate()
    print(file=sys.stderr)
    old, new = (statistics.mean(t) for t in times)
    middle = statistics.median(b / a for a, b in zip(*times, strict=True))
    return f"| `{arm}` | {old * 1e3:,.0f} | {new * 1e3:,.0f} | {new / old:.3f} | {middle:.3f} |"


def main(argv: list[str] | None = None) -> None:
    """Print the table.

    Args:
        argv: arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--old", type=Path, help="folder of the other checkout")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        work(arguments.work, arguments.tokens)
        return
    if arguments.old is None or not (arguments.old / "hf_precond").is_dir():
        parser.error("--old: the folder of another checkout of hf_precond.")
    print("| optimizer | old, ms | new, ms | new / old | median of a step |")
    print("|---|---:|---:|---:|---:|")
    folders = [arguments.old, Path(__file__).parents[2]]
    for arm in arguments.arms.split(","):
        print(compared(arm, folders, arguments.steps, arguments.tokens), flush=True)


if __name__ == "__main__":
    main()
