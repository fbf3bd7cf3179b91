"""Where a matrix's weight and bias sit in an optimizer's parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.blocks import LayerMatrix
from hf_precond.configs import compute_dtype
from hf_precond.optim.leaf import Leaf

Slot = tuple[int, int]


@dataclass(eq=False)
class PlacedMatrix:
    """A matrix with its place: group and index, which survive a swap of the parameters.

    Args:
        matrix: the matrix.
        weight_slot: group and index of the weight.
        bias_slot: group and index of the bias, ``None`` without one.
    """

    matrix: LayerMatrix
    weight_slot: Slot
    bias_slot: Slot | None

    @property
    def prefix(self) -> str:
        """Put before the names of this matrix's state: empty unless the weight is fused."""
        return f"{self.matrix.part}." if self.matrix.part else ""

    @property
    def weight(self) -> Tensor:
        """The weight as the module holds it now; its state is the matrix's state."""
        return self.matrix.weight_parameter

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the mathematics: float64 for float64 weights, else float32."""
        return compute_dtype(self.weight.dtype)

    def gradient(self) -> Tensor | None:
        """``[dW | db]``, ``[out, in(+1)]`` in ``dtype``; ``None`` without a gradient."""
        if self.weight.grad is None:
            return None
        bias = self.matrix.bias_parameter
        joined = self.matrix.join(self.weight.grad, None if bias is None else bias.grad)
        return joined.to(self.dtype)

    def leaves(
        self,
        matrix: Tensor,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
    ) -> list[Leaf]:
        """``matrix`` ([out, in(+1)]) as the leaves of weight and bias, each with its group."""
        weight_part, bias_part = self.matrix.split(matrix)
        weight = self.weight
        leaves = [
            Leaf(
                self.matrix.target(weight),
                weight_part,
                state[weight],
                self.prefix,
                groups[self.weight_slot[0]],
            )
        ]
        bias = self.matrix.bias_parameter
        if bias is not None and bias_part is not None and self.bias_slot is not None:
            view = self.matrix.bias_view(bias)
            leaves.append(
                Leaf(view, bias_part, state[bias], self.prefix, groups[self.bias_slot[0]])
            )
        return leaves
