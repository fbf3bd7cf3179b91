"""Sharded tensors (FSDP2) gathered, and whole ones sharded again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(reference: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, equal on all ranks, sharded as ``reference`` is; unchanged for a plain one."""
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(
        tensor, reference.device_mesh, reference.placements, src_data_rank=None
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor has a NaN or an infinity, on any rank where they are sharded.

    Reads a number from the device for every dtype. Whole tensors are taken to be equal on
    all ranks, as gradients are under DDP.
    """
    sharded: torch.device | None = None
    largest: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            sharded = tensor.device
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel():
            largest.setdefault((local.device, local.dtype), []).append(local)
    finite = all(
        bool(torch.isfinite(torch.stack(torch._foreach_norm(alike, float("inf")))).all())
        for alike in largest.values()
    )
    if sharded is None:
        return finite
    everywhere = torch.tensor(finite, dtype=torch.int32, device=sharded)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


BUCKET = 1 << 23
"""Bytes that are broadcast together: enough to hide the latency, few enough to stay in a cache."""
ALONE = 1 << 20
"""Bytes from which on the results of one piece are broadcast by themselves."""


def world_size() -> int:
    """Number of ranks; 1 where no process group was made."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1




def rank() -> int:
    """This process's rank; 0 where no process group was made."""
    return dist.get_rank() if world_size() > 1 else 0


def owners(costs: Sequence[float], ranks: int | None = None) -> list[int]:
    """Which rank computes which piece of work: the costliest first, to the least loaded.

    The same on every rank, since it depends on ``costs`` alone.

    Args:
        costs: cost of each piece, any unit.
        ranks: number of ranks; the world's by default.
    """
    ranks = world_size() if ranks is None else ranks
    load = [0.0] * ranks
    chosen = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        chosen[index] = min(range(ranks), key=lambda r: (load[r], r))
        load[chosen[index]] += costs[index]
    return chosen


def is_mine(owner: int) -> bool:
    """Whether this rank computes a piece of work of that owner."""
    return owner == rank()


def share(results: Sequence[Sequence[Tensor]], owner: Sequence[int]) -> None:
    """Give every rank the tensors that their owners have computed, in place.

    Broadcast in buckets, one owner's and one dtype's tensors in each. The
    results of a piece from :data:`ALONE` bytes on are a bucket, which goes
    without a copy where they lie one after the other in memory. Which bucket a
    tensor is in depends on shapes alone, so ranks may differ in how theirs
    lie. Does nothing in a world of one rank.

    Args:
        results: the tensors of each piece, which exist on every rank, of any
            strides; the owner's values are right before, everybody's after.
        owner: the rank that has computed each piece.
    """
    if world_size() == 1:
        return
    kinds: dict[tuple[int, str], list[list[Tensor]]] = {}
    for tensors, source in zip(results, owner, strict=True):
        same: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            same.setdefault(str(tensor.dtype), []).append(tensor)
        for dtype, alike in same.items():
            kinds.setdefault((source, dtype), []).append(alike)
    queues = [
        [(tensors, source) for tensors in _buckets(kind)]
        for (source, _), kind in sorted(kinds.items(), key=lambda item: item[0])
    ]
    under_way: deque[_Broadcast] = deque()
    # Owners take turns, so that data flows in both directions at a time.
    for turn in zip_longest(*queues):
        under_way.extend(_Broadcast(*bucket) for bucket in turn if bucket is not None)
        while len(under_way) > len(turn):
            under_way.popleft().finish()
    for broadcast in under_way:
        broadcast.finish()


def total(numbers: Tensor) -> Tensor:
    """The sum over all ranks, in place; nothing happens in a world of one."""
    if world_size() > 1:
        dist.all_reduce(numbers)
    return numbers


def _buckets(pieces: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The results of pieces, of one dtype, those that are sent together in one list."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensors in pieces:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        alone = size >= ALONE
        if alone or size > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].extend(tensors)
        room = 0 if alone else room - size
    return buckets


def _run(tensors: Sequence[Tensor]) -> Tensor | None:
    """The memory of tensors that lie one after the other, as a vector, else ``None``."""
    first = tensors[0]
    start = end = first.storage_offset()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.storage_offset() != end:
            return None
        if tensor.untyped_storage().data_ptr() != storage:
            return None
        end += tensor.numel()
    return first.as_strided((end - start,), (1,), start)


class _Broadcast:
    """One bucket on its way."""

    def __init__(self, tensors: list[Tensor], source: int) -> None:
        self.tensors, self.mine = tensors, is_mine(source)
        self.flat: Tensor | None = None
        run = _run(tensors)
        if run is None:
            run = self.flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
            if self.mine:
                for tensor, piece in self._pieces():
                    piece.copy_(tensor)
        self.work = dist.broadcast(run, source, async_op=True)

    def _pieces(self) -> list[tuple[Tensor, Tensor]]:
        """Each tensor with its place in the bucket, in its shape."""
        assert self.flat is not None
        pieces = self.flat.split([tensor.numel() for tensor in self.tensors])
        return [(t, piece.view(t.shape)) for t, piece in zip(self.tensors, pieces, strict=True)]

    def finish(self) -> None:
        """Wait for the bucket, and unpack what others sent."""
        self.work.wait()
        if self.flat is not None and not self.mine:
            for tensor, piece in self._pieces():
                tensor.copy_(piece)
