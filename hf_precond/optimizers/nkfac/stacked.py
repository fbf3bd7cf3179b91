"""Layers of one shape preconditioned together on an accelerator: a few calls however many they are.

The inverses of a batch are views of one stack, padded to what tensor cores read fast, so that a
step copies none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_precond.linalg.inverses import without_last
from hf_precond.linalg.products import arithmetic, float32_products, padded
from hf_precond.optimizers.base import kernels
from hf_precond.optimizers.base.layout import state_of
from hf_precond.optimizers.base.parameters import (
    BoundMatrix,
    Preconditioned,
    are_alike,
    gradient_stacks,
    padded_stack,
    split_stacks,
)
from hf_precond.optimizers.nkfac.factors import KroneckerFactor

if TYPE_CHECKING:
    from hf_precond.optimizers.nkfac.optimizer import NKFAC

GRADIENT_NORM = 2.0**13
"""To this Frobenius norm gradients are scaled: no entry, and no product with inverses of at most
unit norm, then leaves float16's range."""

TINY = 1e-17
"""A smaller norm is that of squares that have vanished, and nothing may be scaled to it."""


def precondition(optimizer: NKFAC, batch: Sequence[BoundMatrix]) -> Iterator[Preconditioned]:
    """``L̂ G R̂`` at the gradient's norm, of layers of one shape whose same sides have inverses.

    Products are in float16 where the inverses are kept in it and ``precision`` is ``auto``: it has
    TF32's digits, and the scaled gradients stay within its range.

    Args:
        optimizer: whose inverses these are.
        batch: layers that have a gradient.
    """
    first = batch[0]
    inverses = {
        factor.side: inverse_stack(factor, batch)
        for factor in optimizer.factors(first)
        if factor.is_refreshed
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
    triton = kernels.for_batch(batch) if dtype == torch.float16 and are_alike(batch) else None
    gradients = Stacked(batch) if triton is None else InPlace(batch, triton)
    norms = gradients.norms()
    matrices = gradients.scaled(GRADIENT_NORM / norms.clamp(min=TINY), dtype)
    with float32_products(precision, first.weight):
        if "output" in inverses:
            matrices = torch.bmm(inverses["output"].to(dtype), matrices)
        if "input" in inverses:
            matrices = torch.bmm(matrices, inverses["input"].to(dtype))
    found = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=norms.dtype)
    weights, biases = gradients.steps(matrices, optimizer.recovery(norms, found))
    for bound, parts in zip(batch, split_stacks(batch, weights, biases), strict=True):
        yield Preconditioned(bound, parts[0], parts=parts)


class Stacked:
    """Gradients of a batch in stacks of their own, which become the steps.

    Args:
        batch: layers of one shape that have a gradient.
    """

    def __init__(self, batch: Sequence[BoundMatrix]) -> None:
        self.weights, self.biases = gradient_stacks(batch)
        self.columns = batch[0].matrix.columns

    def norms(self) -> Tensor:
        """Of ``[dW | db]``, ``[n, 1, 1]``."""
        norms = torch.linalg.vector_norm(self.weights, dim=(-2, -1))
        if self.biases is not None:
            norms = torch.hypot(norms, torch.linalg.vector_norm(self.biases, dim=-1))
        return norms[:, None, None]

    def scaled(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """``[dW | db]`` times a number each, padded with zeros."""
        count, rows, columns = self.weights.shape
        shape = count, padded(rows), padded(self.columns)
        matrices = torch.zeros(shape, dtype=dtype, device=scale.device)
        torch.mul(self.weights, scale, out=matrices[:, :rows, :columns])
        if self.biases is not None:
            torch.mul(self.biases[..., None], scale, out=matrices[:, :rows, columns:][..., :1])
        return matrices

    def steps(self, matrices: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
        """The matrices times a number each, weights and biases apart, in place of the gradients."""
        _, rows, columns = self.weights.shape
        torch.mul(matrices[:, :rows, :columns], ratio, out=self.weights)
        if self.biases is not None:
            bias = matrices[:, :rows, columns:][..., :1]
            torch.mul(bias, ratio, out=self.biases[..., None])
        return self.weights, self.biases


class InPlace:
    """As :class:`Stacked`, by Triton kernels that read the gradients where they are.

    Args:
        batch: layers of one shape that have a gradient.
        triton: the kernels.
    """

    def __init__(self, batch: Sequence[BoundMatrix], triton: ModuleType) -> None:
        self.triton, self.matrix = triton, batch[0].matrix
        self.rows, self.columns = self.matrix.shape
        self.gradients = triton.Matrices(*kernels.gradients(batch))

    def norms(self) -> Tensor:
        """Of ``[dW | db]``, ``[n, 1, 1]``."""
        norms: Tensor = self.triton.frobenius_norms(self.gradients, self.columns)
        return norms[:, None, None]

    def scaled(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """``[dW | db]`` times a number each, padded with zeros; in float16."""
        shape = padded(self.rows), padded(self.matrix.columns)
        matrices: Tensor = self.triton.halved(self.gradients, scale, self.columns, shape)
        return matrices

    def steps(self, matrices: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
        """The matrices times a number each, weights and biases apart."""
        joined = self.matrix.bias is not None
        found: tuple[Tensor, Tensor | None] = self.triton.scaled_steps(
            matrices.contiguous(), ratio, self.columns, joined, self.rows
        )
        return found


def inverse_stack(first: KroneckerFactor, batch: Sequence[BoundMatrix]) -> Tensor:
    """The inverses of one side of layers, ``[b, N, N]``, zeros beyond ``[n, n]``.

    Nothing is copied where they are views of such a stack, which they are afterwards.
    """
    size, states, name = padded(first.size), first.states, f"{first.side}_inverse"
    stack, views = padded_stack(state_of(batch, states, name), (size, size))
    for bound, view in zip(batch, views or (), strict=False):
        states[bound.weight][bound.prefix + name] = view
    return stack
