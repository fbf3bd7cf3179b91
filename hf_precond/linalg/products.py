"""Precision of large matrix products, and how numbers get to a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hf_precond.compat import devices

Number = TypeVar("Number", float, Tensor)
Precision = Literal["highest", "tf32", "bf16"]


def matmul(
    a: Tensor, b: Tensor, precision: Precision = "highest", out: Tensor | None = None
) -> Tensor:
    """``a @ b`` in a chosen precision, the result in ``a``'s dtype.

    On a CPU, and for float64 operands, every setting is the plain product:
    nothing is gained there by a lower precision. On a GPU ``highest`` is
    float32 throughout, ``tf32`` rounds the operands to 10 bits of mantissa
    and ``bf16`` to 7; both accumulate in float32. The process-wide setting of
    torch is left as it was found.

    Args:
        a: ``[…, m, k]``.
        b: ``[…, k, n]``.
        precision: ``highest``, ``tf32`` or ``bf16``.
        out: where the result may be written.

    Returns:
        ``[…, m, n]``.
    """
    if not devices.is_accelerator(a) or a.dtype == torch.float64:
        return torch.matmul(a, b, out=out)
    if precision == "bf16":
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype)
    with float32_products(tf32=precision == "tf32"):
        return torch.matmul(a, b, out=out)


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Inside, float32 products on GPUs are rounded to TF32 (or not); restored at the end."""
    setting = torch.backends.cuda.matmul
    if hasattr(setting, "fp32_precision"):
        name, value = "fp32_precision", "tf32" if tf32 else "ieee"
    else:
        name, value = "allow_tf32", tf32  # type: ignore[assignment]
    before = getattr(setting, name)
    setattr(setting, name, value)
    try:
        yield
    finally:
        setattr(setting, name, before)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, products are computed in their operands' dtype, whatever autocast says outside."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def compute_dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter_dtype == torch.float64 else torch.float32


def from_cpu(numbers: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns a CPU tensor in a dtype and on a device; a GPU is not waited for.

    A copy from pageable memory would make the host wait for all that is queued
    on the GPU, so it goes through pinned memory, which the allocator keeps
    until the copy is done.

    Args:
        numbers: on the CPU.
        device: of the result.
        dtype: of the result.
    """
    if not devices.has_streams(device):
        return numbers.to(dtype).to(device)
    pinned = torch.empty(numbers.shape, dtype=dtype, pin_memory=True)
    return pinned.copy_(numbers).to(device, non_blocking=True)


def averaging_weight(updates: Number, decay: float) -> Number:
    """Returns ``b = min(decay, 1 - 1/k)``, the weight of a running average at its k-th update.

    ``A ← b A + (1 - b) x`` with it has no start-up bias: the first update sets
    A, the second averages two values, and so on until the decay takes over.

    Args:
        updates: k >= 1, this update counted; a tensor in the dtype of the average.
        decay: in [0, 1).
    """
    if isinstance(updates, Tensor):
        return (1 - 1 / updates).clamp(max=decay)
    return min(decay, 1 - 1 / updates)
