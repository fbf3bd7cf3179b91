"""Signs of large matrices shared out among ranks: the same step as on one."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_precond.distributed.collectives import full, world_size
from hf_precond.optimizers.muon import step as muon_step
from hf_precond.registry import create_optimizer
from tests import ranks

SIZES = [(12, 8)] * 5 + [(8, 12), (3, 20)]


def steps(sharded=False):
    """Weights after steps with the same gradients on every rank, and how many signs were made."""
    plain, threshold, made = muon_step.newton_schulz, muon_step.SHARED, []

    def counted(matrices, *args):
        made.append(len(matrices))
        return plain(matrices, *args)

    muon_step.newton_schulz, muon_step.SHARED = counted, 4
    try:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(columns, rows) for rows, columns in SIZES))
        if sharded and world_size() > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = create_optimizer(model, "muon", lr=1e-2, variant="normuon")
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                whole = torch.randn(parameter.shape, generator=generator)
                parameter.grad = muon_step.like(parameter, whole)
            optimizer.step()
        signs = sum(made)
        momentum = optimizer.state[model[0].weight]["momentum_buffer"]
        kept = getattr(momentum, "_local_tensor", momentum).numel()
        values = {name: full(p.detach()) for name, p in model.named_parameters()}
        return values, signs, kept, optimizer.report()
    finally:
        muon_step.newton_schulz, muon_step.SHARED = plain, threshold


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "fsdp2"])
def test_two_ranks_share_the_signs_and_step_as_one(sharded):
    single, made, kept, report = steps()
    assert made == 4 * 7
    (first, one, half, said), (second, two, _, _) = ranks.run(steps, sharded)
    # Five of one shape are shared; the others, alone in theirs, are computed by both.
    assert (one, two) == (4 * (3 + 2), 4 * (2 + 2))
    assert half == (kept // 2 if sharded else kept)
    for name, value in single.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
        assert torch.equal(first[name], second[name]), name
    assert said == pytest.approx(report, rel=1e-5)
