"""What runs a training in parallel, and what of it an optimizer of this package cannot serve."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_precond.architectures.peft import base_of

INSTEAD = (
    "use DDP (torchrun), or FSDP2 where the model does not fit (fully_shard; fsdp_version: 2 in "
    "accelerate's config; --fsdp true with version 2 in --fsdp_config under the Trainer)."
)
DEEPSPEED = (
    "DeepSpeed is not supported at any ZeRO stage, because it flattens and partitions the gradient "
    "matrices that are preconditioned; "
)
FSDP1 = (
    "FSDP1 (FullyShardedDataParallel) is not supported, because it flattens the matrices that are "
    "preconditioned; "
)
MEGATRON = "Megatron-LM is not supported, because it cuts the matrices that are preconditioned; "
REPLICAS = (
    "nn.DataParallel (one process with several GPUs) is not supported, because it makes new copies "
    "of the model in every pass, which no statistics are read from; show the process one GPU "
    "(CUDA_VISIBLE_DEVICES=0), or "
)
PARALLEL = (
    "tensor parallelism is not supported, because it cuts the matrices that are preconditioned "
    "({seen}); load the model without tp_plan, tp_size or parallelize_module and "
)


def unsupported_strategy(model: nn.Module, who: str) -> str | None:
    """Why what runs the training cannot be served, in a sentence; ``None`` if it can.

    DeepSpeed, FSDP1 and Megatron-LM are told by the model and by what
    accelerate was set up for, so before ``prepare`` too; tensor parallelism
    (alone or below FSDP2) by the placements of the parameters;
    ``nn.DataParallel`` by the model. Right are one process, DDP, and FSDP2 on
    a mesh of one dimension or of replicas by shards.

    Args:
        model: what an optimizer is to be made for.
        who: its name, to begin the sentence with.
    """
    reason = _copied(model) or _flattened(model) or _cut(model)
    return None if reason is None else f"{who}: {reason}{INSTEAD}"


def _copied(model: nn.Module) -> str | None:
    return REPLICAS if isinstance(model, nn.DataParallel) else None


def _flattened(model: nn.Module) -> str | None:
    state = _accelerator_state()
    kind = state.get("distributed_type")
    kind = str(getattr(kind, "value", kind))
    # ZeRO-3 marks the parameters that it partitions when they are made.
    if kind == "DEEPSPEED" or any(hasattr(p, "ds_id") for p in model.parameters()):
        return DEEPSPEED
    if kind == "MEGATRON_LM":
        return MEGATRON
    # FSDP is not imported here: where nobody did, nothing is wrapped.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        flat = fsdp.FullyShardedDataParallel
        if any(isinstance(module, flat) for module in model.modules()):
            return FSDP1
    plugin: Any = state.get("fsdp_plugin")
    if kind == "FSDP" and int(getattr(plugin, "fsdp_version", 1) or 1) == 1:
        return FSDP1
    return None


def _accelerator_state() -> Mapping[str, Any]:
    """accelerate's shared state; empty where no Trainer or Accelerator has made it."""
    state = sys.modules.get("accelerate.state")
    return {} if state is None else state.AcceleratorState._shared_state


def _cut(model: nn.Module) -> str | None:
    """Why a model is refused of whose layers some rank runs a part."""
    size: Any = getattr(base_of(model), "tp_size", None) or 1
    if isinstance(size, int) and size > 1:
        return PARALLEL.format(seen=f"the model's tp_size is {size}")
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None:
        return None
    parallel = [(n, p) for n, p in model.named_parameters() if isinstance(p, tensors.DTensor)]
    if not parallel:
        return None
    fsdp = sys.modules.get("torch.distributed.fsdp")
    gathered = {
        id(parameter)
        for module in model.modules()
        if fsdp is not None and isinstance(module, fsdp.FSDPModule)
        for parameter in module.parameters()
    }
    for name, parameter in parallel:
        if id(parameter) not in gathered or not _only_stored_apart(parameter, tensors):
            placed = f"{name} is a DTensor with placements {parameter.placements}"
            return PARALLEL.format(seen=f"{placed}, which fully_shard alone does not make")
    return None


def _only_stored_apart(parameter: Tensor, tensors: Any) -> bool:
    """Whether at most the last mesh dimension shards, and the others hold replicas."""
    *outer, last = parameter.placements  # type: ignore[attr-defined]
    replicas = all(isinstance(placement, tensors.Replicate) for placement in outer)
    return replicas and type(last) in (tensors.Shard, tensors.Replicate)
