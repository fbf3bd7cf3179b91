"""What is read off a model, as plain values: matrices, attentions, norms, the routing table.

No value here holds a parameter, since FSDP2 replaces parameters. Each holds the
module, and reads the parameter from it at the time of use.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from hf_precond.distributed.collectives import full

if TYPE_CHECKING:
    from hf_precond.architectures.attention_block import AttentionBlock

Layout = Literal["linear", "transposed", "conv"]
Owner = tuple[str, nn.Module, str]
"""Name of a parameter, the module that holds it, and the attribute."""


@dataclass(frozen=True)
class RowSelection:
    """Which output rows of a fused weight belong to a matrix.

    The rows are viewed as ``[groups, rows of a group]``, and the same span is
    taken from every group. A sectioned weight (q above k above v) has one
    group: ``RowSelection(1, (0, d), total)``. One interleaved by head has a
    group a head: ``RowSelection(heads, (d_h, 2 * d_h), total)``.

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
        for begin, end in [*sorted(selection.span for selection in selections), (width, width)]:
            if begin > start:
                rest.append(RowSelection(first.groups, (start, begin), first.total))
            start = max(start, end)
        return rest

    def view(self, rows: Tensor) -> Tensor:
        """A view of the selected rows: ``[out, …] -> [groups, rows per group, …]``."""
        grouped = rows.unflatten(0, (self.groups, self.total // self.groups))
        return grouped[:, self.span[0] : self.span[1]]


@dataclass(eq=False)
class LayerMatrix:
    """A matrix of a model: the weight of a layer or some of its rows, with the bias beside it.

    Args:
        name: parameter path without ``.weight``, followed by ``[q]`` and the
            like where the weight is fused.
        module: the module that holds the weight.
        weight: the attribute that holds the weight.
        bias: the attribute that holds the bias; ``None`` when there is none,
            it is frozen, or it is not part of the matrix.
        layout: ``linear`` (``[out, in]``), ``transposed`` (``[in, out]``, the
            ``Conv1D`` of GPT-2) or ``conv`` (``[out, in, k…]``, read as
            ``[out, in·k…]``; any weight of more than two dimensions).
        rows: the rows that belong to this matrix, where the weight is fused.
        groups: groups of a grouped convolution (1 otherwise).
        stacked: whether a weight of three dimensions is a stack of matrices
            ``[count, rows, columns]``, as those of experts are.
        holder: what holds the weight where ``module`` does not (its parametrisation).
        effective: the attribute that the layer computes with where that is made of the weight
            (pruned, spectrally normed); see :mod:`~hf_precond.architectures.computed`.
    """

    name: str
    module: nn.Module
    weight: str = "weight"
    bias: str | None = None
    layout: Layout = "linear"
    rows: RowSelection | None = None
    groups: int = 1
    stacked: bool = False
    holder: nn.Module | None = None
    effective: str | None = None

    @property
    def part(self) -> str:
        """``"q"`` of the name ``"attn.c_attn[q]"``; empty where the weight is not fused."""
        return self.name[self.name.rindex("[") + 1 : -1] if self.name.endswith("]") else ""

    @property
    def weight_parameter(self) -> Tensor:
        """The weight as the module holds it now."""
        held = (self.module if self.holder is None else self.holder)._parameters.get(self.weight)
        if held is not None:
            return held
        from hf_precond.architectures.computed import moved_weight

        return moved_weight(self)

    @property
    def mask(self) -> Tensor | None:
        """What the weight is multiplied with where it was pruned."""
        return self.module._buffers.get(f"{self.effective}_mask")

    @property
    def of_layer(self) -> bool:
        """Whether the layer computes its outputs with this weight, as linear layers do."""
        return (self.effective or self.weight) == "weight"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.weight_parameter.shape)

    @property
    def bias_parameter(self) -> Tensor | None:
        """The bias as the module holds it now, where it is part of the matrix."""
        return None if self.bias is None else self.module._parameters.get(self.bias)

    @property
    def stack(self) -> tuple[int, ...]:
        """``(count,)`` where these are the matrices of so many experts; empty for one matrix."""
        return ()

    @property
    def trains(self) -> bool:
        """Whether the weight trains."""
        return self.weight_parameter.requires_grad

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight alone."""
        shape = self.weight_shape
        if self.layout == "transposed":
            columns, out = shape[0], shape[1]
        else:
            out, columns = shape[0], math.prod(shape[1:])
        return (self.rows.rows if self.rows else out, columns)

    @property
    def columns(self) -> int:
        """``in + 1`` with a bias, ``in`` without."""
        return self.shape[1] + (self.bias is not None)

    def weight_view(self, tensor: Tensor) -> Tensor:
        """The part of a weight-shaped tensor that is this matrix: a view, ``[…, in]``.

        It has two dimensions, and three where the rows are interleaved by head
        (``[groups, rows per group, in]``), which no view in two can show.
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
        """``[W | b]`` from weight- and bias-shaped tensors.

        Args:
            weight: the weight, its gradient, or anything of that shape.
            bias: the same of the bias; ``None`` (no gradient, say) stands for zeros.

        Returns:
            ``[out, in + 1]``; ``[out, in]`` when the matrix has no bias.
        """
        matrix = self.weight_view(weight).reshape(self.shape)
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
            weight = weight.reshape(self.weight_shape)
        elif self.rows.groups > 1:
            out = (self.rows.groups, -1)
            weight = weight.reshape(*out, weight.shape[1])
        if self.bias is None:
            return weight.contiguous(), None
        return weight.contiguous(), matrix[:, -1].reshape(out).contiguous()

    def read(self) -> Tensor:
        """``[W | b]`` as the layer computes with it, ``[out, in(+1)]``, detached, gathered."""
        weight = self.weight_parameter
        bias = None if self.bias is None else getattr(self.module, self.bias)
        if self.effective is not None:
            from hf_precond.architectures.computed import effective_weight

            weight = effective_weight(self.module, self.effective)
        return self.join(full(weight.detach()), None if bias is None else full(bias.detach()))


@dataclass(eq=False)
class LowRankAdapter:
    """A low-rank update ``scaling · up @ down`` of a linear layer's matrix (LoRA).

    Args:
        down: LoRA's A, ``[r, in]``; one object for all roles of a fused weight.
        up: LoRA's B, ``[out, r]``; the role's rows where the weight is fused.
        scaling: factor of the product.
        magnitude: the module whose ``weight`` (``[out]``) are the norms that
            DoRA gives the rows of the sum of weight and update; ``None``
            without DoRA.
        base: the matrix that is updated; ``None`` of an attention's, which knows it.
        beside: the pairs of further adapters of the same layer that are active.
    """

    down: LayerMatrix
    up: LayerMatrix
    scaling: float
    magnitude: nn.Module | None = None
    base: LayerMatrix | None = None
    beside: tuple[LowRankAdapter, ...] = ()

    def update(self) -> Tensor:
        """``scaling · B A``, ``[out, in]``."""
        up = self.up.read()[:, : self.up.shape[1]]
        return self.scaling * (up @ self.down.read())

    def row_scale(self, base: LayerMatrix) -> Tensor | None:
        """What DoRA multiplies the rows of ``W + scaling · B A`` by: ``m / norm``, ``[out]``.

        Args:
            base: the matrix W.

        Returns:
            ``None`` without DoRA.
        """
        if self.magnitude is None:
            return None
        update = self.update()
        matrix = base.read()[:, : update.shape[1]] + update
        magnitude = full(cast(Tensor, self.magnitude.weight).detach())
        rows = self.up.bias_view(magnitude).reshape(-1)
        return rows.to(matrix.dtype) / torch.linalg.vector_norm(matrix, dim=1)


@dataclass(eq=False)
class NormParameter:
    """A scale or shift of a norm.

    Args:
        name: parameter path.
        module: the module that holds it.
        attribute: the attribute that holds it.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> Tensor:
        """The parameter as the module holds it now."""
        held = self.module._parameters.get(self.attribute)
        if held is not None:
            return held
        from hf_precond.architectures.computed import successors

        return next(iter(successors(self.module, self.attribute)))


PRECONDITIONED, FROZEN = "preconditioned", "frozen"
"""Treatments that are not the name of a fallback optimizer."""


@dataclass(frozen=True)
class Route:
    """How one parameter is treated.

    Args:
        name: parameter path.
        shape: its shape.
        treatment: ``preconditioned``, ``frozen``, or the name of the fallback
            optimizer.
        reason: why, in a few words.
        group: label of its parameter group (``decay``, ``no decay``,
            ``head decay``, …); empty before the groups are made.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    reason: str
    group: str = ""


@dataclass
class RoutingTable:
    """Every parameter of a model with its treatment; prints as a table of 80 columns.

    The print counts frozen parameters and leaves them out, though they are among the routes: of a
    model with adapters they are nearly all, and would hide what trains.

    Args:
        routes: one a parameter, in model order.
    """

    routes: list[Route] = field(default_factory=list)

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def __len__(self) -> int:
        return len(self.routes)

    def __getitem__(self, name: str) -> Route:
        for route in self.routes:
            if route.name == name:
                return route
        raise KeyError(name)

    def count(self) -> dict[str, int]:
        """Treatment to number of parameter tensors."""
        return dict(Counter(route.treatment for route in self.routes))

    def __str__(self) -> str:
        lines = [f"{'parameter':<42} {'shape':<12} {'treatment':<14} reason"]
        for route in self.routes:
            if route.treatment == FROZEN:
                continue
            shape = "x".join(map(str, route.shape)) or "scalar"
            name = route.name if len(route.name) <= 42 else "…" + route.name[-41:]
            reason = route.reason + (f" [{route.group}]" if route.group else "")
            head = f"{name:<42} {shape:<12} {route.treatment:<14}"
            if len(head) + 1 + len(reason) <= 80:
                lines.append(f"{head} {reason}")
            else:
                lines += [head.rstrip(), textwrap.indent(textwrap.fill(reason, 76), "    ")]
        counts = [
            f"{number} {treatment}" + " (not listed)" * (treatment == FROZEN)
            for treatment, number in sorted(self.count().items())
        ]
        lines.append(", ".join(counts))
        return "\n".join(lines)


@dataclass(eq=False)
class ModelStructure:
    """What one optimizer needs to know of a model.

    Args:
        matrices: the matrices to precondition, in model order. Those of
            ``attention`` that are in scope are among them.
        attention: the attention blocks that have a matrix in scope.
        adapters: LoRA's pairs outside attention whose A and B are among ``matrices``.
        hidden: matrices of hidden layers that are stepped by a matrix sign:
            outside ``matrices`` by Muon, where it is the fallback optimizer,
            inside by AdamR's ``direction="sign"``.
        norms: the norm parameters to precondition.
        routing: the routing table.
        decided: the config's fields that are ``auto``, and what this model makes
            of them.
        owners: name, module and attribute of every parameter, frozen ones too.
        model: the model; ``None`` in a deep copy, and where the structure was
            made by hand.
        open_statistics: opens another source of statistics than the model's,
            for a structure made by hand; takes the requests.
        reread: reads another model in the same way (a deep copy is attached to
            its own model with it).
    """

    matrices: list[LayerMatrix] = field(default_factory=list)
    attention: list[AttentionBlock] = field(default_factory=list)
    adapters: list[LowRankAdapter] = field(default_factory=list)
    hidden: list[LayerMatrix] = field(default_factory=list)
    norms: list[NormParameter] = field(default_factory=list)
    routing: RoutingTable = field(default_factory=RoutingTable)
    decided: dict[str, Any] = field(default_factory=dict)
    owners: list[Owner] = field(default_factory=list)
    model: nn.Module | None = None
    open_statistics: Callable[[Any], Any] | None = None
    reread: Callable[[nn.Module], ModelStructure] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which reads no model until it is attached to one."""
        return self.__dict__ | {"model": None, "open_statistics": None}
