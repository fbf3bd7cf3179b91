"""Weights that are given to functions, on sharded and replicated models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_precond.registry import create_optimizer
from tests import ranks


class Given(nn.Module):
    """Two layers, one of them used by its weight alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs):
        hidden = self.first(inputs).tanh()
        return F.linear(hidden, self.second.weight, self.second.bias)


def factors(way):
    """The factors of the second layer after two steps; both micro-batches in a world of one."""
    model = Given()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    whole = fully_shard(model) if way == "fsdp2" else model
    optimizer = create_optimizer(model, "nkfac", lr=0.0, stat_interval=1)
    if way == "ddp":
        whole = DistributedDataParallel(model)
    for step in range(2):
        optimizer.zero_grad()
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        if world > 1:
            inputs = inputs.chunk(2)[torch.distributed.get_rank()]
        whole(inputs).square().sum().backward()
        optimizer.step()
    state = optimizer.state[model.second.weight]
    found = {name: state[name].clone() for name in ("input_factor", "output_factor")}
    treatments = [route.treatment for route in optimizer.routing]
    optimizer.close()
    return found | {"treatments": treatments}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_their_statistics_are_summed_over_ranks(way):
    alone = factors("plain")
    for rank in ranks.run(factors, way):
        assert rank["treatments"] == alone["treatments"] == ["preconditioned"] * 4
        for name in ("input_factor", "output_factor"):
            torch.testing.assert_close(rank[name], alone[name])
