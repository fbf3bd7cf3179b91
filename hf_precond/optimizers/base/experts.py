"""Stacks of experts as optimizers step them: in runs of experts, to bound the temporaries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_precond.distributed.collectives import full, is_sharded
from hf_precond.optimizers.base.parameters import BoundMatrix

Run = tuple[int, int]
"""The first and the last (exclusive) of some experts."""


def runs(bound: BoundMatrix, size: int, limit: int) -> Iterator[Run]:
    """Runs of experts with at most ``limit`` entries each; all at once of a sharded weight.

    Args:
        bound: the stack.
        size: entries of one expert.
        limit: of a run, which has one expert at least.
    """
    (count,) = bound.matrix.stack
    length = count if is_sharded(bound.weight) else max(1, limit // size)
    for first in range(0, count, length):
        yield first, min(first + length, count)


def gradients(bound: BoundMatrix, run: Run) -> Tensor:
    """``[dW | db]`` of some experts, ``[experts, out, in(+1)]``: a copy.

    Args:
        bound: the stack; its weight has a gradient.
        run: the experts.
    """
    matrix, chosen, bias = bound.matrix, slice(*run), bound.matrix.bias_parameter
    assert bound.weight.grad is not None
    weights = matrix.weight_view(full(bound.weight.grad))[chosen].to(bound.dtype)
    if matrix.bias is None:
        return weights.clone(memory_format=torch.contiguous_format)
    if bias is None or bias.grad is None:
        return torch.cat([weights, weights.new_zeros(*weights.shape[:2], 1)], -1)
    column = matrix.bias_view(full(bias.grad))[chosen].to(bound.dtype)
    return torch.cat([weights, column.unsqueeze(-1)], -1)


class Assembly:
    """Puts the runs of each stack together again."""

    def __init__(self) -> None:
        self.whole: dict[BoundMatrix, tuple[Tensor, int]] = {}

    def add(self, bound: BoundMatrix, run: Run, part: Tensor) -> Tensor | None:
        """Adds a run.

        Args:
            bound: the stack.
            run: its experts.
            part: ``[experts, out, in(+1)]``.

        Returns:
            ``[count, out, in(+1)]`` once every expert is there.
        """
        (count,) = bound.matrix.stack
        if run == (0, count):
            return part
        if bound not in self.whole:
            self.whole[bound] = part.new_empty(count, *part.shape[1:]), 0
        tensor, known = self.whole.pop(bound)
        tensor[slice(*run)] = part
        known += run[1] - run[0]
        if known == count:
            return tensor
        self.whole[bound] = tensor, known
        return None
