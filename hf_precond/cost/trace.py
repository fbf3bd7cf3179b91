"""Runs training steps on a pretended device: the model's passes and the optimizer's own code."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hf_precond.compat.pretended_device import autocast, pretended, replaced
from hf_precond.cost.counting import Counts, Kernel, OperationCounter
from hf_precond.registry import create_optimizer
from hf_precond.statistics.requests import Statistic, StatisticsSource

ONCE = ("exact_interval",)
"""Intervals in units of another one, too long to be traced."""
STARTS = 3
"""Periods before the traced one: with few statistics, refreshes are exact and more frequent."""
FEW = 4
"""So many steps of a period that are not plain are traced each; of more, like ones once."""


@contextmanager
def pretended_device(kind: str = "cuda", capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Inside, new tensors are on a device that is not there; see ``compat/pretended_device.py``.

    Args:
        kind: ``cuda``, ``cpu`` or another type of device.
        capability: of a CUDA device.
    """
    from hf_precond.cost import pretended_kernels
    from hf_precond.optimizers.adamr import batch
    from hf_precond.optimizers.base import kernels
    from hf_precond.optimizers.base.refresh import FailureRecord

    has_triton = kind == "cuda" and capability >= (7, 0)
    with (
        warnings.catch_warnings(),
        replaced(
            kernels,
            "for_device",
            lambda tensor: pretended_kernels if has_triton and tensor.is_cuda else None,
        ),
        replaced(batch, "adjacent", _adjacent),
        # Flags that the host reads hold no numbers: none of them is a failure.
        replaced(FailureRecord, "_judge", lambda *about: None),
        pretended(kind, capability),
    ):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", message=".*CUDA is not available")
        yield


