"""Holds the cost model against this processor: predicted and measured ratios to fused AdamW.

    python examples/benchmarks/gpu_check.py

No GPU is needed: ``--device cpu`` measures the machine's rates and predicts from them, and the
same steps are then run. Every kind of step of a period (plain, with statistics, with refreshes) is
measured and weighed as in the prediction, in turns with steps of AdamW. Processor time of one
thread. Steps are shown as they are taken, on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import gpu_tables
import torch
import transformers
from torch import nn

from hf_precond.cost.batches import make_batch
from hf_precond.cost.devices import find_device
from hf_precond.cost.prediction import predict
from hf_precond.cost.trace import schedule_of, set_step

ARMS = ("muon", "afopt", "afopt scope=attention", "adamr basis_tolerance=0", "nkfac", "sgdph")


def minilm() -> nn.Module:
    """The shapes of MiniLM: six layers, width 384."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_labels=5
    )
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    """A ViT of six layers, width 384, on images of 128 by 128."""
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
        image_size=128,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "minilm": minilm, "vit": vit, "tiny": gpu_tables.MODELS["tiny"],
}  # fmt: skip


class Measured:
    """A model in training, stepped at the numbers of a schedule.

    Args:
        arm: its optimizer.
        make: makes the model.
        tokens: a step.
    """

    def __init__(self, arm: str, make: Callable[[], nn.Module], tokens: int) -> None:
        torch.manual_seed(0)
        self.model = make().train()
        self.batch = make_batch(self.model, tokens, torch.device("cpu"))
        self.optimizer = gpu_tables.made(arm)(self.model)
        self.schedule = schedule_of(self.optimizer)
        for step in self.schedule.before:
            self.step(step)
        self.times: list[list[float]] = [[] for _ in self.schedule.steps]

    def step(self, number: int) -> float:
        """One training step; its seconds.

        Args:
            number: of the step.
        """
        optimizer: Any = self.optimizer
        if not self.schedule.consecutive and hasattr(optimizer, "steps"):
            set_step(optimizer, number)
            optimizer._enable_statistics()
        for tensor in self.batch.values():
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                words = getattr(self.model.config, "vocab_size", 0)
                tensor.random_(words if tensor.dim() == 2 else self.model.config.num_labels)
        start = time.process_time()
        optimizer.zero_grad()
        with getattr(optimizer, "curvature_context", contextlib.nullcontext)():
            loss = self.model(**self.batch).loss
            if hasattr(optimizer, "probe"):
                optimizer.probe(loss)
            loss.backward()
        optimizer.step()
        return time.process_time() - start

    def round(self) -> None:
        """Every kind of step once."""
        for place, (number, _) in enumerate(self.schedule.steps):
            self.times[place].append(self.step(number))
            print(".", end="", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Of an average step."""
        weights = [times for _, times in self.schedule.steps]
        medians = [statistics.median(times) for times in self.times]
        total = sum(w * m for w, m in zip(weights, medians, strict=True))
        return total / sum(weights)


def main(argv: list[str] | None = None) -> None:
    """Print the comparison.

    Args:
        argv: arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--models", default="minilm,vit")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| model | optimizer | AdamW, ms | ratio | predicted, ms | ratio | off by |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in arguments.models.split(","):
        for arm in arguments.arms.split(","):
            print(compared(name, arm, arguments.tokens, arguments.rounds), flush=True)


def compared(name: str, arm: str, tokens: int, rounds: int) -> str:
    """A row: measured and predicted, of AdamW and of an optimizer over it.

    Args:
        name: a key of :data:`MODELS`.
        arm: the optimizer.
        tokens: a step.
        rounds: how often every kind of step is taken.
    """
    print(f"{name}, {arm} ", end="", file=sys.stderr, flush=True)
    make = MODELS[name]
    base, measured = (Measured(which, make, tokens) for which in ("adamw", arm))
    device = find_device("cpu")
    prediction = predict(make, gpu_tables.made(arm), device, tokens)
    for _ in range(rounds):
        base.round()
        measured.round()
        base.round()
    print(file=sys.stderr)
    count = prediction.tokens[0]
    found, ratio = measured.seconds / base.seconds, prediction.ratio(count)
    return (
        f"| {name} | `{arm}` | {base.seconds * 1e3:,.0f} | {found:.2f} | "
        f"{prediction.adamw_ms(count):,.0f} | {ratio:.2f} | {ratio / found - 1:+.0%} |"
    )


if __name__ == "__main__":
    main()
