"""FSDP2 with one rank on a GPU (NCCL): the steps of the unsharded model."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_precond.distributed.collectives import full
from hf_precond.registry import create_optimizer, list_optimizers
from tests.gpu.support import inputs, passes
from tests.optimizers.models import make, train_step
from tests.optimizers.test_shared import QUICK, build

pytestmark = pytest.mark.gpu
SHARDABLE = [name for name in list_optimizers() if name != "sgdph"]
STEPS = 6


@pytest.fixture
def mesh(device, tmp_path):
    """A mesh of one rank."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()


def shard(model, mesh):
    """The layers, then the whole, sharded in place."""
    for layer in model.modules():
        if type(layer).__name__.endswith(("Layer", "Block")):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("model_name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", SHARDABLE)
def test_sharded_steps_are_those_of_the_whole_model(name, model_name, mesh, device):
    results = []
    for sharded in (False, True):
        model = make(model_name, dtype=torch.float64).to(device)
        if sharded:
            shard(model, mesh)
        optimizer = build(name, model)
        for step in range(STEPS):
            data = inputs(model_name, device, step, dtype=torch.float64)
            train_step(model, optimizer, data)
        results.append({k: full(p.detach()) for k, p in model.named_parameters()})
        optimizer.close()
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-5, atol=1e-8, msg=key)


def test_curvature_of_a_sharded_model_is_refused(mesh, device):
    model = make("bert").to(device)
    shard(model, mesh)
    with pytest.raises((RuntimeError, ValueError), match="sharded"):
        optimizer = create_optimizer(model, "sgdph", **QUICK["sgdph"])
        passes(model, optimizer, inputs("bert", device))


@pytest.mark.parametrize("name", SHARDABLE)
def test_an_unmodified_script_under_torchrun(name, cuda, tmp_path):
    from tests.cli.test_training import train

    (tmp_path / "plain").mkdir()
    (tmp_path / "fsdp").mkdir()
    words = ["--max_steps", 12, "--family", "llama", "--use_cpu", "false"]
    plain = train([sys.executable], name, tmp_path / "plain", *words)
    one = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    layers = '{"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'
    words += ["--fsdp", "full_shard auto_wrap", "--fsdp_config", layers]
    sharded = train(one, name, tmp_path / "fsdp", *words)
    assert len(plain) == len(sharded) == 12
    # AdamR's eigenvectors of close eigenvalues multiply rounding by 1e5 a step.
    assert sharded == pytest.approx(plain, rel=1e-2 if name == "adamr" else 1e-3)
