"""What runs a training in parallel, and which of it the optimizers of this package cannot serve.

Reads the state that accelerate's ``Accelerator`` objects share, ``AcceleratorState._shared_state``
(accelerate 1.7 to 1.15); accelerate is not imported for it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

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
DATA_PARALLEL = (
    "nn.DataParallel (one process with several GPUs) is not supported, because it makes new copies "
    "of the model in every pass, which no statistics are read from; show the process one GPU "
    "(CUDA_VISIBLE_DEVICES=0), or "
)
TENSOR_PARALLEL = (
    "tensor parallelism is not supported, because it cuts the matrices that are preconditioned "
    "({seen}); load the model without tp_plan, tp_size or parallelize_module and "
)


def unsupported_strategy(model: nn.Module, optimizer: str) -> str | None:
    """Why what runs the training cannot be served, in a sentence.

    DeepSpeed, FSDP1 and Megatron-LM are recognised by the model and by what
    accelerate was set up for, so before ``prepare`` too; tensor parallelism
    (alone or below FSDP2) by the placements of the parameters;
    ``nn.DataParallel`` by the model. Supported are one process, DDP, and FSDP2
    on a mesh of one dimension or of replicas by shards.

    Args:
        model: the model that the optimizer is made for.
        optimizer: its name, with which the sentence begins.

    Returns:
        The sentence, with what to use instead; ``None`` where nothing is refused.
    """
    reason = _whole_model_reason(model) or _tensor_parallel_reason(model)
    return None if reason is None else f"{optimizer}: {reason}{INSTEAD}"


def _whole_model_reason(model: nn.Module) -> str | None:
    """Why a model is refused that is copied, or whose parameters are flattened or partitioned."""
    if isinstance(model, nn.DataParallel):
        return DATA_PARALLEL
    accelerate = sys.modules.get("accelerate.state")
    state: Any = {} if accelerate is None else accelerate.AcceleratorState._shared_state
    kind = state.get("distributed_type")
    kind = str(getattr(kind, "value", kind))
    # ZeRO-3 marks the parameters that it partitions when they are made.
    if kind == "DEEPSPEED" or any(hasattr(p, "ds_id") for p in model.parameters()):
        return DEEPSPEED
    if kind == "MEGATRON_LM":
        return MEGATRON
    # torch.distributed.fsdp is not imported here: where nothing else did, nothing is wrapped.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        flat = fsdp.FullyShardedDataParallel
        if any(isinstance(module, flat) for module in model.modules()):
            return FSDP1
    plugin: Any = state.get("fsdp_plugin")
    if kind == "FSDP" and int(getattr(plugin, "fsdp_version", 1) or 1) == 1:
        return FSDP1
    return None


def _tensor_parallel_reason(model: nn.Module) -> str | None:
    """Why a model is refused of which each rank computes a part of some layer."""
    for module in model.modules():
        size: Any = getattr(module, "tp_size", None)  # of a PreTrainedModel
        if isinstance(size, int) and size > 1:
            return TENSOR_PARALLEL.format(seen=f"the model's tp_size is {size}")
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
        if id(parameter) not in gathered or not _is_fully_sharded(parameter, tensors):
            placed = f"{name} is a DTensor with placements {parameter.placements}"
            return TENSOR_PARALLEL.format(seen=f"{placed}, which fully_shard alone does not make")
    return None


def _is_fully_sharded(parameter: Tensor, tensors: Any) -> bool:
    """Whether at most the last mesh dimension shards, and the others hold replicas."""
    *outer, last = parameter.placements  # type: ignore[attr-defined]
    replicas = all(isinstance(placement, tensors.Replicate) for placement in outer)
    return replicas and type(last) in (tensors.Shard, tensors.Replicate)
