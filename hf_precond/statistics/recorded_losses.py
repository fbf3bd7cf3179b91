"""Calls of a Trainer's ``compute_loss`` that can be made again, with the same random numbers."""

from __future__ import annotations

import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

DATA = 10_000
"""A list of more elements, and a tensor, holds data: no pass changes what is in it."""


class RandomState:
    """The random generators of Python, numpy and torch as they are when this is made.

    Args:
        tensors: the generators of their devices are kept, beside the CPU's.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()
        self.cpu = torch.get_rng_state()
        found = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        # torch.mps has one device, and its functions take none.
        self.devices = [(device, (device,) if device.type != "mps" else ()) for device in found]
        self.states = [torch.get_device_module(d).get_rng_state(*own) for d, own in self.devices]

    def restore(self) -> None:
        """Sets the generators back."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for (device, own), state in zip(self.devices, self.states, strict=True):
            torch.get_device_module(device).set_rng_state(state, *own)


class RecordedLoss:
    """One call of ``compute_loss``, and what the training made of the loss it returned.

    Args:
        owner: the Trainer.
        function: the bound method.
        args: its arguments; containers are copied, for many trainers pop labels.
        kwargs: likewise.
        model: for its devices.

    Attributes:
        factor: the gradient of what was trained in the returned loss, with loss
            scale and accumulation; ``None`` before a backward pass reached it.
        node: of the returned loss, until then.
    """

    factor: Tensor | None = None
    node: Any = None

    def __init__(
        self,
        owner: Any,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        model: nn.Module,
    ) -> None:
        self.owner = owner
        self.function = function
        self.args, self.kwargs = copied(args), copied(kwargs)
        self.random = RandomState(model.parameters())
        self.device = next(model.parameters()).device.type
        enabled = torch.is_autocast_enabled(self.device)
        self.autocast = torch.get_autocast_dtype(self.device) if enabled else None

    def watched(self, returned: Any) -> Any:
        """Returns what the call returned, its loss a copy that is watched.

        The copy's hook tells the factor; hooks of the loss itself, as
        GradCache's, are left alone.

        Args:
            returned: a loss, or a tuple with the loss first.
        """
        loss = loss_in(returned)
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            return returned
        copy = loss.clone()
        held = weakref.ref(self)  # whoever keeps the loss, and its graph, does not keep the record

        def note(gradient: Tensor) -> None:
            record = held()
            if record is not None:
                record._note(gradient)

        copy.register_hook(note)
        self.node = copy.grad_fn
        return (copy, *returned[1:]) if isinstance(returned, tuple) else copy

    def _note(self, gradient: Tensor) -> None:
        gradient = gradient.detach().clone()
        self.factor = gradient if self.factor is None else self.factor + gradient
        self.node = None

    def loss(self, full_precision: bool) -> Tensor:
        """Makes the call again, with the random numbers it had.

        Args:
            full_precision: outside autocast, whatever the call ran in.
        """
        low = self.autocast is not None and not full_precision
        self.random.restore()
        with torch.autocast(self.device, self.autocast) if low else nullcontext():
            loss: Tensor = loss_in(self.function(*copied(self.args), **copied(self.kwargs)))
        return loss


def loss_in(returned: Any) -> Any:
    """Returns the loss in what ``compute_loss`` returned.

    Args:
        returned: a loss, or a tuple with the loss first.
    """
    return returned[0] if isinstance(returned, tuple) else returned


def copied(value: Any) -> Any:
    """Returns a copy of nested containers; what lies in them is shared.

    Args:
        value: anything.
    """
    if isinstance(value, MutableMapping):
        copy = value.copy() if hasattr(value, "copy") else dict(value)
        for key, part in value.items():
            if isinstance(part, (MutableMapping, list)):
                copy[key] = copied(part)
        return copy
    if type(value) in (list, tuple):
        return type(value)(copied(part) for part in value)
    return value


def modules_of(owner: Any) -> list[nn.Module]:
    """Returns the modules that are attributes of an object, also in a list or dictionary.

    Args:
        owner: a Trainer.
    """
    found: list[nn.Module] = []
    for value in vars(owner).values():
        if isinstance(value, Mapping):
            value = list(value.values())
        values = value if isinstance(value, (list, tuple)) and len(value) < DATA else [value]
        found += [part for part in values if isinstance(part, nn.Module)]
    return found


def snapshot(modules: Iterable[nn.Module], owner: Any = None) -> Callable[[], None]:
    """Returns a function that restores attributes and the containers they hold, in place.

    Metrics that a pass appends and counters that it advances are then as
    before. Of other objects only small plain tensors are restored.

    Args:
        modules: every one by itself, without its children.
        owner: a Trainer; its datasets are left out.
    """
    pending: list[Any] = [vars(module) for module in modules]
    skipped: set[int] = set()
    if owner is not None:
        pending += [vars(owner), vars(owner.state)]
        skipped = {id(value) for name, value in vars(owner).items() if name.endswith("_dataset")}
    kept: dict[int, tuple[Any, Any]] = {}
    while pending:
        value = pending.pop()
        if id(value) in kept or id(value) in skipped:
            continue
        if isinstance(value, dict):
            kept[id(value)] = value, dict(value)
            parts: Iterable[Any] = value.values() if len(value) <= DATA else ()
        elif isinstance(value, (list, deque, set)):
            kept[id(value)] = value, list(value)
            parts = value if len(value) <= DATA else ()
        elif type(value) is Tensor and value.numel() <= DATA and not value.requires_grad:
            kept[id(value)] = value, value.clone()
            continue
        else:
            continue
        pending.extend(part for part in parts if isinstance(part, (dict, list, deque, set, Tensor)))

    def restore() -> None:
        for value, copy in kept.values():
            _restore(value, copy)

    return restore


def _restore(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        value.data.copy_(copy)
    elif isinstance(value, dict):
        for key in [key for key in value if key not in copy]:
            del value[key]
        for key, part in copy.items():
            if key not in value or value[key] is not part:
                value[key] = part
    elif len(value) != len(copy) or any(a is not b for a, b in zip(value, copy, strict=True)):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(copy)
