"""A device that torch only pretends to have: tensors have a place, a shape and a dtype, no numbers.

Under ``FakeTensorMode`` torch's own rules say what each operation returns, and which devices may
meet. What is missing for a machine without the device stands here: guards, streams, and a backward
pass, whose engine asks for the device's streams.
"""

from __future__ import annotations

import ctypes
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from hf_precond.compat import devices

GUARDS = {"cuda": 1, "xpu": 12, "mps": 13, "meta": 14}
"""Places of the device guards in torch's registry."""


class Event:
    """Stands for ``torch.cuda.Event``, which needs a driver: always reached."""

    def record(self, stream: Any = None) -> None:
        """Nothing is queued."""

    def query(self) -> bool:
        """Always reached."""
        return True


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value.

    Args:
        owner: the object or module.
        name: of the attribute.
        value: what it is inside.
    """
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def pretended(kind: str = "cuda", capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Inside, torch has a device of a kind, and new tensors hold no numbers.

    Args:
        kind: ``cuda``, ``xpu``, ``mps`` or ``cpu``.
        capability: what ``torch.cuda.get_device_capability`` says.

    Raises:
        NotImplementedError: this build of torch keeps its device guards elsewhere.
    """
    with ExitStack() as stack:
        if kind in ("cuda", "xpu"):
            backend, stream = getattr(torch, kind), types.SimpleNamespace(synchronize=lambda: None)
            stack.enter_context(replaced(backend, "Event", Event))
            stack.enter_context(replaced(backend, "current_stream", lambda device=None: stream))
        if kind == "cuda":
            stack.enter_context(
                replaced(torch.cuda, "get_device_capability", lambda device=None: capability)
            )
        # What is remembered of real devices says nothing of this one.
        stack.enter_context(
            replaced(devices, "has_tf32", lambda device: kind == "cuda" and capability >= (8, 0))
        )
        if kind != "cpu":
            stack.enter_context(_guarded(kind))
        # A queue of the engine belongs to a device of which there is none.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(FusedAttention())
        yield


@contextmanager
def _guarded(kind: str) -> Iterator[None]:
    """The guard of meta tensors, which does nothing, stands in for the device's.

    Indexing asks which device is current; a build without the device has nobody to answer.
    """
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so")
    try:
        guards = (ctypes.c_void_p * 16).in_dll(
            ctypes.CDLL(library), "_ZN3c104impl26device_guard_impl_registryE"
        )
    except (OSError, ValueError) as error:
        raise NotImplementedError(
            "this build of torch keeps its device guards elsewhere, so no device can be pretended."
        ) from error
    place, before = GUARDS[kind], guards[GUARDS[kind]]
    if not before or not getattr(torch, kind).is_available():
        guards[place] = guards[GUARDS["meta"]]
    try:
        yield
    finally:
        guards[place] = before


META = torch.device("meta")
# From a dispatch to the next: modes, what is wrapped around them, and the operation itself.
PASSING = {"__torch_dispatch__", "__torch_function__", "__call__", "_fn", "inner"}


def device_for_engine(device: torch.device) -> torch.device:
    """What a dispatch mode answers to the question for a tensor's device.

    The autograd engine would ask a pretended device for its streams; those on the meta device
    have none. Its backward formulas make tensors there: see :func:`placed`.

    Args:
        device: the tensor's.
    """
    return META if device.type != "cpu" and in_engine() else device


def placed(kwargs: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """The options of an operation, on the pretended device where the engine asks for meta.

    Args:
        kwargs: the options.
        device: the pretended device.
    """
    if kwargs.get("device") == META and in_engine():
        return {**kwargs, "device": device}
    return kwargs


def in_engine() -> bool:
    """Whether the autograd engine itself has called, not a hook or function that it runs."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in PASSING:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


@contextmanager
def autocast(kind: str, dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast``, also for a device that is not there.

    Args:
        kind: of the device.
        dtype: of products; ``None`` for no autocast.
    """
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype(kind, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])


class FusedAttention(TorchFunctionMode):
    """Calls the fused kernels of attention, which torch would choose if it had the device.

    Where they are switched off (for second derivatives) nothing is changed.
    """

    def __torch_function__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        fused = torch.backends.cuda.flash_sdp_enabled()
        attends = function is torch.nn.functional.scaled_dot_product_attention
        if attends and fused and args[0].device.type == "cuda":
            return _fused_attention(*args, **kwargs)
        return function(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    aten = torch.ops.aten
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = aten._scaled_dot_product_flash_attention
        result: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return result
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:
        shape = (*query.shape[:3], key.shape[2])
        attn_mask = attn_mask.to(query.dtype).expand(shape)
    efficient = aten._scaled_dot_product_efficient_attention
    result = efficient(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return result
