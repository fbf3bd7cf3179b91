"""Leaves of equal shape, their state stacked so that one product serves them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.distributed.collectives import full, is_sharded, like
from hf_precond.linalg import eigenbasis
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.adamr.tiling import Tiling, is_embedding
from hf_precond.optimizers.base.fallback import descend
from hf_precond.optimizers.base.parameters import ParamView, grouped

CPU_ELEMENTS = 1 << 18
"""Elements of a batch on a CPU: they stay in the cache from one product to the next."""
SLICE = 1 << 22
"""Elements of a larger matrix handled at a time on a CPU: bounds the memory of its products."""
GPU_ELEMENTS = 1 << 25
"""Elements of a batch on a GPU: bounds the memory of the products' results."""


@dataclass(eq=False)
class Batch:
    """Leaves of one plan, one parameter group and one history.

    State is stacked ``[leaves · tiles, …]`` and shared with the leaves' own:
    their tensors are views of the stack.

    Args:
        leaves: the leaves.
        plan: how each of them is seen.
    """

    views: list[ParamView]
    plan: Tiling

    @property
    def group(self) -> dict[str, Any]:
        """The parameter group."""
        return self.views[0].group

    @property
    def embeds(self) -> bool:
        """Whether it is one embedding, most of whose rows a step does not read."""
        matrix = getattr(self.views[0], "matrix", None)
        return len(self.views) == 1 and matrix is not None and is_embedding(matrix)

    @property
    def lone(self) -> bool:
        """Whether it is one matrix."""
        return len(self.views) == 1 and self.plan.tiles == 1

    def number(self, name: str) -> int:
        """A plain number that all leaves share."""
        return self.views[0][name]

    def __getitem__(self, name: str) -> Tensor:
        """State ``name``, stacked; the leaves' state becomes views of it where it is not yet."""
        parts = [view[name] for view in self.views]
        stack = adjacent(parts)
        if stack is None:
            stack = torch.cat(parts)
            for view, part in zip(self.views, stack.split(self.plan.tiles), strict=True):
                view[name] = part
        return stack

    def matrices(self, name: str) -> Tensor:
        """State ``name``: ``[rows, columns]`` of a lone matrix, else stacked."""
        return self.views[0][name][0] if self.lone else self[name]

    def read(self, name: str) -> Tensor:
        """State ``name``, stacked; a copy where the leaves are not neighbours in memory."""
        parts = [view[name] for view in self.views]
        stack = adjacent(parts)
        return torch.cat(parts) if stack is None else stack

    def write(self, name: str, value: Tensor) -> None:
        """Copy a stack into the leaves' state."""
        parts = [view[name] for view in self.views]
        stack = adjacent(parts)
        if stack is not None:
            if stack.data_ptr() != value.data_ptr():
                stack.copy_(value)
        else:
            torch._foreach_copy_(parts, list(value.split(self.plan.tiles)))

    def set(self, name: str, value: int) -> None:
        """Set a plain number of every leaf."""
        for view in self.views:
            view[name] = value

    def part(self, chosen: Sequence[int]) -> Batch:
        """Some of the leaves."""
        if len(chosen) == len(self.views):
            return self
        return Batch([self.views[index] for index in chosen], self.plan)

    def gradient(self) -> Tensor:
        """The gradient like :meth:`matrices`, in the dtype of the state; not to be written to."""
        dtype, plan = compute_dtype(self.views[0].param.dtype), self.plan
        if self.lone:
            return full(self.views[0].grad).reshape(plan.rows, plan.columns).to(dtype)
        tiles = [self._tiled(full(view.grad)).to(dtype) for view in self.views]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    def target(self) -> Tensor | None:
        """A lone parameter as ``[rows, columns]``, where a product can be added to it in place."""
        param = self.views[0].param
        if not self.lone or is_sharded(param):
            return None
        if param.dtype != compute_dtype(param.dtype) or not param.is_contiguous():
            return None
        if isinstance(self.group["lr"], Tensor):
            return None
        return param.detach().view(self.plan.rows, self.plan.columns)

    def descend(self, directions: Tensor) -> None:
        """``p ← (1 - lr·wd) p - lr · u``."""
        steps = []
        directions = directions[None] if self.lone else directions
        for view, tiles in zip(self.views, directions.split(self.plan.tiles), strict=True):
            untiled = tiles.transpose(0, 1) if self.plan.split == "columns" else tiles
            step = like(view.param, untiled.reshape(view.param.shape))
            steps.append(ParamView(view.param, step, view.state, view.prefix, view.group))
        descend(steps)

    def slices(self, elements: int) -> list[tuple[slice, slice]]:
        """Rows and columns of a lone matrix to go through in turn, the rotated side whole.

        A matrix with one rotated side falls into parts of about ``elements``
        along the other; any other batch is one part.
        """
        plan, everything = self.plan, slice(None)
        side = plan.sides[0]
        along, across = plan.columns, plan.rows
        if side == "right":
            along, across = across, along
        if len(plan.sides) == 2 or len(self.views) * plan.tiles > 1 or along * across <= elements:
            return [(everything, everything)]
        width = max(64, elements // across)
        parts = [slice(start, min(start + width, along)) for start in range(0, along, width)]
        if side == "right":
            return [(part, everything) for part in parts]
        return [(everything, part) for part in parts]

    def _tiled(self, tensor: Tensor) -> Tensor:
        plan = self.plan
        if plan.split == "columns":
            return tensor.reshape(plan.rows, plan.tiles, plan.columns).transpose(0, 1)
        return tensor.reshape(plan.tiles, plan.rows, plan.columns)


@dataclass(eq=False)
class Part:
    """Some rows or columns of a batch: views of its gradient, its moments and its parameter.

    Without the first dimension where the batch is one matrix: :attr:`Batch.lone`.

    Args:
        gradient: G, not to be written to.
        first: M.
        second: V.
        target: the parameter, where a product can be added to it in place.
        leads: whether it is the first part of its batch.
        norms: of the gradient's rows, where they are asked for.
        seen: the rows whose gradient is not zero, where most are (an embedding
            on a CPU, where asking costs nothing): the others need no rotation.
    """

    gradient: Tensor
    first: Tensor
    second: Tensor
    target: Tensor | None
    leads: bool = True
    norms: Tensor | None = None
    seen: Tensor | None = None


def batches(planned: Sequence[tuple[ParamView, Tiling]]) -> Iterator[Batch]:
    """Leaves that take the same step together, in batches of a bounded size."""
    for same in grouped(planned, _history):
        plan, views = same[0][1], [view for view, _ in same]
        size = _batch_size(plan, views[0].param.is_cpu)
        for start in range(0, len(views), size):
            yield Batch(views[start : start + size], plan)


def _batch_size(plan: Tiling, on_cpu: bool) -> int:
    """How many leaves are stepped together: one where its factors are computed in bands."""
    if on_cpu and plan.widest >= eigenbasis.BANDED:
        return 1
    bound = CPU_ELEMENTS if on_cpu else GPU_ELEMENTS
    return max(1, bound // (plan.tiles * plan.rows * plan.columns))


def _history(planned: tuple[ParamView, Tiling]) -> tuple[Any, ...]:
    view, plan = planned
    param = view.param
    mesh = getattr(param, "device_mesh", None)
    counts = ("step", "updates", "observed", *(f"{side}_updates" for side in plan.sides))
    history = tuple(view[name] for name in counts)
    return (plan, id(view.group), param.dtype, param.device, mesh, history)


def adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """The stack that ``parts`` are consecutive views of, or ``None``; copies nothing."""
    first = parts[0]
    if len(parts) == 1:
        return first
    start, size = first.data_ptr(), first.numel() * first.element_size()
    storage = first.untyped_storage().data_ptr()
    for number, part in enumerate(parts):
        if part.data_ptr() != start + number * size:
            return None
        if part.untyped_storage().data_ptr() != storage:
            return None
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())
