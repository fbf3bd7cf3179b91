"""What the logs of an optimizer cost: training with ``diagnostics=auto`` over ``off``.

    python examples/benchmarks/diagnostics_cost.py
    python examples/benchmarks/diagnostics_cost.py --optim afopt --batch_size 16

A small ViT (4 layers, width 128, the quickstart's) on random images, under two stock Trainers
with ``logging_steps=1`` that take turns step by step in one process: a step is measured from its
begin to the next one's, with its log. Processor time of one thread.

Under ``auto`` a log has the counters, and once in 100 steps a report of what must be computed.
Here every fourth step has one. ``ratio`` is (99 other steps + 1 with a report) / 100, from medians
over steps of the ratio to ``off``'s step beside it; on a busy machine it is good to a few percent.
``log`` is the time spent in making the optimizer's log alone, mixed alike, over ``off``'s step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import hf_precond
from hf_precond.integrations.arguments import own_optimizer
from hf_precond.optimizers.base.optimizer import REPORT_INTERVAL

SETTINGS = ("auto", "off")
REPORT_EVERY = 4


class TakeTurns(TrainerCallback):
    """Lets one of two trainings do a step while the other waits, and measures it."""

    def __init__(self, own: threading.Semaphore, other: threading.Semaphore) -> None:
        self.own, self.other = own, other
        self.start: float | None = None
        self.times: list[float] = []
        self.logs: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        own = own_optimizer(kwargs["optimizer"])
        own.logged = self.timed(own.logged)

    def timed(self, logged: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
        def call() -> dict[str, float]:
            start = time.process_time()
            found = logged()
            self.logs.append(time.process_time() - start)
            return found

        return call

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.start is not None:
            self.times.append(time.process_time() - self.start)
            self.other.release()
        self.own.acquire()
        self.start = time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own = own_optimizer(kwargs["optimizer"])
        if (state.global_step + 1) % REPORT_EVERY == 0:
            own._reported_at = None  # the next step's log has a report

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.other.release()


class Images(torch.utils.data.Dataset):
    """Random images of ten classes, as many as are trained on."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(64, 1, 28, 28, generator=generator)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index % 64], "labels": torch.tensor(index % 10)}


def trainer_of(optim: str, setting: str, steps: int, batch_size: int, folder: str) -> Trainer:
    set_seed(0)
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        image_size=28, patch_size=7, num_channels=1, num_labels=10, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=folder,
        optim=optim,
        optim_args=f"diagnostics={setting}",
        learning_rate=1e-3,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = ViTForImageClassification(config)
    trainer = Trainer(model, arguments, train_dataset=Images(steps * batch_size))
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(optim: str, steps: int, batch_size: int) -> dict[str, TakeTurns]:
    """Train with ``auto`` and with ``off``; seconds of every step but the first."""
    turns = {setting: threading.Semaphore(0) for setting in SETTINGS}
    callbacks, threads = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for setting, other in (SETTINGS, SETTINGS[::-1]):
            # One step more is begun, so that the last one's log is measured.
            trainer = trainer_of(optim, setting, steps + 2, batch_size, folder)
            callbacks[setting] = TakeTurns(turns[setting], turns[other])
            trainer.add_callback(callbacks[setting])
            threads.append(threading.Thread(target=trainer.train))
        for thread in threads:
            thread.start()
        turns[SETTINGS[0]].release()
        for thread in threads:
            thread.join()
    return callbacks


def mixed(values: Sequence[float]) -> float:
    """What a step has on average, of those from the second on; every fourth has a report."""
    kinds: tuple[list[float], list[float]] = ([], [])
    for step, value in enumerate(values, start=2):  # the first step allocates, and is left out
        kinds[step % REPORT_EVERY == 0].append(value)
    other, report = (statistics.median(kind) for kind in kinds)
    return ((REPORT_INTERVAL - 1) * other + report) / REPORT_INTERVAL


def main(argv: Sequence[str] | None = None) -> None:
    names = hf_precond.list_optimizers()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optim", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=40, help="of each training (default 40)")
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args(argv)
    if options.steps < REPORT_EVERY:
        parser.error(f"--steps {options.steps}: it is an integer of at least {REPORT_EVERY}")
    torch.set_num_threads(1)
    print("| optimizer | seconds, off | ratio | log |")
    print("|-----------|--------------|-------|-----|")
    for optim in options.optim:
        found = measure(optim, options.steps, options.batch_size)
        auto, off = (found[setting].times[1:] for setting in SETTINGS)
        ratio = mixed([a / b for a, b in zip(auto, off, strict=True)])
        step = statistics.median(off)
        log = mixed(found["auto"].logs[1 : 1 + len(auto)]) / step
        print(f"| {optim} | {step:.3f} | {ratio:.3f} | {100 * log:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
