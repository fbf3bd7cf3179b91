"""Matrices of equal shape, their state stacked so that one product serves them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from hf_precond.distributed.collectives import full, is_sharded, like
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.adamr.tiling import Tiling, is_embedding
from hf_precond.optimizers.base.fallback import descend
from hf_precond.optimizers.base.parameters import ParamView, grouped, in_batches, listed, states

CPU_ELEMENTS = 1 << 18
"""Elements of a batch on a CPU: they stay in the cache from one product to the next."""
GPU_ELEMENTS = 1 << 25
"""Elements of a batch on a GPU: bounds the memory of the products' results."""


@dataclass(eq=False)
class Batch:
    """Views of one tiling, one parameter group and one history, which take a step together.

    Their state is stacked, ``[views · tiles, rows, columns]``.

    Args:
        views: the views.
        tiling: how each of them is seen.
        partial: whether these are some of a batch's views, whose state stays where it is.
        collected: whether the gradient has been averaged into the factors at this step.
        norms: ``‖G‖²`` of each tile, ``[b, 1, 1]``, once it is collected.
        rotated_gradient: G in the present bases, ``[b, rows, columns]``, where it is held.
        rows: the indices of its rows, where all others are zero and left out: of an embedding.
    """

    views: list[ParamView]
    tiling: Tiling
    partial: bool = False
    collected: bool = False
    norms: Tensor | None = None
    rotated_gradient: Tensor | None = None
    rows: Tensor | None = None

    @property
    def group(self) -> dict[str, Any]:
        """The parameter group."""
        return self.views[0].group

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the mathematics."""
        return compute_dtype(self.views[0].param.dtype)

    @property
    def elements(self) -> int:
        """Entries of all matrices."""
        return len(self.views) * self.tiling.tiles * self.tiling.rows * self.tiling.columns

    def number(self, name: str) -> int:
        """A plain number of the state that all views share."""
        return self.views[0][name]

    def add(self, name: str) -> None:
        """Add 1 to a plain number of every view."""
        for view in self.views:
            view.state[view.prefix + name] += 1

    def __getitem__(self, name: str) -> Tensor:
        """State ``name``, stacked.

        The views' own tensors become views of the stack. Of a partial batch it may be a copy, to be
        written with :meth:`write`.
        """
        parts = states(self.views, name)
        stack = adjacent(parts)
        if stack is None:
            stack = torch.cat(parts)
            if not self.partial:
                for view, part in zip(self.views, stack.split(self.tiling.tiles), strict=True):
                    view[name] = part
        return stack

    def write(self, name: str, stack: Tensor) -> None:
        """Make a stack state ``name``: as it is where it is all of a batch, else by a copy.

        Args:
            name: of the state.
            stack: a tensor of its own, or what was read of the state and changed.
        """
        parts, new = states(self.views, name), stack.split(self.tiling.tiles)
        if is_same_place(parts[0], new[0]):
            return
        own = stack.untyped_storage().nbytes() == stack.numel() * stack.element_size()
        own &= stack.is_contiguous()  # as in a checkpoint: other strides, other rounding
        if own and not self.partial and stack.dtype == parts[0].dtype:
            for view, part in zip(self.views, new, strict=True):
                view[name] = part
        else:
            torch._foreach_copy_(parts, list(new))

    def part(self, indices: Sequence[int]) -> Batch:
        """Some of the views."""
        if len(indices) == len(self.views):
            return self
        return Batch([self.views[index] for index in indices], self.tiling, partial=True)

    def gradient(self) -> Tensor:
        """The gradient, ``[b, rows, columns]``, in the dtype of the state; not to be written to."""
        gradients = [view.grad for view in self.views]
        if is_sharded(gradients[0]):
            gradients = list(map(full, gradients))
        if self.tiling.split == "columns":
            return stacked(list(map(self._tiled, gradients))).to(self.dtype)
        shape = self.tiling.tiles, self.tiling.rows, self.tiling.columns
        return stacked([gradient.reshape(shape) for gradient in gradients]).to(self.dtype)

    def rows_read(self, gradient: Tensor) -> Tensor | None:
        """The rows of an embedding that a step has read, where these are the minority.

        On a GPU the host would wait for the answer.

        Args:
            gradient: see :meth:`gradient`.
        """
        matrix = self.views[0].matrix
        if not gradient.is_cpu or len(self.views) > 1 or self.tiling.left:
            return None
        if matrix is None or not is_embedding(matrix):
            return None
        rows = torch.linalg.vector_norm(gradient[0], dim=1).nonzero().squeeze(1)
        return rows if 2 * len(rows) <= gradient.shape[1] else None

    def target(self) -> Tensor | None:
        """The one parameter like :meth:`gradient`, where a product can be added to it in place."""
        param = self.views[0].param
        if len(self.views) > 1 or is_sharded(param) or not param.is_contiguous():
            return None
        if param.dtype != self.dtype or isinstance(self.group["lr"], Tensor):
            return None
        return self._tiled(param.detach())

    def descend(self, directions: Tensor) -> None:
        """``p ← (1 - lr·wd) p - lr · u``, directions u stacked, which take the gradients' place."""
        for view, tiles in zip(self.views, directions.split(self.tiling.tiles), strict=True):
            tiles = tiles.transpose(0, 1) if self.tiling.split == "columns" else tiles
            view.grad = tiles.reshape(view.param.shape)
        if is_sharded(self.views[0].param):
            for view in self.views:
                view.grad = like(view.param, view.grad)
        descend(self.views)

    def release(self) -> None:
        """Lets go of gradients and directions: none is held for the batches that follow."""
        for view in self.views:
            view.grad = view.param

    def _tiled(self, tensor: Tensor) -> Tensor:
        tiling = self.tiling
        if tiling.split == "columns":
            return tensor.reshape(tiling.rows, tiling.tiles, tiling.columns).transpose(0, 1)
        return tensor.reshape(tiling.tiles, tiling.rows, tiling.columns)


