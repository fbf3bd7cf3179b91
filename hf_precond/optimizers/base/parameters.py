"""A tensor that a base rule steps: a parameter, or the rows of a fused one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_precond.architectures.structure import LayerMatrix, RowSelection
from hf_precond.distributed.collectives import full, is_sharded, like
from hf_precond.linalg.products import compute_dtype

Item = TypeVar("Item")


@dataclass(eq=False)
class ParamView:
    """What a rule needs to step one tensor.

    Args:
        param: the tensor to change in place; a view where a parameter is
            fused.
        grad: its gradient, or the preconditioned gradient that stands for it.
        state: the optimizer's state of the parameter.
        prefix: put before the names of the state (``"q."`` of a fused weight).
        group: the parameter group: lr, weight_decay and the rule's constants.
        seen: the shape that a rule for matrices reads, where it is not the
            parameter's: rows interleaved per head lie in ``[groups, rows, in]``.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    prefix: str
    group: dict[str, Any]
    seen: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, …]`` as a rule for matrices sees it."""
        return tuple(self.param.shape) if self.seen is None else self.seen

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state

    def __getitem__(self, name: str) -> Any:
        return self.state[self.prefix + name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.state[self.prefix + name] = value

    def zeros(self, name: str) -> None:
        """Allocate state ``name`` like the parameter, in float32 (float64 for float64)."""
        param, dtype = self.param, compute_dtype(self.param.dtype)
        if name in self:
            fit(self.state, self.prefix + name, param.shape, dtype, param.device)
        else:
            self[name] = torch.zeros_like(
                param, dtype=dtype, memory_format=torch.contiguous_format
            )

    def counter(self, name: str) -> None:
        """Allocate a float32 count: where torch's AdamW reads it, on a GPU or on the host."""
        device = self.param.device if self.param.is_cuda else torch.device("cpu")
        if name in self:
            fit(self.state, self.prefix + name, (), torch.float32, device)
        else:
            self[name] = torch.zeros((), dtype=torch.float32, device=device)


