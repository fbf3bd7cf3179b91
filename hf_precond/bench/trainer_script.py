"""A script with a ``Trainer`` as a task: run by the launcher, its ``trainer_state.json`` read."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_precond.bench.optimizers import AUTO
from hf_precond.bench.spec import Run

ARGUMENTS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
}
"""Fields that the Trainer has arguments of its own for; all others are ``--optim_args``."""

STATE = "trainer_state.json"
running: list[subprocess.Popen[bytes]] = []
"""The script that runs now, to be ended with its parent."""


def command(run: Run, folder: str) -> list[str]:
    """The command line of a run; what the file's ``args`` name is left as it is there.

    Args:
        run: the run.
        folder: its ``--output_dir``.
    """
    task, training = run.task, run.task.training
    fields = dict(run.fields)
    if fields.get("lr") == AUTO:  # what a Trainer does by itself
        del fields["lr"]
    if "betas" in fields:
        first, second = fields.pop("betas")
        fields = {"beta1": first, "beta2": second} | fields
    named = {str(a)[2:].partition("=")[0] for a in task.args if str(a).startswith("--")}
    steps, every = str(training.steps), str(training.eval_every if run.course else training.steps)
    defaults = {
        "max_steps": steps,
        "eval_strategy": "steps",
        "eval_steps": every,
        "logging_steps": "10",
        "save_strategy": "steps",
        "save_steps": steps,
        "warmup_steps": str(max(1, int(training.warmup * training.steps))),
        "lr_scheduler_type": training.schedule,
        "max_grad_norm": str(training.clip),
        "report_to": "none",
        "disable_tqdm": "True",
    }
    given = {"optim": "adamw_torch_fused" if run.optimizer == "adamw" else run.optimizer}
    given |= {"output_dir": folder, "seed": str(run.seed), "data_seed": str(run.seed)}
    others = []
    for name, value in fields.items():
        if name in ARGUMENTS:
            given[ARGUMENTS[name]] = str(value)
        else:
            others.append(f"{name}={value}")
    if others:
        given["optim_args"] = ",".join(others)
    given |= {k: v for k, v in defaults.items() if k not in named}
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "hf_precond", str(task.script), *map(str, task.args), *flags]


def train_script(run: Run, progress: Callable[[int], None]) -> dict[str, Any]:
    """Run the script, and read what its Trainer wrote.

    Args:
        run: the run.
        progress: told the steps at the end; a script does not say how far it is.

    Returns:
        As :func:`hf_precond.bench.training.train`; seconds are those of the
        whole script, loading and evaluations included.

    Raises:
        RuntimeError: the script failed, or left no ``trainer_state.json``.
    """
    folder = tempfile.mkdtemp(prefix="hf_precond_bench_")
    threads = str(run.task.training.threads)
    places = [entry for entry in sys.path if entry]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(places)}
    try:
        before, started = _children(), time.perf_counter()
        log = Path(folder) / "bench.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command(run, str(Path(folder) / "out")), env=environment, stdout=file, stderr=file
            )
            running.append(process)
            code = process.wait()
            running.remove(process)
        seconds = {"wall_seconds": time.perf_counter() - started,
                   "processor_seconds": _children() - before}  # fmt: skip
        if code:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{run.task.script} ended with code {code}:\n{tail}")
        progress(run.task.training.steps)
        return result(_state(Path(folder) / "out", run)) | seconds
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _state(folder: Path, run: Run) -> Mapping[str, Any]:
    """The state that lies deepest in training: of the run itself, else of its last checkpoint."""
    found = sorted(
        folder.glob(f"checkpoint-*/{STATE}"), key=lambda p: int(p.parent.name.rpartition("-")[2])
    )
    for path in (folder / STATE, *reversed(found)):
        if path.exists():
            return json.loads(path.read_text())
    raise RuntimeError(
        f"{run.task.script} wrote no {STATE} into its --output_dir; let its Trainer save a "
        "checkpoint at the end (--save_strategy steps), or call trainer.save_state()."
    )


def result(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a Trainer's log says, in the form of a run's result.

    Args:
        state: of ``trainer_state.json``.

    Returns:
        ``final``, ``train_loss``, ``diverged``, ``steps``, ``evaluations``, ``losses``.

    Raises:
        RuntimeError: there is no evaluation in it.
    """
    history = state["log_history"]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    evaluations = [_figures(entry) for entry in history if "eval_loss" in entry]
    if not evaluations:
        raise RuntimeError(
            f"{STATE} has no eval_loss: give the script an evaluation set (--do_eval), and leave "
            "--eval_strategy to the bench or set it to steps."
        )
    final = {name: value for name, value in evaluations[-1].items() if name != "step"}
    finite = all(map(math.isfinite, [*losses, final["loss"]]))
    tail = losses[-max(1, len(losses) // 10) :] or [math.nan]
    return {
        "diverged": not finite,
        "final": final if finite else {},
        "train_loss": sum(tail) / len(tail),
        "steps": int(state["global_step"]),
        "evaluations": evaluations,
        "losses": losses,
    }


def _figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one evaluation, without the prefix and without its times."""
    times = ("runtime", "per_second")
    found = {
        name.removeprefix("eval_"): float(value)
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(times) and isinstance(value, int | float)
    }
    return {"step": int(entry["step"]), **found}
