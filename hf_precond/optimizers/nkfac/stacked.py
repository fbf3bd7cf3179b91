"""Layers of one shape preconditioned together on an accelerator: a few calls however many they are.

The inverses of a batch are views of one stack, padded to what tensor cores read fast, so that a
step copies none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_precond.linalg.inverses import without_last
from hf_precond.linalg.products import arithmetic, float32_products
from hf_precond.optimizers.base.parameters import (
    BoundMatrix,
    Preconditioned,
    gradient_stacks,
    padded_stack,
    split_stacks,
)
from hf_precond.optimizers.nkfac.factors import KroneckerFactor

if TYPE_CHECKING:
    from hf_precond.optimizers.nkfac.optimizer import NKFAC

ALIGNMENT = 8
"""Tensor cores read rows of a multiple of so many numbers fastest."""

GRADIENT_NORM = 2.0**13
"""To this Frobenius norm gradients are scaled: no entry, and no product with inverses of at most
unit norm, then leaves float16's range."""

TINY = 1e-30


def precondition(optimizer: NKFAC, batch: Sequence[BoundMatrix]) -> Iterator[Preconditioned]:
    """``L̂ G R̂`` at the gradient's norm, of layers of one shape whose same sides have inverses.

    Products are in float16 where the inverses are kept in it and ``precision`` is ``auto``: it has
    TF32's digits, and the scaled gradients stay within its range.

    Args:
        optimizer: whose inverses these are.
        batch: layers that have a gradient.
    """
    first = batch[0]
    sides = [optimizer.factors(bound) for bound in batch]
    inverses = {
        column[0].side: inverse_stack(column)
        for column in zip(*sides, strict=True)
        if column[0]["refreshes"]
    }
    if "input" in inverses and first.bias_rests:
        size = first.matrix.columns
        inputs = inverses["input"].to(first.dtype, copy=True)
        inputs[:, :size, :size] = without_last(inputs[:, :size, :size])
        inverses["input"] = inputs
    precision = optimizer.config.precision
    dtype = first.dtype
    if arithmetic(precision, first.weight) == "bf16":
        dtype = torch.bfloat16
    elif precision == "auto" and optimizer.config.halves(first.weight.dtype):
        dtype = torch.float16
    weights, biases = gradient_stacks(batch)
    norms = torch.linalg.vector_norm(weights, dim=(-2, -1))
    if biases is not None:
        norms = torch.hypot(norms, torch.linalg.vector_norm(biases, dim=-1))
    norms = norms[:, None, None]
    scale = GRADIENT_NORM / norms.clamp(min=TINY)
    rows, columns = weights.shape[1:]
    shape = (len(batch), padded(rows), padded(first.matrix.columns))
    matrices = torch.zeros(shape, dtype=dtype, device=weights.device)
    torch.mul(weights, scale, out=matrices[:, :rows, :columns])
    if biases is not None:
        torch.mul(biases[..., None], scale, out=matrices[:, :rows, columns:][..., :1])
    with float32_products(precision, first.weight):
        if "output" in inverses:
            matrices = torch.bmm(inverses["output"].to(dtype), matrices)
        if "input" in inverses:
            matrices = torch.bmm(matrices, inverses["input"].to(dtype))
    found = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=norms.dtype)
    ratio = optimizer.recovery(norms, found)
    torch.mul(matrices[:, :rows, :columns], ratio, out=weights)
    if biases is not None:
        torch.mul(matrices[:, :rows, columns:][..., :1], ratio, out=biases[..., None])
    for bound, parts in zip(batch, split_stacks(batch, weights, biases), strict=True):
        yield Preconditioned(bound, parts[0], parts=parts)


def padded(size: int) -> int:
    """``size``, or the next multiple of :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def inverse_stack(factors: Sequence[KroneckerFactor]) -> Tensor:
    """The inverses of factors of one size, ``[b, N, N]``, zeros beyond ``[n, n]``.

    Nothing is copied where they are views of such a stack, which they are afterwards.
    """
    size = padded(factors[0].size)
    stack, views = padded_stack([factor["inverse"] for factor in factors], (size, size))
    for factor, view in zip(factors, views or (), strict=False):
        factor["inverse"] = view
    return stack
