"""The steps of a new head whose weights are sharded."""

from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_precond import AdamRConfig
from hf_precond.architectures.modules import layer_matrix
from hf_precond.distributed.collectives import full, rank, world_size
from hf_precond.optimizers.base.new_head import NewHead
from hf_precond.optimizers.base.parameters import ParamView
from tests import ranks


def stepped(sharded):
    """Weights after four steps of two layers, the second with five rows on two ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    layers = [model[0], model[2]]
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2,))
        for each in (*layers, model):
            fully_shard(each, mesh=mesh)
    state = defaultdict(dict)
    matrices = [layer_matrix(layer, name) for layer, name in zip(layers, "02", strict=True)]
    head = NewHead(model, matrices, AdamRConfig(), state, 1e-3)
    group = {"lr": 1e-3, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(1)
    for number in range(4):
        head.enable(number)
        x = torch.randn(16, 4, dtype=torch.float64, generator=generator)
        x = x[rank() :: world_size()]
        model.zero_grad()
        model(x).square().mean().backward()
        head.update()
        views = [ParamView(p, p.grad, state[p], "", group) for p in model.parameters()]
        with torch.no_grad():
            assert not head.step(views)
    head.close()
    return [full(parameter).detach() for parameter in model.parameters()]


@pytest.mark.slow
def test_shards_are_stepped_as_the_whole_is():
    expected = ranks.alone(stepped, False)
    for found in ranks.run(stepped, True):
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
