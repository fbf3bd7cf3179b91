"""A weight (and bias) of a layer, always seen as ``[out, in]`` or ``[out, in + 1]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_precond.blocks.sharding import full

Layout = Literal["linear", "transposed", "conv"]


@dataclass(frozen=True)
class RowSelection:
    """Which output rows of a fused weight belong to a matrix.

    The ``out`` rows are seen as ``[groups, parts, width]``; part ``part`` is
    taken from every group. A sectioned weight (q above k above v) has one
    group: ``RowSelection(1, (0, d), total)``. One interleaved per head has a
    group a head: ``RowSelection(heads, (dh, 2 * dh), total)``.

    Args:
        groups: number of groups that the rows fall into.
        span: first and last row (exclusive) inside each group.
        total: all output rows of the fused weight.
    """

    groups: int
    span: tuple[int, int]
    total: int

    @property
    def rows(self) -> int:
        """Number of rows selected."""
        return self.groups * (self.span[1] - self.span[0])

    @staticmethod
    def complement(selections: list[RowSelection]) -> list[RowSelection]:
        """The rows of one fused weight that none of ``selections`` holds."""
        first = selections[0]
        width, start, rest = first.total // first.groups, 0, []
        for begin, end in sorted(selection.span for selection in selections):
            if begin > start:
                rest.append(RowSelection(first.groups, (start, begin), first.total))
            start = max(start, end)
        if start < width:
            rest.append(RowSelection(first.groups, (start, width), first.total))
        return rest

    def view(self, rows: Tensor) -> Tensor:
        """A view of the selected rows: ``[out, …] -> [groups, rows per group, …]``."""
        grouped = rows.unflatten(0, (self.groups, self.total // self.groups))
        return grouped[:, self.span[0] : self.span[1]]


@dataclass(eq=False)
class LayerMatrix:
    """A matrix of a model, read from its module at the time of use.

    Nothing here keeps a parameter: FSDP2 swaps them, so the module is the
    handle and ``module.weight`` is read anew each time.

    Args:
        name: parameter path without ``.weight``, with ``[q]`` and the like
            behind it where the weight is fused.
        module: the module that holds the weight.
        weight: the attribute that holds the weight.
        bias: the attribute that holds the bias, or ``None`` when there is
            none, it is frozen, or it is not part of the matrix.
        layout: ``linear`` (``[out, in]``), ``transposed`` (``[in, out]``, the
            ``Conv1D`` of GPT-2) or ``conv`` (``[out, in, k…]``, read as
            ``[out, in·k…]``; any weight of more than two dimensions).
        rows: the rows that belong to this matrix, where the weight is fused.
        groups: groups of a grouped convolution (1 otherwise).
        stacked: whether a weight of three dimensions is a stack of matrices
            ``[count, rows, columns]``, as those of experts are.
    """

    name: str
    module: nn.Module
    weight: str = "weight"
    bias: str | None = None
    layout: Layout = "linear"
    rows: RowSelection | None = None
    groups: int = 1
    stacked: bool = False

    @property
    def part(self) -> str:
        """``"q"`` of the name ``"attn.c_attn[q]"``; empty where the weight is not fused."""
        return self.name[self.name.rindex("[") + 1 : -1] if self.name.endswith("]") else ""

    @property
    def weight_parameter(self) -> Tensor:
        """The weight as the module holds it now."""
        return getattr(self.module, self.weight)

    @property
    def bias_parameter(self) -> Tensor | None:
        """The bias as the module holds it now, where it is part of the matrix."""
        return None if self.bias is None else getattr(self.module, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight alone."""
        weight = self.weight_parameter
        if self.layout == "transposed":
            columns, out = weight.shape[0], weight.shape[1]
        else:
            out, columns = weight.shape[0], math.prod(weight.shape[1:])
        return (self.rows.rows if self.rows else out, columns)

    @property
    def columns(self) -> int:
        """``in + 1`` with a bias, ``in`` without."""
        return self.shape[1] + (self.bias is not None)

    def weight_view(self, tensor: Tensor) -> Tensor:
        """The part of a weight-shaped tensor that is this matrix: a view, ``[…, in]``.

        Two-dimensional, except for rows interleaved per head (three) where no
        two-dimensional view exists.
        """
        if self.layout == "transposed":
            tensor = tensor.mT
        elif self.layout == "conv":
            tensor = tensor.flatten(1)
        return self._select(tensor)

    def bias_view(self, tensor: Tensor) -> Tensor:
        """The part of a bias-shaped tensor that is this matrix's: a view."""
        return self._select(tensor)

    def _select(self, tensor: Tensor) -> Tensor:
        if self.rows is None:
            return tensor
        selected = self.rows.view(tensor)
        return selected[0] if self.rows.groups == 1 else selected

    def join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[W | b]``, shape ``[out, in + 1]``, from weight- and bias-shaped tensors.

        ``[out, in]`` when the matrix has no bias. A missing bias tensor
        (no gradient, say) stands for zeros.
        """
        matrix = self.weight_view(weight)
        matrix = matrix.reshape(self.shape)
        if self.bias is None:
            return matrix
        if bias is None:
            column = matrix.new_zeros(matrix.shape[0], 1)
        else:
            column = self.bias_view(bias).reshape(-1, 1).to(matrix.dtype)
        return torch.cat([matrix, column], dim=1)

    def target(self, weight: Tensor) -> Tensor:
        """What a step of this matrix changes in place: the weight, or its rows of a fused one."""
        return weight if self.rows is None else self.weight_view(weight)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[out, in(+1)]`` as weight and bias parts, shaped like :meth:`target` and the bias."""
        weight = matrix if self.bias is None else matrix[:, :-1]
        out: tuple[int, ...] = (-1,)
        if self.rows is None:
            weight = weight.mT if self.layout == "transposed" else weight
            weight = weight.reshape(self.weight_parameter.shape)
        elif self.rows.groups > 1:
            out = (self.rows.groups, -1)
            weight = weight.reshape(*out, matrix.shape[1] - (self.bias is not None))
        if self.bias is None:
            return weight.contiguous(), None
        return weight.contiguous(), matrix[:, -1].reshape(out).contiguous()

    def read(self) -> Tensor:
        """``[W | b]`` as it stands now, ``[out, in(+1)]``, detached, gathered if sharded."""
        bias = self.bias_parameter
        return self.join(
            full(self.weight_parameter.detach()), None if bias is None else full(bias.detach())
        )
