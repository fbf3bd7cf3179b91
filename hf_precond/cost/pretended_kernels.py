"""What the Triton kernels of a step read and write, for a device that is not there.

The functions of :mod:`~hf_precond.optimizers.base.triton_kernels`, one operation a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KERNEL = "hf_precond::kernel"
"""The operation: it reads some tensors and writes others."""

torch.library.define(KERNEL, "(Tensor[] read, Tensor(a!)[] written) -> ()")


@torch.library.register_fake(KERNEL)
def _nothing(read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    return None


def _kernel(read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    torch.ops.hf_precond.kernel(list(read), list(written))


class Matrices:
    """Weights and biases of a batch, or their gradients.

    Args:
        weights: of equal matrices.
        biases: likewise; ``None`` where there are none.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
        self.tensors, self.has_bias = [*weights, *(biases or ())], biases is not None
        self.count = len(weights)


def advance(
    gradients: Matrices,
    momentum: Tensor,
    usual: Tensor,
    columns: int,
    beta: float,
    *,
    blocks: int,
    wide: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Three kernels: momentum and partial sums, their end, the momentum in float16."""
    numbers = momentum.new_empty(2, gradients.count)
    _kernel([*gradients.tensors, momentum], [momentum, numbers])
    _kernel([numbers], [usual, numbers])
    ahead = momentum.new_empty(*momentum.shape[:2], blocks * wide, dtype=torch.float16)
    _kernel([*gradients.tensors, momentum], [ahead])
    return ahead, numbers[0].view(-1, 1, 1)


def frobenius_norms(gradients: Matrices, columns: int) -> Tensor:
    """One kernel, and the sum of its parts."""
    first = gradients.tensors[0]
    parts = torch.empty(gradients.count, 2, device=first.device)
    _kernel(gradients.tensors, [parts])
    return parts.sum(1).sqrt_()


def halved(gradients: Matrices, scales: Tensor, columns: int, shape: tuple[int, int]) -> Tensor:
    """One kernel."""
    out = torch.empty(gradients.count, *shape, dtype=torch.float16, device=scales.device)
    _kernel([*gradients.tensors, scales], [out])
    return out


def scaled_steps(
    found: Tensor, scales: Tensor, columns: int, has_bias: bool, rows: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """One kernel."""
    rows = found.shape[1] if rows is None else rows
    steps = scales.new_empty(len(found), rows, columns)
    rest = scales.new_empty(len(found), rows) if has_bias else None
    _kernel([found, scales], [steps] if rest is None else [steps, rest])
    return steps, rest


def descend(
    parameters: Matrices, found: Tensor, norms: Tensor, lengths: Tensor, *about: Any
) -> None:
    """One kernel."""
    _kernel([*parameters.tensors, found, norms, lengths], parameters.tensors)


def unpacked(packed: Tensor, sizes: Tensor, n: int, wide: int) -> Tensor:
    """One kernel."""
    out = torch.empty(*packed.shape[:-1], wide, wide, dtype=torch.float16, device=packed.device)
    _kernel([packed, sizes], [out])
    return out
