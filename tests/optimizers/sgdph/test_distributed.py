"""SGD-PH on two ranks: the products are averaged as the gradient is."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_precond.registry import create_optimizer
from tests.optimizers.models import batch, make
from tests.optimizers.sgdph.test_differences import FusedLoss, Model, curvature, train
from tests.ranks import run as on_ranks

STEPS = 5


def rows_of(inputs, rank):
    return {key: value[4 * rank : 4 * rank + 4] for key, value in inputs.items()}


def step_on(model, optimizer, inputs, parts):
    for part in parts:
        with optimizer.curvature_context():
            loss = model(**{k: v[part] for k, v in inputs.items()}).loss / len(parts)
            optimizer.probe(loss)
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def run(rank, how, store, results):
    torch.set_num_threads(1)
    # What accelerate asks for; nobody listens on the port, the store is a file.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = make("bert")
    optimizer = create_optimizer(model, "sgdph", lr=1e-3, probe_interval=2)
    if how == "accelerate":
        accelerator = Accelerator(cpu=True)
        wrapped, stepper = accelerator.prepare(model, optimizer)
        assert isinstance(wrapped, DistributedDataParallel)
    else:
        wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        inputs = rows_of(batch("bert", step, size=8), rank)
        if how == "accelerate":
            accelerator.backward(wrapped(**inputs).loss)
            stepper.step()
            stepper.zero_grad()
        else:
            step_on(wrapped, optimizer, inputs, [slice(0, 4)])
    curvature = [optimizer.state[n.parameter]["curvature"] for n in optimizer.structure.norms]
    if rank == 0:
        saved = {name: p.detach() for name, p in model.named_parameters()}
        torch.save({"weights": saved, "curvature": torch.cat(curvature)}, results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "accelerate"])
def test_two_ranks_take_the_path_of_one(how, tmp_path):
    results = str(tmp_path / "two.pt")
    mp.spawn(run, (how, str(tmp_path / "store"), results), nprocs=2)
    two = torch.load(results, weights_only=True)
    model = make("bert")
    optimizer = create_optimizer(model, "sgdph", lr=1e-3, probe_interval=2)
    start = copy.deepcopy(dict(model.named_parameters()))
    for step in range(STEPS):
        # Two micro-batches: what the two ranks saw.
        inputs = batch("bert", step, size=8)
        step_on(model, optimizer, inputs, [slice(0, 4), slice(4, 8)])
    curvature = torch.cat(
        [optimizer.state[n.parameter]["curvature"] for n in optimizer.structure.norms]
    )
    assert (curvature - two["curvature"]).norm() / curvature.norm() < 1e-3
    moved, apart = nn.ParameterList(), 0.0
    for name, parameter in model.named_parameters():
        moved.append(parameter - start[name])
        apart += (parameter - two["weights"][name]).square().sum().item()
    assert apart**0.5 < 1e-3 * sum(m.square().sum().item() for m in moved) ** 0.5
    optimizer.close()


def differences(fused, unused, folder):
    """Three steps of two micro-batches under the Trainer, of which the first and last probe."""
    made = train(
        folder,
        Model(),
        loss=FusedLoss.apply if fused else nn.functional.cross_entropy,
        optim_args="probe_interval=2",
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        ddp_find_unused_parameters=unused,
    )
    assert isinstance(made.model_wrapped, DistributedDataParallel)
    assert made.model_wrapped.require_forward_param_sync
    grads = [parameter.grad is None for parameter in made.model.parameters()]
    weights = torch.cat(
        [parameter.detach().flatten() for parameter in made.model.head.parameters()]
    )
    return {"curvature": curvature(made), "weights": weights, "cleared": all(grads)}


@pytest.mark.slow
@pytest.mark.parametrize("unused", [False, True])
def test_differences_on_two_ranks_are_those_of_the_graph(unused, tmp_path):
    """DDP's reducer takes no notice of the passes that are made again."""
    exact = on_ranks(differences, False, unused, str(tmp_path))
    found = on_ranks(differences, True, unused, str(tmp_path))
    assert torch.equal(found[0]["curvature"], found[1]["curvature"])
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    wanted = exact[0]["curvature"]
    assert (found[0]["curvature"] - wanted).norm() / wanted.norm() < 3e-3
    torch.testing.assert_close(found[0]["weights"], exact[0]["weights"], rtol=1e-4, atol=1e-5)
    assert found[0]["cleared"] == exact[0]["cleared"]
