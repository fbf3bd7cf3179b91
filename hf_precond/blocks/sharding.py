"""Sharded tensors (FSDP2) gathered, and whole ones sharded again."""

from __future__ import annotations

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
