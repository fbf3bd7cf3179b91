"""Sharded tensors (FSDP2) gathered, and whole ones sharded again."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard


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


def refuse_tensor_parallel(model: nn.Module, who: str) -> None:
    """Refuse a model whose layers are in pieces, not only their storage.

    FSDP2 (``fully_shard``) is right on a mesh of one dimension and on one of
    replicas by shards: every rank runs whole layers on tokens of its own.
    Under tensor parallelism, alone or below FSDP2, it runs a part of a layer.

    Args:
        model: what an optimizer is to be made for.
        who: the optimizer's name.

    Raises:
        ValueError: naming a parameter, its placements and what to do.
    """
    parallel = [(n, p) for n, p in model.named_parameters() if isinstance(p, DTensor)]
    if not parallel:
        return
    # FSDP2 is not imported here: where nobody did, it shards nothing.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    gathered = {
        id(parameter)
        for module in model.modules()
        if fsdp is not None and isinstance(module, fsdp.FSDPModule)
        for parameter in module.parameters()
    }
    for name, parameter in parallel:
        if id(parameter) not in gathered or not _is_storage_only(parameter.placements):
            raise ValueError(
                f"{who}: tensor parallelism is not supported, because it cuts the matrices that "
                f"are preconditioned ({name} is a DTensor with placements {parameter.placements} "
                "that fully_shard alone does not make); load the model without tp_plan, "
                "tp_size or parallelize_module and use DDP (torchrun), or FSDP2 where it does not "
                "fit."
            )


def _is_storage_only(placements: tuple[Placement, ...]) -> bool:
    """Whether at most one mesh dimension, the last, shards, and the others hold replicas."""
    replicas = all(isinstance(placement, Replicate) for placement in placements[:-1])
    return replicas and type(placements[-1]) in (Shard, Replicate)
