"""Meshes of two dimensions, and tensor parallelism."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Replicate, Shard
from transformers import LlamaForCausalLM

from hf_precond.registry import create_optimizer, list_optimizers
from tests import ranks
from tests.distributed.test_fsdp2 import SHARDABLE, all_full
from tests.optimizers.models import batch, make, train_step
from tests.optimizers.test_shared import QUICK

STEPS = 6


def share_of_rank(inputs):
    """This rank's rows of a batch, which all have one length here."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    rows = len(inputs["labels"])
    return {k: v[rank * rows // world : (rank + 1) * rows // world] for k, v in inputs.items()}


def train_replicas_of_shards(model_name):
    """Two replicas of two shards, each rank on rows of its own; every optimizer in turn."""
    found = {}
    for name in SHARDABLE:
        model = make(model_name, dtype=torch.float64)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            fully_shard(model, mesh=mesh)
            placements = next(model.parameters()).placements
            assert placements == (Replicate(), Shard(0)), placements
        optimizer = create_optimizer(model, name, lr=1e-3, weight_decay=0.01, **QUICK[name])
        losses = []
        for step in range(STEPS):
            inputs = batch(model_name, step, size=8, dtype=torch.float64)
            losses.append(train_step(model, optimizer, share_of_rank(inputs)))
        found[f"{name}/losses"] = torch.tensor(losses, dtype=torch.float64)
        found |= {f"{name}/{key}": value for key, value in all_full(model).items()}
        optimizer.close()
    return found


@pytest.mark.slow
def test_replicas_of_shards_equal_the_unsharded_run():
    single = train_replicas_of_shards("vit")
    results = ranks.run(train_replicas_of_shards, "vit", size=4)
    for key, expected in single.items():
        values = [result[key] for result in results]
        if key.endswith("losses"):
            mean = torch.stack(values).mean(0)
            # From the fourth step on rounding decides AdamR's bases of null spaces (test_ddp).
            compared = 3 if key.startswith("adamr") else STEPS
            torch.testing.assert_close(mean[:compared], expected[:compared], rtol=1e-6, atol=1e-8)
            continue
        assert all(torch.equal(value, values[0]) for value in values), key
        if not key.startswith("adamr"):
            torch.testing.assert_close(values[0], expected, rtol=1e-5, atol=1e-7, msg=key)


class Layers(nn.Module):
    """What tensor parallelism cuts: two linear layers behind a norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
# sgdph preconditions nothing that is cut here, and yet the gradients of its norm would be wrong.
FIELDS = {"afopt": {"scope": "all_linear"}}


KINDS = ("transformers", "tensor parallel", "tensor parallel below FSDP2", "by hand")
SIGNS = ("tp_size is 2", "up.", "down.")


def parallel_model(kind, folder):
    if kind == "transformers":
        return LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    if kind == "tensor parallel":
        return parallelize_module(Layers(), init_device_mesh("cpu", (2,)), PLAN)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "tensor"))
    if kind == "tensor parallel below FSDP2":
        model = parallelize_module(Layers(), mesh["tensor"], PLAN)
        fully_shard(model, mesh=mesh["shard"])
        return model
    model = Layers()
    model.up.weight = nn.Parameter(distribute_tensor(model.up.weight, mesh, [Shard(0), Shard(1)]))
    return model


def refusals(folder):
    messages = {}
    for kind in KINDS:
        model = parallel_model(kind, folder)
        for name in list_optimizers():
            with pytest.raises(ValueError, match=r"tensor parallelism is not supported") as error:
                create_optimizer(model, name, **FIELDS.get(name, {}))
            messages[f"{kind}/{name}"] = str(error.value)
    return messages


@pytest.mark.slow
def test_tensor_parallelism_is_refused_with_what_to_use_instead(tmp_path):
    make("llama").save_pretrained(tmp_path)
    for messages in ranks.run(refusals, str(tmp_path)):
        assert len(messages) == len(KINDS) * len(list_optimizers())
        for key, message in messages.items():
            assert message.startswith(f"{key.split('/')[1]}: ")
            assert any(sign in message for sign in SIGNS), message
            assert "use DDP (torchrun), or FSDP2" in message
