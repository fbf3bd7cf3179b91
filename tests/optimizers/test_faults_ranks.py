"""Two ranks meet the same fault: what one sees, both do."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_precond.distributed.collectives import full
from hf_precond.registry import list_optimizers
from tests import ranks
from tests.distributed.test_fsdp2 import SHARDABLE, all_full, shard
from tests.optimizers.models import batch, make, train_step, weights
from tests.optimizers.test_shared import build

pytestmark = pytest.mark.slow
BAD = 2
"""The step at which one rank's data are not finite."""


def replicated(name):
    """Weights after 5 steps of which one rank meets a bad batch in the third; steps taken."""
    model = make("vit")
    optimizer = build(name, model, skip_nonfinite=True)
    wrapped = DistributedDataParallel(model)
    for step in range(5):
        inputs = batch("vit", step + 10 * dist.get_rank())
        if step == BAD and dist.get_rank() == 1:
            inputs["pixel_values"][0, 0, 0, 0] = math.nan
        optimizer.zero_grad()
        loss = wrapped(**inputs).loss
        if hasattr(optimizer, "probe"):
            optimizer.probe(loss)
        loss.backward()
        optimizer.step()
    steps = torch.tensor([optimizer.steps, int(optimizer.diagnostics()["skipped_steps"])])
    optimizer.close()
    return {"steps": steps, **weights(model)}


@pytest.mark.parametrize("name", list_optimizers())
def test_a_bad_batch_of_one_rank_is_skipped_by_both(name):
    first, second = ranks.run(replicated, name)
    assert first["steps"].tolist() == [4, 1]
    for key, value in first.items():
        assert torch.isfinite(value).all() and torch.equal(value, second[key]), key


def sharded(name):
    """As above with sharded parameters, the bad entry in one rank's shard of one gradient."""
    model = make("bert")
    shard(model)
    optimizer = build(name, model, skip_nonfinite=True)
    skipped = []

    def poison(own, args, kwargs):
        gradient = model.classifier.weight.grad.to_local()
        if own.steps == BAD and not skipped and dist.get_rank() == 1 and gradient.numel():
            gradient[0, 0] = math.inf
        if own.steps == BAD:
            skipped.append(1)

    optimizer.register_step_pre_hook(poison)
    for step in range(5):
        train_step(model, optimizer, batch("bert", step))
    steps = torch.tensor([optimizer.steps, int(optimizer.diagnostics()["skipped_steps"])])
    optimizer.close()
    return {"steps": full(steps), **all_full(model)}


@pytest.mark.parametrize("name", SHARDABLE)
def test_a_bad_shard_of_one_rank_is_skipped_by_both(name):
    first, second = ranks.run(sharded, name)
    assert first["steps"].tolist() == second["steps"].tolist() == [4, 1]
    for key, value in first.items():
        assert torch.isfinite(value).all() and torch.equal(value, second[key]), key