def _adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """``optimizers/adamr/batch.py:adjacent``, for tensors that lie nowhere in memory."""
    first = parts[0]
    if len(parts) == 1:
        return first
    storage: Any = first.untyped_storage()
    for number, part in enumerate(parts):
        held: Any = part.untyped_storage()
        place = first.storage_offset() + number * first.numel()
        if held._cdata != storage._cdata or part.storage_offset() != place:
            return None
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def on_device(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model with parameters and buffers that only claim to be on a device; ties are kept.

    Args:
        model: of the meta device, say; changed in place.
        device: the device.
        dtype: of what is a floating-point number; ``None`` leaves it.
    """
    made: dict[int, Tensor] = {}

    def pretend(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if id(tensor) not in made:
            new: Tensor = torch.empty(tensor.shape, dtype=kind, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = pretend(tensor)  # type: ignore[assignment]
    return model


class Repeated(StatisticsSource):
    """Statistics of the same shapes at every step, without passes.

    Args:
        taken: statistics that passes have brought.
    """

    def __init__(self, taken: Mapping[str, Statistic]) -> None:
        self.taken = taken

    def take(self) -> dict[str, Statistic]:
        """Statistics of no numbers."""
        return {
            key: Statistic(torch.empty_like(old.sum), torch.empty_like(old.count))
            for key, old in self.taken.items()
        }

    def enable(self, due: bool, step: int) -> None:
        """They are there at every step."""
        return

    def drop(self) -> None:
        """Nothing is kept."""
        return

    def close(self) -> None:
        """There are no hooks."""
        return


@dataclass
class TracedStep:
    """A step of a schedule.

    Args:
        times: how often it comes in a period.
        due: whether statistics are collected in its passes.
        kernels: of ``step()``.
    """

    times: int
    due: bool
    kernels: list[Kernel]


@dataclass
class TracedTraining:
    """What the steps of a training consist of, once the first refreshes are over.

    Args:
        passes: the kernels of forward and backward without statistics; by ``False``. With
            statistics; by ``True``. Empty where no passes were traced.
        steps: those of a period.
        larger: like ``passes``, of a larger batch, where one was given.
    """

    passes: dict[bool, list[Kernel]]
    steps: list[TracedStep]
    larger: dict[bool, list[Kernel]] = field(default_factory=dict)

    @property
    def plain(self) -> Counts:
        """Of ``step()`` where nothing else is due, or of the cheapest where something always is."""
        quiet = [s for s in self.steps if not s.due and not _has(s, "refresh")]
        return Counts(min(quiet or self.steps, key=lambda s: len(s.kernels)).kernels)

    @property
    def with_statistics(self) -> Counts:
        """Of ``step()`` with statistics, of the cheapest such step."""
        due = [step for step in self.steps if step.due]
        return Counts(min(due, key=lambda s: len(s.kernels)).kernels if due else [])

    @property
    def refresh(self) -> Counts:
        """Of the refreshes of all preconditioners, averaged over a period."""
        return self.average.of("refresh")

    @property
    def average(self) -> Counts:
        """Of ``step()``, averaged over a period."""
        kernels = [k for step in self.steps for k in step.kernels * step.times]
        return Counts(kernels, sum(step.times for step in self.steps))

    @property
    def collection(self) -> Counts:
        """What statistics add to the passes of a step where they are due."""
        return Counts(added(self.passes.get(False, ()), self.passes.get(True, ())))

    @property
    def due_share(self) -> float:
        """The share of steps with statistics."""
        due = sum(step.times for step in self.steps if step.due)
        return due / sum(step.times for step in self.steps)


def added(plain: Sequence[Kernel], due: Sequence[Kernel]) -> list[Kernel]:
    """The kernels that statistics add to the passes, or put in the place of others.

    Args:
        plain: of passes without statistics.
        due: of passes with statistics.
    """
    return list((Counter(due) - Counter(plain)).elements())


def _has(step: TracedStep, phase: str) -> bool:
    return any(kernel.phase == phase for kernel in step.kernels)


def trace_training(
    model: nn.Module,
    optimizer: str | Any,
    batch: Mapping[str, Tensor] | None,
    kind: str = "cuda",
    dtype: torch.dtype | None = torch.bfloat16,
    counter: OperationCounter | None = None,
    whole_period: bool = True,
    larger: Mapping[str, Tensor] | None = None,
    **fields: Any,
) -> TracedTraining:
    """Trace the passes of a model, and a period of an optimizer's steps.

    Call it inside :func:`pretended_device`.

    Args:
        model: on the pretended device.
        optimizer: a name, or one of torch's optimizers over the model's parameters.
        batch: what the model is called with; ``None`` leaves the passes out.
        kind: type of the device.
        dtype: of autocast; ``None`` for none.
        counter: records; a new one by default.
        whole_period: whether statistics and refreshes are traced, or a plain step alone.
        larger: a larger batch, whose passes are traced too.
        **fields: of the optimizer.
    """
    counter = counter or OperationCounter(kind)
    if isinstance(optimizer, str):
        optimizer = create_optimizer(model, optimizer, **fields)
    passes: tuple[dict[bool, list[Kernel]], ...] = {}, {}
    taken: Mapping[str, Statistic] = {}
    source = getattr(optimizer, "statistics", None)
    for due in (False, True):
        if batch is None or (due and source is None):
            continue
        for found, data in zip(passes, (batch, larger), strict=True):
            if data is None:
                continue
            if source is not None:
                source.enable(due, 0)
            found[due] = one_pass(model, optimizer, data, kind, dtype, counter)
            if due:
                with unset_fake_temporarily():  # it looks at flags of its own
                    taken = source.take()  # type: ignore[union-attr]
    if hasattr(optimizer, "close"):
        if batch is None and source is not None:
            taken = _unseen(optimizer)
        optimizer.close()
        optimizer.statistics = Repeated(taken) if taken else None
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None and batch is None:
            parameter.grad = torch.empty_like(parameter)
    steps = list(_period(optimizer, counter, whole_period))
    return TracedTraining(passes[0], steps, passes[1])


def one_pass(
    model: nn.Module,
    optimizer: Any,
    batch: Mapping[str, Tensor],
    kind: str,
    dtype: torch.dtype | None,
    counter: OperationCounter,
) -> list[Kernel]:
    """The kernels of one forward and backward pass, with what the optimizer collects in it.

    Args:
        model: the model.
        optimizer: its optimizer.
        batch: what the model is called with.
        kind: type of the device.
        dtype: of autocast.
        counter: records.
    """
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    counter.records = []
    context = getattr(optimizer, "curvature_context", nullcontext)
    with counter, counter.during("passes"), context():
        with autocast(kind, dtype):
            loss = loss_of(model(**batch))
        if hasattr(optimizer, "probe"):
            optimizer.probe(loss)
        loss.backward()
    return counter.records


def loss_of(outputs: Any) -> Tensor:
    """The loss that a model returns, or a mean of its first output.

    Args:
        outputs: of the model.
    """
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    mean: Tensor = first.float().square().mean()
    return mean


def _unseen(optimizer: Any) -> dict[str, Statistic]:
    """What passes would have brought, for every request."""
    from hf_precond.statistics.moments import request_shape

    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    return {
        request.key: Statistic(
            torch.empty(request_shape(request), device=device), torch.empty((), device=device)
        )
        for request in optimizer.requests()
    }


@dataclass
class Schedule:
    """The steps of a period of an optimizer, like ones once.

    Args:
        before: steps that come first, by number; of all but the first only the statistics matter.
        steps: those of the period, with how often each comes.
        consecutive: whether they must be taken one after the other: views of AdamR count their
            own, and refreshes come at any of them. Then the numbers have no meaning.
    """

    before: list[int]
    steps: list[tuple[int, int]]
    consecutive: bool = False


def schedule_of(optimizer: Any, whole: bool = True) -> Schedule:
    """What there is to trace, or to measure, of an optimizer.

    Args:
        optimizer: one of this package's, or of torch's.
        whole: ``False`` for plain steps alone.
    """
    config = getattr(optimizer, "config", None)
    due = getattr(optimizer, "due", lambda step: False)
    intervals: dict[str, int] = {}
    if config is not None:
        named = {name: value for name, value in vars(config).items() if name.endswith("_interval")}
        intervals = {name: value for name, value in named.items() if name not in ONCE}
    period = max(intervals.values(), default=1)
    if "adamr" in (getattr(config, "name", ""), getattr(config, "base", "")):
        period = max(period, intervals.get("basis_interval", 3))
        return Schedule([0] * (2 * period + 2), [(0, 1)] * period, consecutive=True)
    before = STARTS if intervals and whole else 1
    kinds: dict[Any, list[int]] = {}
    for step in range(before * period, (before + 1) * period):
        kind = (due(step), *(step % interval == 0 for interval in intervals.values()))
        kinds.setdefault(kind, []).append(step)
    quiet = kinds.pop((False,) * (1 + len(intervals)), [])
    kinds = kinds if whole or not quiet else {}
    busy = [step for steps in kinds.values() for step in steps]
    groups = [[step] for step in sorted(busy)] if len(busy) <= FEW else list(kinds.values())
    steps = [(group[0], len(group)) for group in (*groups, quiet) if group]
    return Schedule([number * period for number in range(before)], steps)


def _period(optimizer: Any, counter: OperationCounter, whole: bool) -> Iterator[TracedStep]:
    """The steps of a period, traced."""
    schedule = schedule_of(optimizer, whole)
    due = getattr(optimizer, "due", lambda step: False)
    for number, step in enumerate(schedule.before):
        if not schedule.consecutive:
            set_step(optimizer, step)
            if number:
                optimizer._apply = _nothing
        one_step(optimizer, counter)
    optimizer.__dict__.pop("_apply", None)
    for step, times in schedule.steps:
        if not schedule.consecutive:
            set_step(optimizer, step)
        now = optimizer.steps if schedule.consecutive else step
        yield TracedStep(times, due(now), one_step(optimizer, counter))


def _nothing() -> None:
    pass


def set_step(optimizer: Any, step: int) -> None:
    """Make a step the next one.

    Args:
        optimizer: the optimizer.
        step: its number.
    """
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step


def one_step(optimizer: Any, counter: OperationCounter) -> list[Kernel]:
    """The kernels of one ``step()``, by phase: ``statistics``, ``refresh`` and ``step``.

    Args:
        optimizer: the optimizer.
        counter: records.
    """
    counter.records = []
    named = {"_update_statistics": "statistics", "refresh": "refresh"}
    for name, phase in named.items():
        if hasattr(optimizer, name):
            setattr(optimizer, name, _phased(getattr(optimizer, name), counter, phase))
    with counter, counter.during("step"):
        optimizer.step()
    for name in named:
        optimizer.__dict__.pop(name, None)
    return counter.records


def _phased(method: Any, counter: OperationCounter, phase: str) -> Any:
    def inside() -> None:
        with counter.during(phase):
            method()

    return inside
