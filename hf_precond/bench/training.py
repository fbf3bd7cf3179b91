"""One run: a task trained with one optimizer from one seed."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hf_precond.bench import optimizers, tasks
from hf_precond.bench.spec import Run, Training

Progress = Callable[[int], None]
TELL_EVERY = 10
"""Steps between two reports of progress, which also look whether the run diverged."""


class Clock:
    """Seconds by the clock and of the processor, those of evaluations left out.

    Args:
        device: waited for before the clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.wall, self.processor = device, 0.0, 0.0
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        """Go on."""
        self._wait()
        self._since = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        """Pause, and add what has passed."""
        self._wait()
        assert self._since is not None
        self.wall += time.perf_counter() - self._since[0]
        self.processor += time.process_time() - self._since[1]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rate(training: Training, step: int, decays: bool = True) -> float:
    """The learning rate of a step over its peak.

    ``(s + 1) / w`` during the w steps of warm-up, then 1/2 (1 + cos π p) or
    1 - p, p the share of the remaining steps that has passed.

    Args:
        training: steps, warm-up and schedule.
        step: its number s, from 0.
        decays: whether the rate falls after the warm-up.
    """
    warm = warmup_steps(training)
    if step < warm:
        return (step + 1) / warm
    passed = (step - warm) / max(1, training.steps - warm)
    if not decays or training.schedule == "constant":
        return 1.0
    return 1 - passed if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * passed))


def warmup_steps(training: Training) -> int:
    """The steps of the warm-up, at least one.

    Args:
        training: steps and their share.
    """
    return max(1, int(training.warmup * training.steps))


def train(run: Run, progress: Progress = lambda step: None) -> dict[str, Any]:
    """Train, and evaluate at the steps that the task's settings name.

    Everything random follows the seed: weights, batches, probes. A run ends
    early when its loss is not finite.

    Args:
        run: what to train.
        progress: told the number of steps done.

    Returns:
        What is written as JSON: ``final`` (the last evaluation), ``train_loss``
        (mean of the last tenth), ``diverged``, ``evaluations`` with the seconds
        of training until each, ``losses`` of every step, ``wall_seconds`` and
        ``processor_seconds`` of training, ``state_bytes``, on a GPU ``peak_bytes``.
    """
    if run.task.script is not None:
        from hf_precond.bench.trainer_script import train_script

        return train_script(run, progress)
    training, device = run.task.training, torch.device(run.task.training.device)
    torch.set_num_threads(training.threads)
    _seed(run.seed)
    assert run.task.function is not None
    task = tasks.make(run.task.function, run.seed, run.task.data, run.task.args)
    task.model.to(device).train()
    warm = warmup_steps(training)
    optimizer = optimizers.build(task.model, run.optimizer, run.fields, warm, training.steps)
    try:
        return _loop(run, task, optimizer, device, progress)
    finally:
        if hasattr(optimizer, "close"):
            optimizer.close()


def _loop(
    run: Run, task: tasks.Task, optimizer: Any, device: torch.device, progress: Progress
) -> dict[str, Any]:
    training, own_schedule = run.task.training, optimizers.has_own_schedule(optimizer)
    peaks = [group["lr"] for group in optimizer.param_groups]
    evaluated = set(training.evaluated() if run.course else [training.steps])
    clock, batches = Clock(device), task.draw()
    held: list[torch.Tensor] = []
    evaluations: list[dict[str, Any]] = []
    diverged = False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizers.switch(optimizer, training=True)
    clock.start()
    for step in range(training.steps):
        if not own_schedule:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate(training, step)
        held.append(_step(task, optimizer, _moved(next(batches), device), training))
        if (step + 1) % TELL_EVERY and step + 1 not in evaluated:
            continue
        clock.stop()
        diverged = not all(map(math.isfinite, torch.stack(held[-TELL_EVERY:]).tolist()))
        if diverged:
            break
        if step + 1 in evaluated:
            figures = _evaluate(task, optimizer, training)
            seconds = {"wall_seconds": clock.wall, "processor_seconds": clock.processor}
            evaluations.append({"step": step + 1, **figures, **seconds, **_diagnostics(optimizer)})
            diverged = not math.isfinite(figures["loss"])
        progress(step + 1)
        clock.start()
    losses = torch.stack(held).tolist()
    tail = losses[-max(1, training.steps // 10) :]
    known = ("step", "wall_seconds", "processor_seconds", "diagnostics")
    memory = {"state_bytes": optimizers.state_bytes(optimizer)}
    if device.type == "cuda":
        memory["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return {
        "diverged": diverged,
        "final": {} if diverged else {k: v for k, v in evaluations[-1].items() if k not in known},
        "train_loss": sum(tail) / len(tail),
        "steps": len(losses),
        "wall_seconds": clock.wall,
        "processor_seconds": clock.processor,
        **memory,
        "evaluations": evaluations,
        "losses": losses,
    }


def _step(task: tasks.Task, optimizer: Any, batch: Any, training: Training) -> torch.Tensor:
    """One optimizer step; the loss, which is not read from the device."""
    curvature = getattr(optimizer, "curvature_context", contextlib.nullcontext)
    autocast = torch.autocast(
        training.device.partition(":")[0], torch.bfloat16, enabled=training.precision == "bfloat16"
    )
    optimizer.zero_grad()
    with curvature():
        with autocast:
            loss = task.loss_of(batch)
        if hasattr(optimizer, "probe"):
            optimizer.probe(loss)
        loss.backward()
    if training.clip:
        nn.utils.clip_grad_norm_(task.model.parameters(), training.clip)
    optimizer.step()
    return loss.detach().float().reshape(())


def _evaluate(task: tasks.Task, optimizer: Any, training: Training) -> dict[str, float]:
    """The task's figures as plain numbers."""
    optimizers.switch(optimizer, training=False)
    was_training = task.model.training
    found = task.figures()
    task.model.train(was_training)
    optimizers.switch(optimizer, training=True)
    return found


def _diagnostics(optimizer: Any) -> dict[str, Any]:
    if not hasattr(optimizer, "diagnostics"):
        return {}
    return {"diagnostics": {k: float(v) for k, v in optimizer.diagnostics().items()}}


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _seed(seed: int) -> None:
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
