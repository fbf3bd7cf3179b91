"""Private names of accelerate, read in 1.7 to 1.15, and the wrapper of ``Accelerator.backward``.

``Trainer``, its subclasses and plain Accelerate loops all hand the loss they
really train to ``Accelerator.backward``, before the loss scaler. It is wrapped
while a listener wants to see the losses.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from hf_precond.compat.torch_internals import loss_scale


def accelerator_state() -> Mapping[str, Any]:
    """The state that every ``Accelerator`` of this process shares.

    Returns:
        ``AcceleratorState._shared_state``; empty where no Trainer or Accelerator has made one.
        accelerate is not imported for it.
    """
    state = sys.modules.get("accelerate.state")
    return {} if state is None else state.AcceleratorState._shared_state


class Listener(Protocol):
    """What wants to see the losses."""

    def observe(self, loss: Tensor, weight: float, scale: Tensor | float | None) -> bool:
        """See a loss before its backward; whether it was this listener's."""

    def release(self) -> None:
        """The backward pass of a loss that was this listener's is done."""


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_MARK = "_hf_precond_original"


def listen(listener: Listener) -> None:
    """Show ``listener`` every loss from now on. Without accelerate, nothing happens."""
    _listeners.add(listener)
    _install()


def stop(listener: Listener | None = None) -> None:
    """No longer show it any; the last one's stop takes the wrapper away.

    Args:
        listener: ``None`` for one that was collected as garbage.
    """
    if listener is not None:
        _listeners.discard(listener)
    if not tuple(_listeners):
        _uninstall()


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        return None
    return Accelerator if callable(getattr(Accelerator, "backward", None)) else None


def _install() -> None:
    accelerator = _accelerator()
    if accelerator is None or hasattr(accelerator.backward, _MARK):
        return
    original = accelerator.backward

    @functools.wraps(original)
    def backward(self: Any, loss: Any, **kwargs: Any) -> Any:
        scale = loss_scale(getattr(self, "scaler", None))
        seen = [
            listener
            for listener in tuple(_listeners)
            if isinstance(loss, Tensor) and listener.observe(loss, _weight(self), scale)
        ]
        try:
            return original(self, loss, **kwargs)
        finally:
            for listener in seen:
                listener.release()

    setattr(backward, _MARK, original)
    accelerator.backward = backward


def _uninstall() -> None:
    accelerator = _accelerator()
    # Whoever wrapped it after us keeps our wrapper inside theirs; it listens to nobody.
    if accelerator is not None and _MARK in accelerator.backward.__dict__:
        accelerator.backward = getattr(accelerator.backward, _MARK)


def _weight(accelerator: Any) -> float:
    """What ``Accelerator.backward`` multiplies the loss by: gradient accumulation."""
    return 1.0 / (getattr(accelerator, "gradient_accumulation_steps", 1) or 1)
