"""Predicts the time of a training step from what was traced and what is assumed of a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_precond.cost.batches import make_batch, sequence_length
from hf_precond.cost.counting import Counts, Kernel
from hf_precond.cost.devices import Device
from hf_precond.cost.trace import (
    TracedTraining,
    added,
    on_device,
    pretended_device,
    trace_training,
)

Make = Callable[[], nn.Module]
MOST = 2**30
"""Tokens a step beyond which nobody asks."""


@dataclass
class Prediction:
    """The cost of training a model with an optimizer on a device, by the number of tokens a step.

    Everything that depends on the batch is interpolated between two batches, kernel by kernel.

    Args:
        device: what is assumed.
        training: what was traced.
        adamw: the kernels of fused AdamW's step.
        tokens: of the traced batches.
        length: tokens of a sequence.
    """

    device: Device
    training: TracedTraining
    adamw: list[Kernel]
    tokens: tuple[int, int]
    length: int

    def passes(self, due: bool, tokens: float) -> list[Kernel]:
        """The kernels of forward and backward.

        Args:
            due: whether statistics are collected.
            tokens: a step.
        """
        first, second = self.training.passes[due], self.training.larger[due]
        share = (tokens - self.tokens[0]) / (self.tokens[1] - self.tokens[0])
        if not share or [k.name for k in first] != [k.name for k in second]:
            return first
        return [
            small._replace(
                flops=small.flops + share * (large.flops - small.flops),
                bytes=small.bytes + share * (large.bytes - small.bytes),
            )
            for small, large in zip(first, second, strict=True)
        ]

    def step_ms(self, tokens: float) -> float:
        """Milliseconds of a whole training step, averaged over a period.

        Args:
            tokens: a step.
        """
        total = times = 0.0
        passes = {due: self.passes(due, tokens) for due in self.training.passes}
        for step in self.training.steps:
            kernels = [*passes[step.due], *step.kernels]
            total += step.times * self.device.milliseconds(kernels)
            times += step.times
        return total / times

    def adamw_ms(self, tokens: float) -> float:
        """Milliseconds of a whole training step with fused AdamW.

        Args:
            tokens: a step.
        """
        return self.device.milliseconds([*self.passes(False, tokens), *self.adamw])

    def ratio(self, tokens: float) -> float:
        """A whole step over one with fused AdamW.

        Args:
            tokens: a step.
        """
        return self.step_ms(tokens) / self.adamw_ms(tokens)

    def break_even(self, overhead: float = 0.05) -> int | None:
        """The tokens a step from which the overhead over fused AdamW is lower.

        Args:
            overhead: share of AdamW's step.

        Returns:
            A whole number of sequences; ``None`` where it never is.
        """
        if self.ratio(MOST) > 1 + overhead:
            return None
        low, high = 0, -(-MOST // self.length)
        while high - low > 1:
            middle = (low + high) // 2
            if self.ratio(middle * self.length) <= 1 + overhead:
                high = middle
            else:
                low = middle
        return high * self.length

    def parts(self, tokens: float) -> dict[str, Counts]:
        """What a step consists of: passes, and of the optimizer's three parts an average step.

        Args:
            tokens: a step.
        """
        plain = self.passes(False, tokens)
        average = self.training.average
        share = average.steps
        collected = []
        if True in self.training.passes:
            due = sum(step.times for step in self.training.steps if step.due)
            collected = added(plain, self.passes(True, tokens)) * due
        statistics = [*collected, *average.of("statistics").kernels]
        return {
            "the model's passes": Counts(plain),
            "statistics": Counts(statistics, share),
            "refreshes": average.of("refresh"),
            "the step itself": average.of("step"),
        }


def predict(
    make: Make,
    optimizer: str | Callable[[nn.Module], Any],
    device: Device,
    tokens: int,
    length: int | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Prediction:
    """Trace a model's training and predict its cost; nothing of the model is allocated.

    Args:
        make: makes the model; called inside ``torch.device("meta")``.
        optimizer: a name, or a function of the model that makes any other optimizer.
        device: what is assumed.
        tokens: a step.
        length: tokens of a sequence.
        fields: of a named optimizer.

    Raises:
        ValueError: a field is not legal, the model reads neither ids nor images, or torch is built
            with CUDA and sees no device: its backward pass cannot be traced then.
    """
    if device.kind == "cuda" and torch.version.cuda and not torch.cuda.is_available():
        raise ValueError(
            f"the cost on {device.name} cannot be predicted: this torch is built with CUDA and "
            "sees no device; use torch's build for CPUs, or a machine with a CUDA device."
        )
    with torch.device("meta"):
        model = make()
    length = length or sequence_length(model)
    kind = device.kind
    with pretended_device(kind, device.capability):
        place = torch.device(kind, 0) if kind != "cpu" else torch.device("cpu")
        on_device(model, place)
        batches = [make_batch(model, count, place, length) for count in (tokens, 2 * tokens)]
        counts = tuple(_tokens(batch, length) for batch in batches)
        options: dict[str, Any] = {"kind": kind, "dtype": device.autocast}
        made = optimizer if isinstance(optimizer, str) else optimizer(model)
        options |= {"batch": batches[0], "larger": batches[1]}
        training = trace_training(model, made, **options, **(fields or {}))
        plain = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
        )
        adamw = trace_training(model, plain, None, kind=kind).steps[0].kernels
    return Prediction(device, training, adamw, (counts[0], counts[1]), length)


def _tokens(batch: Mapping[str, Any], length: int) -> int:
    first = next(iter(batch.values()))
    return first.shape[0] * (first.shape[1] if first.dim() == 2 else length)
