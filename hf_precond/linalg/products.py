"""Precision of large matrix products, and how numbers get to a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hf_precond.compat import devices

Number = TypeVar("Number", float, Tensor)
ALIGNED = 8
"""Entries of a half-precision row that tensor cores want a multiple of."""

Precision = Literal["auto", "highest", "tf32", "bf16"]
Arithmetic = Literal["highest", "tf32", "bf16", "half"]
Kind = Literal["factor", "sign", "solve"]


def arithmetic(precision: Precision, like: Tensor, kind: Kind = "factor") -> Arithmetic:
    """What a setting means for products of a kind, where a tensor lies.

    ========  ==================================================  =======================
    kind      products                                            ``auto``, on accelerators
    ========  ==================================================  =======================
    factor    of gradients with their preconditioners, rotations  TF32, else float32
    sign      in the iteration for the matrix sign                half
    solve     in inverses, roots, decompositions                  float32
    ========  ==================================================  =======================

    Where all of a step is in half precision (AFOpt's of whole layers, NKFAC's), factors are float16
    too, scaled into its range. ``tf32`` and ``bf16`` change ``factor`` alone. ``highest`` is
    float32 for all kinds. TF32 where a device has none is float32. On CPUs, and in float64, all are
    the plain product: nothing is gained there by a lower precision. Nothing is read from the
    device.

    Args:
        precision: a config's.
        like: an operand, for its device and dtype.
        kind: what the products are for.

    Returns:
        ``highest`` for the operands' own precision, ``tf32``, ``bf16``, or ``half`` for bfloat16 or
        float16, whichever loses less there.
    """
    if not devices.is_accelerator(like) or like.dtype == torch.float64 or precision == "highest":
        return "highest"
    if kind != "factor":
        return "half" if kind == "sign" else "highest"
    if precision == "bf16":
        return "bf16"
    return "tf32" if devices.has_tf32(like.device) else "highest"


def matmul(
    a: Tensor, b: Tensor, precision: Precision = "highest", out: Tensor | None = None
) -> Tensor:
    """``a @ b`` in a chosen precision, the result in ``a``'s dtype.

    ``highest`` is float32 throughout, ``tf32`` rounds the operands to 10 bits of mantissa and
    ``bf16`` to 7; both accumulate in float32. See :func:`arithmetic` for ``auto``, CPUs and
    float64. The process-wide setting of torch is left as it was found.

    Args:
        a: ``[…, m, k]``.
        b: ``[…, k, n]``.
        precision: ``auto``, ``highest``, ``tf32`` or ``bf16``.
        out: where the result may be written.

    Returns:
        ``[…, m, n]``.
    """
    if not devices.is_accelerator(a) or a.dtype == torch.float64:
        return torch.matmul(a, b, out=out)
    if arithmetic(precision, a) == "bf16":
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype)
    with float32_products(precision, a):
        return torch.matmul(a, b, out=out)


@contextmanager
def float32_products(precision: Precision, like: Tensor) -> Iterator[None]:
    """Inside, products of float32 tensors on a device are in TF32, or not; restored at the end.

    Nothing happens where the tensors lie on a CPU.

    Args:
        precision: as of :func:`matmul`; ``bf16`` is TF32 here.
        like: an operand, for its device.
    """
    if not devices.is_accelerator(like):
        yield
        return
    tf32 = arithmetic("auto" if precision == "bf16" else precision, like) == "tf32"
    name, value = "allow_tf32", tf32
    setting: Any = torch.backends.cuda.matmul
    if like.device.type == "xpu":
        setting = torch.backends.mkldnn
    elif hasattr(setting, "fp32_precision"):
        name, value = "fp32_precision", "tf32" if tf32 else "ieee"  # type: ignore[assignment]
    before = getattr(setting, name)
    changed = bool(before) != value if isinstance(value, bool) else before != value
    if changed:
        setattr(setting, name, value)
    try:
        yield
    finally:
        if changed:
            setattr(setting, name, before)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, products are computed in their operands' dtype, whatever autocast says outside."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast rounds the operands of products to at this moment; ``None`` where it is off."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def compute_dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter_dtype == torch.float64 else torch.float32


def padded(size: int) -> int:
    """Returns a row's length, or the next multiple of :data:`ALIGNED`."""
    return size + -size % ALIGNED


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