@dataclass(eq=False)
class Kind:
    """Views of one tiling, parameter group, dtype, device and mesh.

    Args:
        places: their numbers among all views that take a step.
        views: the views.
        tiling: how each of them is seen.
    """

    places: list[int]
    views: list[ParamView]
    tiling: Tiling


def kinds(tiled: Sequence[tuple[ParamView, Tiling]]) -> list[Kind]:
    """Views that take a step, by what does not change from one to the next.

    Args:
        tiled: the views, each with its tiling.
    """

    def kind(item: tuple[int, tuple[ParamView, Tiling]]) -> tuple[Any, ...]:
        view, tiling = item[1]
        param = view.param
        mesh = getattr(param, "device_mesh", None)
        return tiling, id(view.group), view.hidden, param.dtype, param.device, mesh

    found = []
    for alike in grouped(enumerate(tiled), kind):
        places, items = zip(*alike, strict=True)
        found.append(Kind(list(places), [view for view, _ in items], items[0][1]))
    return found


def batches(found: Sequence[Kind]) -> Iterator[Batch]:
    """Views that take the same step together, in batches of a bounded size.

    Args:
        found: all views that take it; their state has been made.
    """
    runs = []
    for kind in found:
        tiling = kind.tiling
        counts = ("step", "observed", *[f"{side}_updates" for side in tiling.sides])
        histories = zip(*[states(kind.views, name) for name in counts], strict=True)
        for run in listed(zip(kind.places, kind.views, strict=True), histories):
            runs.append((run[0][0], tiling, [view for _, view in run]))
    for _, tiling, views in sorted(runs, key=itemgetter(0)):
        size = tiling.tiles * tiling.rows * tiling.columns
        limit = CPU_ELEMENTS if views[0].param.is_cpu else GPU_ELEMENTS
        for together in in_batches(views, size, limit):
            yield Batch(list(together), tiling)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The stack of ``parts``; a view where they lie one after the other."""
    stack = adjacent(parts)
    return torch.cat(list(parts)) if stack is None else stack


def is_same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors begin at one place of one storage."""
    storages: tuple[Any, ...] = a.untyped_storage(), b.untyped_storage()
    return storages[0]._cdata == storages[1]._cdata and a.storage_offset() == b.storage_offset()


def adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """The stack that ``parts`` are consecutive views of, or ``None``; copies nothing."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if first.stride(0) * len(first) != first.numel():
        return None
    start, size = first.data_ptr(), first.numel() * first.element_size()
    memory = map(methodcaller("data_ptr"), map(Tensor.untyped_storage, parts))
    # What is asked of every part is asked in C: a step does so for every matrix.
    if list(map(Tensor.data_ptr, parts)) != [*range(start, start + size * len(parts), size)]:
        return None
    if len(set(map(Tensor.stride, parts))) > 1 or len(set(memory)) > 1:
        return None
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())
