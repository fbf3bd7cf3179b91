"""Parameters sharded over two ranks (FSDP2) end where the unsharded run ends."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_precond.distributed.collectives import full
from hf_precond.registry import create_optimizer, list_optimizers
from tests import ranks
from tests.optimizers.models import batch, make, train_step
from tests.optimizers.test_shared import QUICK

STEPS = 6
SHARDABLE = [name for name in list_optimizers() if name != "sgdph"]


def shard(model):
    """The model sharded; the parameters it had before, in order."""
    before = list(model.parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return before


def all_full(model):
    """Every parameter gathered, by name."""
    return {key: full(value.detach()).clone() for key, value in model.named_parameters()}


def run(name, model_name, when):
    model = make(model_name, dtype=torch.float64)
    values = {"lr": 1e-3, "weight_decay": 0.01} | QUICK[name]
    if when == "never":
        optimizer = create_optimizer(model, name, **values)
    elif when == "first":
        shard(model)
        optimizer = create_optimizer(model, name, **values)
    else:  # as accelerate does: made on the raw model, the parameters then swapped
        optimizer = create_optimizer(model, name, **values)
        optimizer.load_state_dict(optimizer.state_dict())
        before = shard(model)
        new = dict(zip(before, model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [new[parameter] for parameter in group["params"]]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(step, 1)  # warm-up begins at zero
        train_step(model, optimizer, batch(model_name, step, dtype=torch.float64))
        assert optimizer.steps == step + 1
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    train_step(model, optimizer, batch(model_name, STEPS, dtype=torch.float64))
    return all_full(model)


def run_each(model_name, when):
    """Every optimizer in turn: the weights at the end, by optimizer and parameter."""
    return {
        f"{name}/{key}": value
        for name in SHARDABLE
        for key, value in run(name, model_name, when).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("when", ["first", "swapped"])
@pytest.mark.parametrize("model_name", ["bert", "gpt2", "llama"])
def test_sharded_equals_unsharded(model_name, when):
    single = run_each(model_name, "never")
    for result in ranks.run(run_each, model_name, when):
        assert result.keys() == single.keys()
        for key, value in result.items():
            torch.testing.assert_close(value, single[key], rtol=1e-5, atol=1e-8, msg=key)
