"""What differs from device to device: streams, kernels that a backend lacks, the widest float.

A device that is no CPU is an accelerator, whichever it is; only what is asked for here differs
between CUDA (and ROCm), XPU, MPS and others.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import _get_capturable_supported_devices
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

NO_FLOAT64 = ("mps",)
"""Devices without numbers of 64 bits."""

_missing: set[tuple[str, str]] = set()


def is_accelerator(tensor: Tensor) -> bool:
    """Whether a tensor's device works apart from the host, so that a number read makes it wait."""
    return tensor.device.type != "cpu"


@functools.cache
def _has_streams(kind: str) -> bool:
    backend = getattr(torch, kind, None)
    return kind != "cpu" and hasattr(backend, "Event") and hasattr(backend, "current_stream")


def has_streams(device: torch.device) -> bool:
    """Whether a device copies to pinned memory while the host goes on: CUDA, ROCm and XPU do."""
    return _has_streams(device.type)


@functools.cache
def _finds_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_triton(tensor: Tensor) -> bool:
    """Whether Triton is installed and made for a tensor's device: NVIDIA's and AMD's.

    Args:
        tensor: not one that torch pretends to have.
    """
    real = tensor.device.type == "cuda" and not isinstance(tensor, FakeTensor)
    return real and _finds_triton()


class _Done:
    """Stands for the event of a copy that was waited for."""

    def query(self) -> bool:
        """Always reached."""
        return True


def copied_to_host(values: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host and an event whose ``query()`` says whether it has arrived.

    Waits for the device only where it has no streams.

    Args:
        values: on an accelerator.
    """
    device = values.device
    if not has_streams(device):
        return values.cpu(), _Done()
    backend: Any = getattr(torch, device.type)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = backend.Event()
    done.record(backend.current_stream(device))
    return host, done


def wait(device: torch.device) -> None:
    """Wait for what is queued on a device, where copies to the host do not."""
    if has_streams(device):
        backend: Any = getattr(torch, device.type)
        backend.current_stream(device).synchronize()


def synchronize() -> None:
    """Wait for everything that the accelerator in use is doing, if there is one."""
    device = torch.accelerator.current_accelerator()
    if device is not None and (device.type != "cuda" or torch.cuda.is_initialized()):
        torch.accelerator.synchronize()


def empty_cache() -> None:
    """Give the accelerator's cached memory back, if there is one."""
    device = torch.accelerator.current_accelerator()
    if device is not None and (device.type != "cuda" or torch.cuda.is_initialized()):
        torch.get_device_module(device).empty_cache()


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have none."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def is_fused(device: torch.device) -> bool:
    """Whether torch has a fused AdamW for a device."""
    return device.type in _get_fused_kernels_supported_devices()


def is_capturable(device: torch.device) -> bool:
    """Whether torch's AdamW can read its step counts on a device without waiting."""
    return device.type in _get_capturable_supported_devices(supports_xla=False)


@functools.cache
def has_tf32(device: torch.device) -> bool:
    """Whether a device multiplies float32 operands in TF32; nothing on it is waited for.

    CUDA devices of capability 8 and later do, of ROCm's the MI300, and XPUs with matrix engines.
    """
    if device.type == "cuda" and torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return architecture.startswith(("gfx94", "gfx95"))
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return bool(getattr(properties, "has_subgroup_matrix_multiply_accumulate", False))
    return False


def accumulates(device: torch.device) -> bool:
    """Whether a product of half-precision matrices can be returned as it is summed, in float32.

    ``torch.mm(…, out_dtype=torch.float32)``, from torch 2.8 on, is CUDA's alone.
    """
    return device.type == "cuda" and torch.version.hip is None


def kernel(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
    """``function(*tensors)``; on the host where the device has no such kernel (MPS has no eigh).

    Args:
        function: of torch; returns tensors.
        *tensors: of one device.
        **options: passed on.
    """
    device = tensors[0].device
    name = getattr(function, "__name__", repr(function)), device.type
    if name not in _missing:
        try:
            return function(*tensors, **options)
        except NotImplementedError:
            if device.type == "cpu":
                raise
            _missing.add(name)
    result = function(*(tensor.cpu() for tensor in tensors), **options)
    if isinstance(result, Tensor):
        return result.to(device)
    return tuple(part.to(device) for part in result)
