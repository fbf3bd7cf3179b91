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
from typing import Any

from torch import Tensor, nn

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor], None]

_OBSERVERS: weakref.WeakKeyDictionary[nn.Module, list[weakref.WeakMethod[Observer]]] = (
    weakref.WeakKeyDictionary()
)
_INSTALLED: dict[str, Any] = {"count": 0, "original": None}


def _interface_class() -> type[Any] | None:
    """``AttentionInterface`` where this transformers has it with ``get_interface``."""
    module = sys.modules.get("transformers.modeling_utils")
    found = getattr(module, "AttentionInterface", None)
    return found if hasattr(found, "get_interface") else None


def observe(modules: list[nn.Module], observer: Observer) -> Callable[[], None]:
    """Call ``observer(module, query, key, output)`` at every attention of ``modules``.

    Query and key are per head, ``[B, H, N, d_h]`` and ``[B, H_kv, M, d_h]``,
    normed and rotated. The observer (a bound method) is held weakly.

    Returns:
        A function that ends it; calling it twice does no harm.

    Raises:
        RuntimeError: when this version of transformers has no such look-up.
    """
    interface = _interface_class()
    if interface is None:
        raise RuntimeError(
            "queries and keys cannot be observed: this version of transformers has no "
            "AttentionInterface.get_interface; use rope='ignored', or transformers>=5.4,<6."
        )
    if _INSTALLED["count"] == 0:
        _install(interface)
    _INSTALLED["count"] += 1
    reference = weakref.WeakMethod(observer)
    for module in modules:
        _OBSERVERS.setdefault(module, []).append(reference)
    keys = [weakref.ref(module) for module in modules]
    owner = observer.__self__  # type: ignore[attr-defined]
    return weakref.finalize(owner, _end, interface, keys, reference)


def _end(
    interface: type[Any],
    keys: list[weakref.ref[nn.Module]],
    reference: weakref.WeakMethod[Observer],
) -> None:
    for key in keys:
        module = key()
        if module is not None and module in _OBSERVERS:
            rest = [other for other in _OBSERVERS[module] if other is not reference]
            if rest:
                _OBSERVERS[module] = rest
            else:
                del _OBSERVERS[module]
    _INSTALLED["count"] -= 1
    if _INSTALLED["count"] == 0:
        interface.get_interface = _INSTALLED["original"]
        _INSTALLED["original"] = None


def _install(interface: type[Any]) -> None:
    original = interface.get_interface

    @functools.wraps(original)
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return _observed(original(self, *args, **kwargs))

    _INSTALLED["original"] = original
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
                observer(module, query, key, output)
        return outputs

    return attend


def observing() -> int:
    """How many observers there are."""
    return _INSTALLED["count"]
