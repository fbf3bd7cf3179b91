"""Where the Triton kernels of a batch's step serve, and what they read."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.optimizers.base.parameters import BoundMatrix


def for_device(tensor: Tensor) -> ModuleType | None:
    """:mod:`~hf_precond.optimizers.base.triton_kernels`, where a tensor's device takes them.

    Args:
        tensor: any.
    """
    if not devices.has_triton(tensor):
        return None
    from hf_precond.optimizers.base import triton_kernels

    return triton_kernels if triton_kernels.usable(tensor.device) else None


def for_batch(bound: Sequence[BoundMatrix]) -> ModuleType | None:
    """The same, where they read the gradients of a batch, too: contiguous, stored ``[out, in]``.

    Args:
        bound: matrices that are alike and have gradients.
    """
    first = bound[0]
    if first.dtype != torch.float32 or first.matrix.layout == "transposed":
        return None
    found = for_device(first.weight)
    if found is None:
        return None
    weights, biases = gradients(bound)
    dtype = weights[0].dtype
    alike = all(t.is_contiguous() and t.dtype == dtype for t in (*weights, *(biases or ())))
    return found if alike else None


def gradients(bound: Sequence[BoundMatrix]) -> tuple[list[Tensor], list[Tensor] | None]:
    """The gradients of weights and biases as they are.

    Args:
        bound: matrices that are alike, all or none with a bias.
    """
    weights = [item.weight.grad for item in bound if item.weight.grad is not None]
    if bound[0].matrix.bias is None:
        return weights, None
    biases = [item.matrix.bias_parameter for item in bound]
    return weights, [b.grad for b in biases if b is not None and b.grad is not None]
