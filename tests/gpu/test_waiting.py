"""Between refreshes the host never waits for the device: not in the passes, not in the step."""

import pytest
import torch

from hf_precond.registry import create_optimizer, list_optimizers
from tests.gpu.support import inputs, no_waiting, passes
from tests.optimizers.models import make

pytestmark = pytest.mark.gpu
# Statistics at every step where there are any; refreshes and probes at step 0. AdamR's bases turn
# at steps 1, 2, 3 and 5 of the first interval.
RARELY = {
    "afopt": {"scope": "all_linear", "stat_interval": 1, "inverse_interval": 100},
    "adamr": {"basis_interval": 64},
    "muon": {},
    "nkfac": {"stat_interval": 1, "inverse_interval": 100},
    "sgdph": {"probe_interval": 100},
}
QUIET = (4, 6, 7)
CASES = [(name, {}) for name in list_optimizers()]
CASES += [
    ("afopt", {"scaling": "cap"}),
    ("afopt", {"base": "sgd"}),
    ("afopt", {"base": "muon"}),
    ("afopt", {"attention_entropy": True}),
    ("adamr", {"basis_source": "feature"}),
    ("nkfac", {"base": "sgd"}),
    ("sgdph", {"base": "sgd"}),
]


def build(name, model, values):
    return create_optimizer(model, name, **RARELY[name] | values)


def test_the_ban_raises(cuda):
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(cuda):
        torch.ones(2, device=cuda).sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
def test_a_step_between_refreshes(name, values, dtype, device):
    model = make("bert", dtype=dtype).to(device)
    optimizer = build(name, model, values)
    for step in range(8):
        passes(model, optimizer, inputs("bert", device, step))
        if step in QUIET:
            with no_waiting(device):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.steps == 8 and all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
def test_passes_with_statistics(name, values, device):
    model = make("vit").to(device)
    data = [inputs("vit", device, step) for step in range(8)]
    model(**data[0]).loss.backward()
    with no_waiting(device):  # the model by itself does not wait, or the test would say nothing
        model(**data[0]).loss.backward()
    model.zero_grad()
    optimizer = build(name, model, values)
    losses = []
    for step in range(8):
        if step in QUIET:
            with no_waiting(device):
                losses.append(passes(model, optimizer, data[step]))
                optimizer.step()
                optimizer.zero_grad()
        else:
            losses.append(passes(model, optimizer, data[step]))
            optimizer.step()
            optimizer.zero_grad()
    assert torch.isfinite(torch.stack(losses)).all()


@pytest.mark.parametrize("name", list_optimizers())
def test_a_float16_step_with_a_loss_scaler(name, device):
    model = make("vit").to(device)
    optimizer = build(name, model, {})
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    optimizer.attach_scaler(scaler)
    for step in range(8):
        data = inputs("vit", device, step)
        with torch.autocast(device.type, torch.float16):
            if step in QUIET:
                with no_waiting(device):
                    passes(model, optimizer, data, scaler)
            else:
                passes(model, optimizer, data, scaler)
        scaler.unscale_(optimizer)
        if step in QUIET:
            with no_waiting(device):  # the scaler itself reads whether it must skip
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        scaler.update()
    assert optimizer.steps == 8 and all(torch.isfinite(p).all() for p in model.parameters())
