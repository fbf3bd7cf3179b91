"""Where a matrix's weight and bias sit in an optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.blocks import LayerMatrix, RowSelection
from hf_precond.blocks.sharding import full, is_sharded, like
from hf_precond.configs import compute_dtype
from hf_precond.optim.leaf import Leaf

Slot = tuple[int, int]
Parts = tuple[Tensor, Tensor | None]


def slot_of(name: str, parameter: Tensor, slots: Mapping[int, Slot]) -> Slot:
    """Where a parameter sits now.

    Args:
        name: what it belongs to, for the message.
        parameter: the parameter, as the model holds it.
        slots: ``id`` of every parameter of the groups to its group and index.

    Raises:
        RuntimeError: it is in none of the groups any more. Stepped anyway, the
            preconditioned layers would train without the others.
    """
    if id(parameter) not in slots:
        raise RuntimeError(
            f"{name}: its parameter is in none of the parameter groups any more. It was replaced "
            "since the optimizer was made (by load_state_dict(assign=True), say, or fully_shard "
            "without accelerate's prepare): build the optimizer afterwards; or taken out of its "
            "group: freeze it with requires_grad_(False) instead."
        )
    return slots[id(parameter)]


@dataclass(eq=False)
class PlacedMatrix:
    """A matrix with its place: group and index, which survive a swap of the parameters.

    Groups may be changed between steps: :meth:`locate`.

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
    def bias_rests(self) -> bool:
        """Whether the weight's step leaves the bias as it is: frozen since it was joined."""
        bias = self.matrix.bias_parameter
        return bias is not None and bias.grad is None and self.weight.grad is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the mathematics: float64 for float64 weights, else float32."""
        return compute_dtype(self.weight.dtype)

    def locate(self, slots: Mapping[int, Slot]) -> None:
        """Find weight and bias again in groups that may have changed; see :func:`slot_of`."""
        self.weight_slot = slot_of(self.matrix.name, self.weight, slots)
        bias = self.matrix.bias_parameter
        self.bias_slot = None if bias is None else slots.get(id(bias))

    def gradient(self) -> Tensor | None:
        """``[dW | db]``, ``[out, in(+1)]`` in ``dtype``, gathered; ``None`` without a gradient."""
        if self.weight.grad is None:
            return None
        bias = self.matrix.bias_parameter
        bias_grad = None if bias is None or bias.grad is None else full(bias.grad)
        return self.matrix.join(full(self.weight.grad), bias_grad).to(self.dtype)

    def leaves(
        self,
        matrix: Tensor,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        gathered: dict[Tensor, Tensor],
        parts: Parts | None = None,
    ) -> list[Leaf]:
        """``matrix`` ([out, in(+1)]) as the leaves of weight and bias, each with its group.

        Rows of a sharded fused weight have no view in the shards: their leaf
        steps a copy gathered into ``gathered``, to be scattered afterwards.
        ``parts``, where they are known: those of ``matrix``.
        """
        weight_part, bias_part = self.matrix.split(matrix) if parts is None else parts
        weight = self.weight
        found = [(weight, weight_part, self.weight_slot)] if weight.grad is not None else []
        bias = self.matrix.bias_parameter
        if bias is not None and bias.grad is None:  # frozen since the matrix was found
            bias = None
        if bias is not None and bias_part is not None and self.bias_slot is not None:
            found.append((bias, bias_part, self.bias_slot))
        leaves = []
        for parameter, part, slot in found:
            held: Tensor = parameter
            if self.matrix.rows is not None and is_sharded(parameter):
                if parameter not in gathered:
                    gathered[parameter] = full(parameter).clone()
                held = gathered[parameter]
            group = groups[slot[0]]
            is_weight = parameter is weight
            view = self.matrix.target(held) if is_weight else self.matrix.bias_view(held)
            leaf = Leaf(view, like(view, part), state.setdefault(parameter, {}), self.prefix, group)
            if self.matrix.rows is not None:
                leaf.seen = self.matrix.shape if is_weight else self.matrix.shape[:1]
            leaves.append(leaf)
        return leaves

    def raw_leaves(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        gathered: dict[Tensor, Tensor],
    ) -> list[Leaf]:
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
        return self.leaves(matrix.to(self.dtype), groups, state, gathered)


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

    placed: PlacedMatrix
    matrix: Tensor
    finished: bool = False
    parts: Parts | None = None


def stacked_gradients(placed: Sequence[PlacedMatrix]) -> Tensor:
    """``[dW | db]`` of matrices of one shape and dtype that have gradients, ``[n, out, in(+1)]``.

    A copy; a few kernels for all of them where they are whole layers alike.
    """
    if len(placed) == 1 or not _alike(placed):
        gradients = [item.gradient() for item in placed]
        return torch.stack([gradient for gradient in gradients if gradient is not None])
    matrix = placed[0].matrix
    weights = torch.stack([item.weight.grad for item in placed if item.weight.grad is not None])
    weights = weights.mT if matrix.layout == "transposed" else weights.flatten(2)
    if matrix.bias is None:
        return weights.contiguous().to(placed[0].dtype)
    biases = [item.matrix.bias_parameter for item in placed]
    columns = torch.stack([b.grad for b in biases if b is not None and b.grad is not None])
    return torch.cat([weights, columns.unsqueeze(-1).to(weights.dtype)], 2).to(placed[0].dtype)


def split_stack(placed: Sequence[PlacedMatrix], matrices: Tensor) -> Sequence[Parts | None]:
    """The weight and bias parts of ``[n, out, in(+1)]``; ``None`` where each is split by itself."""
    if len(placed) == 1 or not _alike(placed):
        return [None] * len(placed)
    matrix = placed[0].matrix
    weights = matrices if matrix.bias is None else matrices[..., :-1]
    weights = weights.mT if matrix.layout == "transposed" else weights
    weights = weights.reshape(len(placed), *placed[0].weight.shape).contiguous()
    if matrix.bias is None:
        return [(weight, None) for weight in weights.unbind()]
    return list(zip(weights.unbind(), matrices[..., -1].contiguous().unbind(), strict=True))


def _alike(placed: Sequence[PlacedMatrix]) -> bool:
    """Whether these are whole, unsharded weights of one layout, all or none with a bias."""
    first = placed[0].matrix
    for item in placed:
        matrix, bias = item.matrix, item.matrix.bias_parameter
        if matrix.rows is not None or is_sharded(item.weight) or matrix.layout != first.layout:
            return False
        if item.weight.shape != placed[0].weight.shape or (bias is None) != (first.bias is None):
            return False
        if bias is not None and (bias.grad is None or is_sharded(bias)):
            return False
    return True


def fused_rests(placed: Sequence[PlacedMatrix]) -> list[PlacedMatrix]:
    """The rows of fused weights that no matrix of ``placed`` holds: the base rule's."""
    fused: dict[Slot, list[PlacedMatrix]] = {}
    for item in placed:
        if item.matrix.rows is not None:
            fused.setdefault(item.weight_slot, []).append(item)
    rests = []
    for parts in fused.values():
        selections = [part.matrix.rows for part in parts if part.matrix.rows is not None]
        for number, rows in enumerate(RowSelection.complement(selections)):
            owner = parts[0].matrix
            name = f"{owner.name.split('[')[0]}[rest{number}]"
            rest = LayerMatrix(name, owner.module, owner.weight, owner.bias, owner.layout, rows)
            rests.append(PlacedMatrix(rest, parts[0].weight_slot, parts[0].bias_slot))
    return rests
