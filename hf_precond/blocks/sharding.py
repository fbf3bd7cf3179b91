"""Sharded tensors (FSDP2) gathered, and whole ones sharded again."""

from __future__ import annotations

from collections.abc import Iterable

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
