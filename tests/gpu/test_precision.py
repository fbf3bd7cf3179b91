"""float16 with a loss scaler, bfloat16 by autocast and bfloat16 weights."""

import math

import pytest
import torch

from hf_precond import PrecondTrainer
from hf_precond.integrations.arguments import own_optimizer
from hf_precond.registry import create_optimizer, list_optimizers
from tests.gpu.support import inputs, passes
from tests.integrations.test_trainer import losses
from tests.integrations.test_trainer import make as make_trainer
from tests.optimizers.models import make
from tests.optimizers.test_shared import build

pytestmark = pytest.mark.gpu
each_name = pytest.mark.parametrize("name", list_optimizers())
WITH_STATISTICS = {
    "afopt": {"scope": "all_linear", "stat_interval": 1},
    "adamr": {"basis_source": "feature"},
    "nkfac": {"stat_interval": 1},
    "sgdph": {"probe_interval": 1},
}


def assert_float32(state):
    """NKFAC's Kronecker factors and their inverses are float16, by its documentation."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            kronecker = key.endswith(("put_factor", "put_inverse"))
            assert value.dtype == (torch.float16 if kronecker else torch.float32), key


@each_name
def test_a_loop_with_a_loss_scaler(name, device):
    model = make("bert").to(device)
    optimizer = build(name, model, lr=3e-3)
    # So large that the first passes overflow and their steps are skipped.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, backoff_factor=2.0**-15)
    optimizer.attach_scaler(scaler)
    data, seen, skipped = inputs("bert", device), [], 0
    for _ in range(16):
        before, taken = [p.detach().clone() for p in model.parameters()], optimizer.steps
        with torch.autocast(device.type, torch.float16):
            seen.append(passes(model, optimizer, data, scaler).item())
        scaler.step(optimizer)
        scaler.update()
        if optimizer.steps == taken:
            skipped += 1
            now = model.parameters()
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        optimizer.zero_grad()
    assert 0 < skipped < 4 and optimizer.steps == 16 - skipped
    assert all(map(math.isfinite, seen)) and seen[-1] < seen[0] - 0.02


@pytest.mark.parametrize("name", WITH_STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_statistics_under_autocast_are_those_of_float32(name, dtype, device):
    found = []
    for low in (False, True):
        model = make("bert").to(device)
        optimizer = create_optimizer(model, name, **WITH_STATISTICS[name])
        scaler = None
        if low and dtype == torch.float16:
            scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
            optimizer.attach_scaler(scaler)
        with torch.autocast(device.type, dtype, enabled=low):
            passes(model, optimizer, inputs("bert", device), scaler)
        found.append(optimizer.statistics.take())
        optimizer.close()
    plain, lower = found
    assert plain.keys() == lower.keys() and plain
    for key, statistic in plain.items():
        assert lower[key].sum.dtype == torch.float32
        difference = (lower[key].sum - statistic.sum).norm() / statistic.sum.norm()
        assert difference < 5e-2, (key, float(difference))


@each_name
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_trainer(name, kind, device, tmp_path):
    trainer = make_trainer(
        name,
        tmp_path,
        cls=PrecondTrainer,
        max_steps=40,
        learning_rate=2e-2,
        use_cpu=device.type == "cpu",
        **{kind: True},
    )
    trainer.train()
    seen = losses(trainer)
    assert len(seen) == 40 and all(map(math.isfinite, seen))
    assert sum(seen[-8:]) < 0.7 * sum(seen[:8])
    if device.type == "cuda":
        assert next(trainer.model.parameters()).is_cuda
        assert (trainer.accelerator.scaler is not None) == (kind == "fp16")
    for state in own_optimizer(trainer.optimizer).state.values():
        assert_float32(state)


@each_name
def test_bfloat16_weights(name, device):
    model = make("bert", dtype=torch.bfloat16).to(device)
    optimizer = build(name, model, lr=3e-3)
    data = inputs("bert", device)
    seen = []
    for _ in range(16):
        optimizer.zero_grad()
        seen.append(passes(model, optimizer, data).item())
        optimizer.step()
    assert all(map(math.isfinite, seen)) and seen[-1] < seen[0] - 0.02
    for parameter, state in optimizer.state.items():
        assert parameter.dtype == torch.bfloat16
        assert_float32(state)
