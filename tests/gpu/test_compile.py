"""Compiled models: the same losses, one compilation, no break for the sake of a hook."""

import pytest
import torch
from torch._dynamo.utils import counters

from hf_precond.registry import create_optimizer, list_optimizers
from tests.gpu.support import inputs, passes
from tests.integrations.test_compile import EVERY_FOUR, WARM
from tests.integrations.test_compile import train as train_with_trainer
from tests.integrations.test_trainer import losses
from tests.optimizers.models import MODELS, make

pytestmark = pytest.mark.gpu
each_name = pytest.mark.parametrize("name", list_optimizers())
STEPS = 10


@pytest.fixture
def backend(device):
    """What compiles; nothing compiled outlives a test."""
    yield "inductor" if device.type == "cuda" else "aot_eager"
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def train(name, model_name, device, backend):
    """Losses, the graphs compiled after each step, and where graphs broke; AdamW for no name."""
    torch._dynamo.reset()
    counters.clear()
    model = make(model_name).to(device)
    if name is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = create_optimizer(model, name, lr=1e-3, **EVERY_FOUR[name])
    called = model if backend is None else torch.compile(model, backend=backend)
    seen, graphs = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        seen.append(passes(called, optimizer, inputs(model_name, device, step)).item())
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    if name is not None:
        optimizer.close()
    return seen, graphs, set(counters["graph_break"])


@each_name
@pytest.mark.parametrize("model_name", MODELS)
def test_a_loop(name, model_name, device, backend):
    plain, _, _ = train(name, model_name, device, None)
    compiled, graphs, breaks = train(name, model_name, device, backend)
    # Models break a graph or compile it again by themselves, by what their first pass changes.
    _, by_itself, breaks_by_itself = train(None, model_name, device, backend)
    assert graphs[WARM:] == [graphs[-1]] * (STEPS - WARM)
    assert 0 < graphs[-1] <= by_itself[-1] and breaks <= breaks_by_itself
    assert compiled == pytest.approx(plain, abs=2e-2 if name == "adamr" else 1e-3)


@each_name
def test_a_trainer(name, device, backend, tmp_path):
    fields = {"use_cpu": device.type == "cpu"}
    plain, _, _ = train_with_trainer(name, tmp_path, **fields)
    fields |= {"torch_compile": True, "torch_compile_backend": backend}
    trainer, graphs, broken = train_with_trainer(name, tmp_path, **fields)
    assert graphs[WARM:] == [graphs[WARM]] * (STEPS - WARM) and graphs[WARM] > 0
    assert broken == {}
    # Compiled kernels round otherwise, and five times the usual rate magnifies it.
    assert losses(trainer) == pytest.approx(losses(plain), abs=2e-2)
