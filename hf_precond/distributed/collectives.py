"""What ranks compute together: shared work, sums, and sharded tensors (FSDP2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

BUCKET = 1 << 23
"""Bytes that are broadcast together: enough to hide the latency, few enough to stay in a cache."""
LARGE = 1 << 20
"""Bytes from which on the results of one item are a bucket of their own."""


def world_size() -> int:
    """Returns the number of ranks; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's rank; 0 where there is no process group."""
    return dist.get_rank() if world_size() > 1 else 0


# Sharded tensors ---------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is a ``DTensor``."""
    return isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor gathered on every rank; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(reference: Tensor, tensor: Tensor) -> Tensor:
    """Returns a tensor sharded as another is.

    Args:
        reference: a sharded tensor, or a plain one.
        tensor: a whole tensor, equal on all ranks.

    Returns:
        ``tensor`` itself where ``reference`` is a plain tensor.
    """
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(
        tensor, reference.device_mesh, reference.placements, src_data_rank=None
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether no tensor has a NaN or an infinity, on any rank where they are sharded.

    Reads a number from the device for every dtype.

    Args:
        tensors: whole tensors, which are taken to be equal on all ranks, as gradients
            are under DDP, and sharded ones.
    """
    sharded: torch.device | None = None
    locals_: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            sharded = tensor.device
            tensor = tensor.to_local()
        if tensor.numel():
            locals_.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    finite = all(
        bool(torch.isfinite(torch.stack(torch._foreach_norm(alike, float("inf")))).all())
        for alike in locals_.values()
    )
    if sharded is None:
        return finite
    everywhere = torch.tensor(finite, dtype=torch.int32, device=sharded)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


# Sums and shared work ----------------------------------------------------------------


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place; does nothing in a world of one.

    Args:
        numbers: the summands of this rank.

    Returns:
        ``numbers``.
    """
    if world_size() > 1:
        dist.all_reduce(numbers)
    return numbers


def assign_owners(costs: Sequence[float], ranks: int | None = None) -> list[int]:
    """Assigns items of work to ranks: the costliest first, to the least loaded.

    Args:
        costs: cost of each item, in any unit, equal on all ranks.
        ranks: number of ranks. Default ``None``: all.

    Returns:
        The rank that computes each item, the same list on every rank.
    """
    load = [0.0] * (world_size() if ranks is None else ranks)
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


def broadcast_results(results: Sequence[Sequence[Tensor]], owners: Sequence[int]) -> None:
    """Sends the tensors that each item's owner has computed to every rank, in place.

    They are broadcast in buckets, one owner's and one dtype's tensors in each.
    An item's results of :data:`LARGE` bytes or more are a bucket, which is sent
    without a copy where they lie one after the other in memory. Which bucket a
    tensor is in depends on shapes alone, so ranks may differ in how theirs
    lie. Does nothing in a world of one.

    Args:
        results: the tensors of each item, which exist on every rank, of any
            strides; the owner's values are right before, everybody's after.
        owners: the rank that has computed each item.
    """
    if world_size() == 1:
        return
    kinds: dict[tuple[int, str], list[list[Tensor]]] = {}
    for tensors, owner in zip(results, owners, strict=True):
        by_dtype: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(str(tensor.dtype), []).append(tensor)
        for dtype, alike in by_dtype.items():
            kinds.setdefault((owner, dtype), []).append(alike)
    queues = [
        [(bucket, owner) for bucket in _buckets(kinds[owner, dtype])]
        for owner, dtype in sorted(kinds)
    ]
    under_way: deque[_Broadcast] = deque()
    # Owners alternate, so that data flows in both directions at a time.
    for sent in zip_longest(*queues):
        under_way.extend(_Broadcast(*bucket) for bucket in sent if bucket is not None)
        while len(under_way) > len(sent):
            under_way.popleft().finish()
    for broadcast in under_way:
        broadcast.finish()


def _buckets(items: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The results of items, of one dtype, those that are sent together in one list."""
    buckets: list[list[Tensor]] = []
    room = 0
    for tensors in items:
        size = sum(tensor.nbytes for tensor in tensors)
        if size >= LARGE or size > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].extend(tensors)
        room = 0 if size >= LARGE else room - size
    return buckets


class _Broadcast:
    """One bucket under way.

    Args:
        tensors: the bucket.
        owner: the rank that sends it.
    """

    def __init__(self, tensors: list[Tensor], owner: int) -> None:
        self.tensors, self.received = tensors, owner != rank()
        self.views: list[Tensor] = []
        sent = _as_one(tensors)
        if sent is None:
            sizes = [tensor.numel() for tensor in tensors]
            sent = tensors[0].new_empty(sum(sizes))
            parts = zip(tensors, sent.split(sizes), strict=True)
            self.views = [part.view(tensor.shape) for tensor, part in parts]
            if not self.received:
                torch._foreach_copy_(self.views, tensors)
        self.work = dist.broadcast(sent, owner, async_op=True)

    def finish(self) -> None:
        """Waits for the bucket, and unpacks what another rank sent."""
        self.work.wait()
        if self.views and self.received:
            torch._foreach_copy_(self.tensors, self.views)


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
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
