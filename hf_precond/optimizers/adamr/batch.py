"""Views of equal shape, their state stacked so that one product serves them all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.distributed.collectives import full, is_sharded, like
from hf_precond.linalg import eigenbasis
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.tiling import Tiling, is_embedding
from hf_precond.optimizers.base.fallback import descend
from hf_precond.optimizers.base.messages import RESHAPED
from hf_precond.optimizers.base.parameters import ParamView, fit, grouped

CPU_ELEMENTS = 1 << 18
"""Elements of a batch on a CPU: they stay in the cache from one product to the next."""
SLICE = 1 << 22
"""Elements of a larger matrix handled at a time on a CPU: bounds the memory of its products."""
GPU_ELEMENTS = 1 << 25
"""Elements of a batch on a GPU: bounds the memory of the products' results."""


@dataclass(eq=False)
class Batch:
    """Views of one tiling, one parameter group and one history.

    State is stacked ``[views · tiles, …]`` and shared with the views' own:
    their tensors are views of the stack.

    Args:
        views: the views.
        tiling: how each of them is seen.
    """

    views: list[ParamView]
    tiling: Tiling

    @property
    def group(self) -> dict[str, Any]:
        """The parameter group."""
        return self.views[0].group

    @property
    def embeds(self) -> bool:
        """Whether it is one embedding, most of whose rows a step does not read."""
        matrix = self.views[0].matrix
        return len(self.views) == 1 and matrix is not None and is_embedding(matrix)

    @property
    def lone(self) -> bool:
        """Whether it is one matrix."""
        return len(self.views) == 1 and self.tiling.tiles == 1

    def number(self, name: str) -> int:
        """A plain number that all views share."""
        return self.views[0][name]

    def __getitem__(self, name: str) -> Tensor:
        """State ``name``, stacked; the views' state becomes views of it where it is not yet."""
        parts = [view[name] for view in self.views]
        stack = adjacent(parts)
        if stack is None:
            stack = torch.cat(parts)
            for view, part in zip(self.views, stack.split(self.tiling.tiles), strict=True):
                view[name] = part
        return stack

    def matrices(self, name: str) -> Tensor:
        """State ``name``: ``[rows, columns]`` of a lone matrix, else stacked."""
        return self.views[0][name][0] if self.lone else self[name]

    def read(self, name: str) -> Tensor:
        """State ``name``, stacked; a copy where the views are not neighbours in memory."""
        parts = [view[name] for view in self.views]
        stack = adjacent(parts)
        return torch.cat(parts) if stack is None else stack

    def write(self, name: str, value: Tensor) -> None:
        """Copy a stack into the views' state."""
        parts = [view[name] for view in self.views]
        stack = adjacent(parts)
        if stack is not None:
            if stack.data_ptr() != value.data_ptr():
                stack.copy_(value)
        else:
            torch._foreach_copy_(parts, list(value.split(self.tiling.tiles)))

    def set(self, name: str, value: int) -> None:
        """Set a plain number of every view."""
        for view in self.views:
            view[name] = value

    def part(self, chosen: Sequence[int]) -> Batch:
        """Some of the views."""
        if len(chosen) == len(self.views):
            return self
        return Batch([self.views[index] for index in chosen], self.tiling)

    def gradient(self) -> Tensor:
        """The gradient like :meth:`matrices`, in the dtype of the state; not to be written to."""
        dtype, tiling = compute_dtype(self.views[0].param.dtype), self.tiling
        if self.lone:
            return full(self.views[0].grad).reshape(tiling.rows, tiling.columns).to(dtype)
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
        return param.detach().view(self.tiling.rows, self.tiling.columns)

    def descend(self, directions: Tensor) -> None:
        """``p ← (1 - lr·wd) p - lr · u``."""
        steps = []
        directions = directions[None] if self.lone else directions
        for view, tiles in zip(self.views, directions.split(self.tiling.tiles), strict=True):
            untiled = tiles.transpose(0, 1) if self.tiling.split == "columns" else tiles
            step = like(view.param, untiled.reshape(view.param.shape))
            steps.append(ParamView(view.param, step, view.state, view.prefix, view.group))
        descend(steps)

    def slices(self, elements: int) -> list[tuple[slice, slice]]:
        """Rows and columns of a lone matrix to go through in turn, the rotated side whole.

        A matrix with one rotated side falls into parts of about ``elements``
        along the other; any other batch is one part.
        """
        tiling, everything = self.tiling, slice(None)
        side = tiling.sides[0]
        along, across = tiling.columns, tiling.rows
        if side == "right":
            along, across = across, along
        if len(tiling.sides) == 2 or len(self.views) * tiling.tiles > 1 or along * across <= elements:
            return [(everything, everything)]
        width = max(64, elements // across)
        parts = [slice(start, min(start + width, along)) for start in range(0, along, width)]
        if side == "right":
            return [(part, everything) for part in parts]
        return [(everything, part) for part in parts]

    def _tiled(self, tensor: Tensor) -> Tensor:
        tiling = self.tiling
        if tiling.split == "columns":
            return tensor.reshape(tiling.rows, tiling.tiles, tiling.columns).transpose(0, 1)
        return tensor.reshape(tiling.tiles, tiling.rows, tiling.columns)


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


def batches(tiled: Sequence[tuple[ParamView, Tiling]]) -> Iterator[Batch]:
    """Views that take the same step together, in batches of a bounded size."""
    for same in grouped(tiled, _history):
        tiling, views = same[0][1], [view for view, _ in same]
        size = _batch_size(tiling, views[0].param.is_cpu)
        for start in range(0, len(views), size):
            yield Batch(views[start : start + size], tiling)


def _batch_size(tiling: Tiling, on_cpu: bool) -> int:
    """How many views are stepped together: one where its factors are computed in bands."""
    if on_cpu and tiling.widest >= eigenbasis.BANDED:
        return 1
    bound = CPU_ELEMENTS if on_cpu else GPU_ELEMENTS
    return max(1, bound // (tiling.tiles * tiling.rows * tiling.columns))


def _history(tiled: tuple[ParamView, Tiling]) -> tuple[Any, ...]:
    view, tiling = tiled
    param = view.param
    mesh = getattr(param, "device_mesh", None)
    counts = ("step", "updates", "observed", *(f"{side}_updates" for side in tiling.sides))
    history = tuple(view[name] for name in counts)
    return (tiling, id(view.group), param.dtype, param.device, mesh, history)


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


def allocate_state(view: ParamView, tiling: Tiling, config: AdamRConfig) -> None:
    """The momentum, factors and bases of a view.

    ``left_factor`` is ``Q_Lᵀ L Q_L``, its lower triangle.
    """
    dtype, device = compute_dtype(view.param.dtype), view.param.device
    kept = config.factor_dtype(view.param.dtype)
    squares = {"left": (tiling.tiles, tiling.rows, tiling.rows)}
    squares["right"] = (tiling.tiles, tiling.columns, tiling.columns)
    # What turns together lies together, and is sent to other ranks without a copy.
    shapes = {"exp_avg": (tiling.tiles, tiling.rows, tiling.columns)}
    if tiling.left:
        shapes = {"left_factor": squares["left"], "left_basis": squares["left"]} | shapes
    if tiling.right:
        shapes |= {"right_factor": squares["right"], "right_basis": squares["right"]}
    for name, tensor in _neighbours(shapes, dtype, kept, device).items():
        view[name] = tensor
    for side in tiling.sides:
        view[f"{side}_energy"] = host_tensor((), device, dtype, float("inf"))
        view[f"{side}_strikes"] = 0
        view[f"{side}_updates"] = 0


def convert_state(view: ParamView, tiling: Tiling, config: AdamRConfig) -> None:
    """Let the state follow its parameter to another dtype or device.

    Raises:
        RuntimeError: it is of another shape, or of other rotated sides.
    """
    dtype, device = compute_dtype(view.param.dtype), view.param.device
    shape, first = (tiling.tiles, tiling.rows, tiling.columns), view["exp_avg"]
    lost = [side for side in tiling.sides if f"{side}_factor" not in view]
    if tuple(first.shape) != shape or lost:
        name = f"{view.prefix}exp_avg"
        raise RuntimeError(RESHAPED.format(name=name, held=tuple(first.shape), wanted=shape))
    if first.dtype == dtype and first.device == device:
        return
    kinds = dict.fromkeys(("exp_avg", "exp_avg_sq", "mean_sq"), dtype)
    for side in tiling.sides:
        kinds[f"{side}_factor"] = config.factor_dtype(view.param.dtype)
        kinds[f"{side}_basis"] = dtype
        energy = float(view[f"{side}_energy"])
        view[f"{side}_energy"] = host_tensor((), device, dtype, energy)
    for name, kind in kinds.items():
        fit(view.state, view.prefix + name, view[name].shape, kind, device)


def host_tensor(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, value: float
) -> Tensor:
    """Numbers on the host that a GPU can write to without being waited for."""
    return torch.full(shape, value, dtype=dtype, pin_memory=device.type == "cuda")


def _neighbours(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, kept: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Zeros of these shapes, each after the one before in memory; factors in the dtype ``kept``."""
    dtypes = {name: kept if name.endswith("factor") else dtype for name in shapes}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    totals = dict.fromkeys(dtypes.values(), 0)
    for name, size in sizes.items():
        totals[dtypes[name]] += size
    rooms = {kind: torch.zeros(n, dtype=kind, device=device) for kind, n in totals.items()}
    found, places = {}, dict.fromkeys(rooms, 0)
    for name, shape in shapes.items():
        kind = dtypes[name]
        start, places[kind] = places[kind], places[kind] + sizes[name]
        found[name] = rooms[kind][start : places[kind]].view(shape)
    return found
