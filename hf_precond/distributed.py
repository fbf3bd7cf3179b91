"""What ranks say to each other: sums of statistics and shared work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_precond.blocks import Statistic


def world_size() -> int:
    """Number of ranks; 1 where no process group was made."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_statistics(
    staged: Mapping[str, Statistic],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Statistic]:
    """Sum every statistic over the ranks, in one collective.

    A rank whose module saw no tokens stages nothing and adds zeros, so every
    rank takes part in the same collective. Sums and counts are added; a
    statistic that no rank staged has count 0.

    Args:
        staged: what this rank collected, by key.
        shapes: every key that is asked for, with its shape; the same on all
            ranks.
        dtype: dtype of the sums.
        device: where the collective runs.

    Returns:
        A statistic for every key of ``shapes``.
    """
    parts: list[Tensor] = []
    for key, shape in shapes.items():
        found = staged.get(key)
        size = int(torch.Size(shape).numel())
        if found is None:
            parts.append(torch.zeros(size + 2, dtype=dtype, device=device))
            continue
        tail = torch.stack(
            [found.count.to(dtype).reshape(()), found.count.new_tensor(found.passes).to(dtype)]
        )
        parts.append(torch.cat([found.sum.to(dtype).reshape(-1), tail.to(found.sum.device)]))
    bucket = torch.cat(parts)
    dist.all_reduce(bucket)
    reduced: dict[str, Statistic] = {}
    start = 0
    for key, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        block = bucket[start : start + size + 2]
        reduced[key] = Statistic(block[:size].view(*shape), block[size])
        start += size + 2
    return reduced


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


def share(results: Sequence[Tensor], owner: Sequence[int]) -> None:
    """Give every rank the tensors that their owners have computed, in place.

    One broadcast per owner and dtype, of a flat bucket. Does nothing in a
    world of one rank.

    Args:
        results: tensors that exist on every rank; the owner's values are
            right before, everybody's after.
        owner: the rank that has computed each.
    """
    if world_size() == 1:
        return
    buckets: dict[tuple[int, str], list[Tensor]] = {}
    for tensor, source in zip(results, owner, strict=True):
        buckets.setdefault((source, str(tensor.dtype)), []).append(tensor)
    for (source, _), tensors in sorted(buckets.items(), key=lambda item: item[0]):
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.broadcast(flat, source)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

