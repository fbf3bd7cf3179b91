"""Sees the queries and keys of ``transformers``' attentions as they meet in the logits.

The attentions of transformers look their kernel up by
``AttentionInterface.get_interface`` on every forward. While someone observes,
that method returns the kernel with an observer around it; it is put back when
the last observer is gone. Which model is meant is decided by the attention
module, so models do not mix.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of an attention's kernel.

    Args:
        query, key: per head, ``[B, H, N, d_h]`` and ``[B, H_kv, M, d_h]``, normed and rotated.
        output: what the kernel returned first.
        mask: its attention mask, as the kernel was given it.
        options: its other arguments by name.
        kernel: its name.
    """

    query: Tensor
    key: Tensor
    output: Tensor
    mask: Any
    options: dict[str, Any]
    kernel: str


Observer = Callable[[nn.Module, Call], None]

_OBSERVERS: weakref.WeakKeyDictionary[nn.Module, list[weakref.WeakMethod[Observer]]] = (
    weakref.WeakKeyDictionary()
)
_STATE: dict[str, Any] = {"installed": 0, "enabled": 0, "original": None}


def _interface_class() -> type[Any] | None:
    """``AttentionInterface`` where this transformers has it with ``get_interface``."""
    module = sys.modules.get("transformers.modeling_utils")
    found = getattr(module, "AttentionInterface", None)
    return found if hasattr(found, "get_interface") else None


class Observation:
    """Calls ``observer(module, call)`` at every attention of ``modules``.

    It begins disabled; while no observation is enabled the kernels are handed
    out as they are. The observer (a bound method) is held weakly, and the
    observation ends with it.

    Args:
        modules: the attentions.
        observer: what is called.

    Raises:
        RuntimeError: when this version of transformers has no such look-up.
    """

    def __init__(self, modules: list[nn.Module], observer: Observer) -> None:
        interface = _interface_class()
        if interface is None:
            raise RuntimeError(
                "queries and keys cannot be observed: this version of transformers has no "
                "AttentionInterface.get_interface; use rope='ignored', or transformers>=5.4,<6."
            )
        if _STATE["installed"] == 0:
            _install(interface)
        _STATE["installed"] += 1
        self.live = {"enabled": False}
        reference = weakref.WeakMethod(observer)
        for module in modules:
            _OBSERVERS.setdefault(module, []).append(reference)
        keys = [weakref.ref(module) for module in modules]
        owner = observer.__self__  # type: ignore[attr-defined]
        self.close = weakref.finalize(owner, _end, interface, keys, reference, self.live)

    def enable(self, due: bool) -> None:
        """Observe, or not."""
        if self.close.alive and due != self.live["enabled"]:
            _STATE["enabled"] += 1 if due else -1
            self.live["enabled"] = due


def _end(
    interface: type[Any],
    keys: list[weakref.ref[nn.Module]],
    reference: weakref.WeakMethod[Observer],
    live: dict[str, bool],
) -> None:
    for key in keys:
        module = key()
        if module is not None and module in _OBSERVERS:
            rest = [other for other in _OBSERVERS[module] if other is not reference]
            if rest:
                _OBSERVERS[module] = rest
            else:
                del _OBSERVERS[module]
    _STATE["enabled"] -= live["enabled"]
    live["enabled"] = False
    _STATE["installed"] -= 1
    if _STATE["installed"] == 0:
        interface.get_interface = _STATE["original"]
        _STATE["original"] = None


def _install(interface: type[Any]) -> None:
    original = interface.get_interface

    @functools.wraps(original)
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        kernel = original(self, *args, **kwargs)
        return _observed(kernel) if _STATE["enabled"] else kernel

    _STATE["original"] = original
    interface.get_interface = get_interface


def _observed(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = kernel(module, query, key, *args, **kwargs)
        for reference in _OBSERVERS.get(module, ()):
            observer = reference()
            if observer is not None:
                output = outputs[0] if isinstance(outputs, tuple) else outputs
                mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
                name = getattr(kernel, "__name__", "")
                observer(module, Call(query, key, output, mask, kwargs, name))
        return outputs

    return attend


def observing() -> int:
    """How many observations there are."""
    return _STATE["installed"]
