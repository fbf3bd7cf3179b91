"""What ranks say to each other: bucketed sums of staged statistics."""

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
