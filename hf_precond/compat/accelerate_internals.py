"""The wrapper of ``Accelerator.backward``, read in accelerate 1.7 to 1.15.

``Trainer``, its subclasses and plain Accelerate loops all hand the loss they
really train to ``Accelerator.backward``, before the loss scaler. It is wrapped
while there are listeners.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from hf_precond.compat.torch_internals import loss_scale


class Listener(Protocol):
    """What observes the losses that are trained."""

    def observe(self, loss: Tensor, weight: float, scale: Tensor | float | None) -> bool:
        """Observes a loss before its backward pass.

        Args:
            loss: the loss.
            weight: what the training multiplies it by.
            scale: the loss scale, ``None`` for 1.

        Returns:
            Whether it is a loss of this listener's model.
        """

    def release(self) -> None:
        """Ends the backward pass of a loss of this listener's model."""


_LISTENERS: list[weakref.ref[Listener]] = []
_WRAPPERS: list[Any] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Shows a listener, held weakly, every loss from now on; without accelerate, nothing happens.

    Args:
        listener: the listener.

    Returns:
        A function that ends it; the last one restores ``Accelerator.backward``.
    """
    reference = weakref.ref(listener)
    _LISTENERS.append(reference)
    accelerator = _accelerator()
    if accelerator is not None and not _WRAPPERS:
        _WRAPPERS.append(_wrapped(accelerator.backward))
        accelerator.backward = _WRAPPERS[0]

    def stop() -> None:
        _LISTENERS.remove(reference)
        # If something else has wrapped ours since, ours stays inside it, without listeners.
        if accelerator is not None and not _LISTENERS and accelerator.backward in _WRAPPERS:
            accelerator.backward = _WRAPPERS.pop().__wrapped__

    return stop


@contextmanager
def outside_autocast(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Runs modules without the autocast that ``Accelerator.prepare`` wraps their forward in.

    Args:
        modules: the modules, wrapped or not.
    """
    wrapped = [m for m in modules if {"forward", "_original_forward"} <= vars(m).keys()]
    forwards = [module.forward for module in wrapped]
    for module in wrapped:
        vars(module)["forward"] = module._original_forward
    try:
        yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            vars(module)["forward"] = forward


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        return None
    return Accelerator if callable(getattr(Accelerator, "backward", None)) else None


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def backward(self: Any, loss: Any, **kwargs: Any) -> Any:
        scale = loss_scale(getattr(self, "scaler", None))
        # Accelerator.backward divides the loss by the steps of gradient accumulation.
        weight = 1.0 / (getattr(self, "gradient_accumulation_steps", 1) or 1)
        listeners = [reference() for reference in _LISTENERS] if isinstance(loss, Tensor) else []
        involved = [x for x in listeners if x is not None and x.observe(loss, weight, scale)]
        try:
            return original(self, loss, **kwargs)
        finally:
            for listener in involved:
                listener.release()

    return backward
