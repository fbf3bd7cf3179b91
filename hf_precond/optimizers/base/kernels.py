"""Where the Triton kernels of a batch's step serve, and what they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.optimizers.base.parameters import BoundMatrix, whole_layers

LARGEST = 2**30
"""Entries from which a matrix, padded, may be more than the kernels' 32-bit numbers count."""


def for_device(tensor: Tensor) -> ModuleType | None:
    """:mod:`~hf_precond.optimizers.base.triton_kernels`, where a tensor's device takes them.

    Args:
        tensor: any.
    """
    if not devices.has_triton(tensor):
        return None
    from hf_precond.optimizers.base import triton_kernels

    return triton_kernels if triton_kernels.usable(tensor.device) else None


def for_batch(bound: Sequence[BoundMatrix], steps: bool = False) -> ModuleType | None:
    """The same, where they read the gradients of a batch, too: contiguous, stored ``[out, in]``.

    Args:
        bound: matrices that are alike and have gradients.
        steps: whether they are to step the parameters as well.
    """
    first = bound[0]
    if first.dtype != torch.float32 or first.matrix.layout == "transposed":
        return None
    if math.prod(first.matrix.shape) >= LARGEST:
        return None
    found = for_device(first.weight)
    if found is None:
        return None
    for weights, biases in (gradients(bound), parameters(bound))[: 1 + steps]:
        every = [*weights, *(biases or ())]
        contiguous = all(map(Tensor.is_contiguous, every))
        if not contiguous or len({each.dtype for each in every}) > 1:
            return None
    return found


def parameters(bound: Sequence[BoundMatrix]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Weights and biases as they are.

    Args:
        bound: matrices that are alike, all or none with a bias.
    """
    whole = whole_layers(bound)
    assert whole is not None
    weights = [weight.detach() for weight in whole[0]]
    return weights, None if bound[0].matrix.bias is None else [b.detach() for b in whole[1]]


def gradients(bound: Sequence[BoundMatrix]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Their gradients.

    Args:
        bound: matrices that are alike, all or none with a bias.
    """
    whole = whole_layers(bound)
    assert whole is not None
    weights = [weight.grad for weight in whole[0] if weight.grad is not None]
    if bound[0].matrix.bias is None:
        return weights, None
    return weights, [bias.grad for bias in whole[1] if bias.grad is not None]
