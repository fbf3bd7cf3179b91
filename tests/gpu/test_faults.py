"""Faults on a device: told to the host without waiting for it, and no preconditioner poisoned."""

import math

import pytest
import torch

from hf_precond.optimizers.base.refresh import MAX_DROPPED, FailureRecord
from hf_precond.registry import list_optimizers
from tests.gpu.support import inputs, no_waiting, passes
from tests.optimizers.models import make
from tests.optimizers.test_faults import preconditioner
from tests.optimizers.test_shared import build

pytestmark = pytest.mark.gpu


def test_failures_on_the_device_are_judged_without_waiting(device):
    failures = FailureRecord()
    bad = torch.tensor([1, 0], device=device)
    with no_waiting(device):
        for _ in range(2):
            failures.watch("factor", ["a", "b"], bad)
            failures.check()
    with pytest.raises(RuntimeError, match=r"^a: .*3 times in a row"):
        failures.watch("factor", ["a", "b"], bad)
        failures.check()
        # On a GPU the news arrive with a copy, and a copy may wait for the one before it.
        for _ in range(2):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            failures.check()


@pytest.mark.parametrize("name", list_optimizers())
def test_bad_gradients_stop_training_in_time_and_poison_no_preconditioner(name, device):
    model = make("vit").to(device)
    optimizer = build(name, model)
    for step in range(4):
        passes(model, optimizer, inputs("vit", device, step))
        optimizer.step()
        optimizer.zero_grad()
    bad = inputs("vit", device)
    bad["pixel_values"][0, 0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="in a row"):
        for _ in range(4 * MAX_DROPPED):
            passes(model, optimizer, bad)
            optimizer.step()
            optimizer.zero_grad()
    for key, value in preconditioner(optimizer).items():
        assert torch.isfinite(value).all(), key
    optimizer.close()


@pytest.mark.parametrize("name", list_optimizers())
def test_a_skipped_step_changes_nothing(name, device):
    model = make("vit").to(device)
    optimizer = build(name, model, skip_nonfinite=True)
    passes(model, optimizer, inputs("vit", device))
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    bad = inputs("vit", device)
    bad["pixel_values"][0, 0, 0, 0] = math.inf
    passes(model, optimizer, bad)
    optimizer.step()
    assert optimizer.steps == 1 and optimizer.diagnostics()["skipped_steps"] == 1
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, parameter)
    optimizer.close()
