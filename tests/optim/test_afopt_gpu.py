"""AFOpt on a CUDA device: the CPU's step, and no stall between refreshes."""

import copy

import pytest
import torch

from hf_precond.registry import create_optimizer
from tests.optim.models import batch, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device, data):
    return {name: value.to(device) for name, value in data.items()}


@pytest.mark.parametrize("direction", ["spectral", "inverse", "inverse_sqrt"])
def test_steps_of_a_gpu_are_those_of_a_cpu(direction):
    losses = []
    for device in ("cpu", "cuda"):
        model = make("bert").to(device)
        optimizer = create_optimizer(
            model, "afopt", scope="all_linear", direction=direction, lr=1e-3
        )
        found = []
        for step in range(12):
            optimizer.zero_grad()
            loss = model(**on(device, batch("bert", step))).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    # The matrix sign of square matrices is taken in bfloat16 there.
    assert losses[1] == pytest.approx(losses[0], abs=2e-2)


@pytest.mark.parametrize("fields", [{}, {"scaling": "cap"}, {"base": "sgd"}])
def test_no_stall_between_refreshes(fields):
    model = make("bert").cuda()
    optimizer = create_optimizer(model, "afopt", scope="all_linear", **fields)
    for step in range(8):
        data = on("cuda", batch("bert", step))
        model(**data).loss.backward()
        torch.cuda.synchronize()
        if step % 5:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()


def test_state_moves_with_a_checkpoint():
    model = make("bert").cuda()
    optimizer = create_optimizer(model, "afopt")
    model(**on("cuda", batch("bert"))).loss.backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = create_optimizer(make("bert").cuda(), "afopt")
    other.load_state_dict(torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, saved))
    for ours, theirs in zip(optimizer.placed, other.placed, strict=True):
        for name, value in optimizer.state[ours.weight].items():
            found = other.state[theirs.weight][name]
            if isinstance(value, torch.Tensor):
                assert found.device == value.device
                assert torch.equal(found, value), name
