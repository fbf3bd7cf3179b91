"""Autocast and loss scalers in plain loops."""

import contextlib

import pytest
import torch

from hf_precond.registry import list_optimizers
from tests.optimizers.models import NO_STATISTICS, batch, make, train, weights
from tests.optimizers.test_shared import build, same

NAMES = [*sorted({*list_optimizers()} - NO_STATISTICS), "adamr-feature"]
each_name = pytest.mark.parametrize("name", NAMES)
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def optimizer_of(name, model, **values):
    """AdamR with statistics of features too, which hold output gradients."""
    if name == "adamr-feature":
        values = {"basis_source": "feature"} | values
    return build(name.split("-")[0], model, **values)


def scaled_step(model, optimizer, scaler, inputs, dtype=None, factor=1.0):
    """One step of a loop with a loss scaler, as PyTorch's documentation writes it."""
    optimizer.zero_grad()
    autocast = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
    around = getattr(optimizer, "curvature_context", contextlib.nullcontext)
    with around():
        with autocast:
            loss = model(**inputs).loss * factor
        if hasattr(optimizer, "probe"):
            optimizer.probe(loss)
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


@each_name
def test_a_loss_scale_changes_nothing(name):
    model, twin = make("bert"), make("bert")
    optimizer, plain = optimizer_of(name, model), optimizer_of(name, twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer.attach_scaler(scaler)
    for step in range(5):
        scaled_step(model, optimizer, scaler, batch("bert", step))
    train("bert", twin, plain, 5)
    assert scaler.get_scale() == 2.0**12
    same(weights(model), weights(twin))
    for each in (optimizer, plain):
        each.close()


@each_name
def test_a_step_that_the_scaler_skips_leaves_no_trace(name):
    model, twin = make("bert"), make("bert")
    optimizer, plain = optimizer_of(name, model), optimizer_of(name, twin)
    # The first step overflows; the next scale is a power of two that does not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    optimizer.attach_scaler(scaler)
    before = weights(model)
    scaled_step(model, optimizer, scaler, batch("bert", 9), factor=2.0**8)
    assert optimizer.steps == 0 and scaler.get_scale() == 2.0**7
    same(before, weights(model))
    for step in range(4):
        scaled_step(model, optimizer, scaler, batch("bert", step))
    train("bert", twin, plain, 4)
    assert optimizer.steps == 4
    same(weights(model), weights(twin))
    for each in (optimizer, plain):
        each.close()


def factors(optimizer):
    """The running statistics, each of unit norm."""
    names = ("_factor", "_moment", "curvature")
    found = {
        f"{index}.{key}": value.double()
        for index, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if key.endswith(names) and torch.is_tensor(value)
    }
    return {key: value / value.norm() for key, value in found.items() if value.norm() > 0}


@each_name
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_trains_with_float32_state_and_about_the_same_statistics(name, dtype):
    model, twin = make("bert"), make("bert")
    optimizer, plain = optimizer_of(name, model), optimizer_of(name, twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype == "float16")
    optimizer.attach_scaler(scaler)
    scaled_step(model, optimizer, scaler, batch("bert"), HALVES[dtype])
    train("bert", twin, plain, 1)
    ours, theirs = factors(optimizer), factors(plain)
    # After one step AdamR's factors of gradients are still in the coordinates of the weights.
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for key, value in ours.items():
        # Products of rounded numbers: 2^-8 or 2^-11 each, through two layers and back.
        assert (value - theirs[key]).norm() < (0.1 if dtype == "bfloat16" else 0.02), key
    losses = [
        scaled_step(model, optimizer, scaler, batch("bert"), HALVES[dtype]) for _ in range(12)
    ]
    assert losses[-1] < losses[0] - 0.01
    for state in optimizer.state.values():
        for key, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point():
                kept = key.endswith(("_factor", "_inverse"))  # NKFAC's, in halves by default
                expected = optimizer.config.factor_dtype(torch.float32) if kept else torch.float32
                assert value.dtype == expected, key
    for each in (optimizer, plain):
        each.close()


def test_statistics_follow_a_scale_that_changes_under_way():
    """The scale is asked for when the gradient arrives, not when the step before was taken."""
    model = make("bert")
    optimizer = optimizer_of("nkfac", model, stat_interval=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer.attach_scaler(scaler)
    sums = []
    for scale in (2.0**4, 2.0**9):
        optimizer.zero_grad()
        scaler.scale(torch.ones(()))
        scaler._scale.fill_(scale)
        scaler.scale(model(**batch("bert")).loss).backward()
        taken = optimizer.statistics.take()
        sums.append({key: s.sum for key, s in taken.items() if key.endswith("output")})
    assert sums[0]
    same(sums[0], sums[1])
    optimizer.close()
    copied = optimizer_of("nkfac", model)
    copied.attach_scaler(torch.amp.GradScaler("cpu", enabled=False))
    assert copied.statistics.loss_scale() is None
    copied.close()