def fit(
    held: dict[str, Any],
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Let a tensor of the state follow its parameter, converted or moved since the last step.

    Kernels that take a state of another size than the parameter's would write
    beyond its memory.

    Args:
        held: the state that holds it, changed in place.
        name: its name there.
        shape: what the parameter has now.
        dtype: the same.
        device: the same.

    Raises:
        RuntimeError: it has another shape.
    """
    tensor: Tensor = held[name]
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(reshaped(name, tensor.shape, shape))
    if tensor.dtype != dtype or tensor.device != device:
        held[name] = tensor.to(device=device, dtype=dtype)


def reshaped(name: str, held: Sequence[int], wanted: Sequence[int]) -> str:
    """What is said where a parameter's state does not fit it any more."""
    return (
        f"the state {name!r} of a parameter has shape {tuple(held)} and {tuple(wanted)} is needed: "
        "the parameter was resized, tied or pruned after the optimizer's first step "
        "(resize_token_embeddings, tie_weights). Do that before, or build a new optimizer now."
    )


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Lists of the items with equal ``key``, in order of first appearance."""
    lists: dict[Any, list[Item]] = {}
    for item in items:
        lists.setdefault(key(item), []).append(item)
    return list(lists.values())


def in_batches(items: Sequence[Item], size: int, limit: int) -> Iterator[Sequence[Item]]:
    """The items in runs of at most ``limit`` elements, one item at least; each has ``size``."""
    length = max(1, limit // size)
    for start in range(0, len(items), length):
        yield items[start : start + length]


def by_group(views: Sequence[ParamView]) -> list[list[ParamView]]:
    """Leaves of one parameter group, dtype, device and mesh together."""
    return grouped(
        views,
        lambda view: (
            id(view.group),
            view.param.dtype,
            view.param.device,
            getattr(view.param, "device_mesh", None),
        ),
    )


Position = tuple[int, int]
Parts = tuple[Tensor, Tensor | None]


def position_of(name: str, parameter: Tensor, positions: Mapping[int, Position]) -> Position:
    """Where a parameter sits now.

    Args:
        name: what it belongs to, for the message.
        parameter: the parameter, as the model holds it.
        slots: ``id`` of every parameter of the groups to its group and index.

    Raises:
        RuntimeError: it is in none of the groups any more. Stepped anyway, the
            preconditioned layers would train without the others.
    """
    if id(parameter) not in positions:
        raise RuntimeError(
            f"{name}: its parameter is in none of the parameter groups any more. It was replaced "
            "since the optimizer was made (by load_state_dict(assign=True), say, or fully_shard "
            "without accelerate's prepare): build the optimizer afterwards; or taken out of its "
            "group: freeze it with requires_grad_(False) instead."
        )
    return positions[id(parameter)]


@dataclass(eq=False)
class BoundMatrix:
    """A matrix with its place: group and index, which survive a swap of the parameters.

    Groups may be changed between steps: :meth:`locate`.

    Args:
        matrix: the matrix.
        weight_slot: group and index of the weight.
        bias_slot: group and index of the bias, ``None`` without one.
    """

    matrix: LayerMatrix
    weight_position: Position
    bias_position: Position | None

    @property
    def prefix(self) -> str:
        """Put before the names of this matrix's state: empty unless the weight is fused."""
        return f"{self.matrix.part}." if self.matrix.part else ""

    @property
    def weight(self) -> Tensor:
        """The weight as the module holds it now; its state is the matrix's state."""
        return self.matrix.weight_parameter

    @property
    def bias_rests(self) -> bool:
        """Whether the weight's step leaves the bias as it is: frozen since it was joined."""
        bias = self.matrix.bias_parameter
        return bias is not None and bias.grad is None and self.weight.grad is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the mathematics: float64 for float64 weights, else float32."""
        return compute_dtype(self.weight.dtype)

    def locate(self, positions: Mapping[int, Position]) -> None:
        """Find weight and bias again in groups that may have changed; see :func:`position_of`."""
        self.weight_position = position_of(self.matrix.name, self.weight, positions)
        bias = self.matrix.bias_parameter
        self.bias_position = None if bias is None else positions.get(id(bias))

    def gradient(self) -> Tensor | None:
        """``[dW | db]``, ``[out, in(+1)]`` in ``dtype``, gathered; ``None`` without a gradient."""
        if self.weight.grad is None:
            return None
        bias = self.matrix.bias_parameter
        bias_grad = None if bias is None or bias.grad is None else full(bias.grad)
        return self.matrix.join(full(self.weight.grad), bias_grad).to(self.dtype)

    def views(
        self,
        matrix: Tensor,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        gathered: dict[Tensor, Tensor],
        parts: Parts | None = None,
    ) -> list[ParamView]:
        """``matrix`` ([out, in(+1)]) as the leaves of weight and bias, each with its group.

        Rows of a sharded fused weight have no view in the shards: their leaf
        steps a copy gathered into ``gathered``, to be scattered afterwards.
        ``parts``, where they are known: those of ``matrix``.
        """
        weight_part, bias_part = self.matrix.split(matrix) if parts is None else parts
        weight = self.weight
        found = [(weight, weight_part, self.weight_position)] if weight.grad is not None else []
        bias = self.matrix.bias_parameter
        if bias is not None and bias.grad is None:  # frozen since the matrix was found
            bias = None
        if bias is not None and bias_part is not None and self.bias_position is not None:
            found.append((bias, bias_part, self.bias_position))
        views = []
        for parameter, part, position in found:
            held: Tensor = parameter
            if self.matrix.rows is not None and is_sharded(parameter):
                if parameter not in gathered:
                    gathered[parameter] = full(parameter).clone()
                held = gathered[parameter]
            group = groups[position[0]]
            is_weight = parameter is weight
            target = self.matrix.target(held) if is_weight else self.matrix.bias_view(held)
            held_state = state.setdefault(parameter, {})
            view = ParamView(target, like(target, part), held_state, self.prefix, group)
            if self.matrix.rows is not None:
                view.seen = self.matrix.shape if is_weight else self.matrix.shape[:1]
            views.append(view)
        return views

    def raw_views(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        gathered: dict[Tensor, Tensor],
    ) -> list[ParamView]:
        """The leaves of weight and bias with their raw gradients, those of them that have one.

        A fused weight is always split in its parts, so that its state has one
        layout whatever its parts' treatment.
        """
        weight, bias = self.weight, self.matrix.bias_parameter
        if weight.grad is None and (bias is None or bias.grad is None):
            return []
        gradients = [
            torch.zeros_like(full(p.detach())) if p.grad is None else full(p.grad)
            for p in (weight, bias)
            if p is not None
        ]
        matrix = self.matrix.join(*gradients, *[None] * (bias is None))
        return self.views(matrix.to(self.dtype), groups, state, gathered)


@dataclass(eq=False)
class Preconditioned:
    """What a preconditioner made of one matrix's gradient.

    Args:
        placed: the matrix.
        matrix: ``[out, in(+1)]``.
        finished: a direction to descend along (decay decoupled) instead of a
            gradient for the base rule.
        parts: ``matrix`` as its weight and bias parts, where they are known.
    """

    bound: BoundMatrix
    matrix: Tensor
    finished: bool = False
    parts: Parts | None = None


def stacked_gradients(bound: Sequence[BoundMatrix]) -> Tensor:
    """``[dW | db]`` of matrices of one shape and dtype that have gradients, ``[n, out, in(+1)]``.

    A copy; a few kernels for all of them where they are whole layers alike.
    """
    if len(bound) == 1 or not _alike(bound):
        gradients = [item.gradient() for item in bound]
        return torch.stack([gradient for gradient in gradients if gradient is not None])
    matrix = bound[0].matrix
    weights = torch.stack([item.weight.grad for item in bound if item.weight.grad is not None])
    weights = weights.mT if matrix.layout == "transposed" else weights.flatten(2)
    if matrix.bias is None:
        return weights.contiguous().to(bound[0].dtype)
    biases = [item.matrix.bias_parameter for item in bound]
    columns = torch.stack([b.grad for b in biases if b is not None and b.grad is not None])
    return torch.cat([weights, columns.unsqueeze(-1).to(weights.dtype)], 2).to(bound[0].dtype)


def split_stack(bound: Sequence[BoundMatrix], matrices: Tensor) -> Sequence[Parts | None]:
    """The weight and bias parts of ``[n, out, in(+1)]``; ``None`` where each is split by itself."""
    if len(bound) == 1 or not _alike(bound):
        return [None] * len(bound)
    matrix = bound[0].matrix
    weights = matrices if matrix.bias is None else matrices[..., :-1]
    weights = weights.mT if matrix.layout == "transposed" else weights
    weights = weights.reshape(len(bound), *bound[0].weight.shape).contiguous()
    if matrix.bias is None:
        return [(weight, None) for weight in weights.unbind()]
    return list(zip(weights.unbind(), matrices[..., -1].contiguous().unbind(), strict=True))


def _alike(bound: Sequence[BoundMatrix]) -> bool:
    """Whether these are whole, unsharded weights of one layout, all or none with a bias."""
    first = bound[0].matrix
    for item in bound:
        matrix, bias = item.matrix, item.matrix.bias_parameter
        if matrix.rows is not None or is_sharded(item.weight) or matrix.layout != first.layout:
            return False
        if item.weight.shape != bound[0].weight.shape or (bias is None) != (first.bias is None):
            return False
        if bias is not None and (bias.grad is None or is_sharded(bias)):
            return False
    return True


def fused_rests(bound: Sequence[BoundMatrix]) -> list[BoundMatrix]:
    """The rows of fused weights that no matrix of ``placed`` holds: the base rule's."""
    fused: dict[Position, list[BoundMatrix]] = {}
    for item in bound:
        if item.matrix.rows is not None:
            fused.setdefault(item.weight_position, []).append(item)
    rests = []
    for parts in fused.values():
        selections = [part.matrix.rows for part in parts if part.matrix.rows is not None]
        for number, rows in enumerate(RowSelection.complement(selections)):
            owner = parts[0].matrix
            name = f"{owner.name.split('[')[0]}[rest{number}]"
            rest = LayerMatrix(name, owner.module, owner.weight, owner.bias, owner.layout, rows)
            rests.append(BoundMatrix(rest, parts[0].weight_position, parts[0].bias_position))
    return rests
