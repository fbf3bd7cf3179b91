"""AFOpt on LoRA's adapters."""

import pytest
import torch

from hf_precond.registry import create_optimizer
from tests.optimizers.afopt.support import (
    directions,
)
from tests.optimizers.models import batch, make, train, weights

DOUBLE = torch.float64


def adapted(targets, dtype=DOUBLE, dora=False):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, modules_to_save=["classifier"], use_dora=dora
    )
    return get_peft_model(make("bert", dtype=dtype), config).train()


def disturb(model):
    """Give every B entries, and DoRA's magnitudes other ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)


def inputs_of(layer, model, data):
    """What a layer was called with in a pass that reaches every gradient, without padding."""
    seen = []
    handle = layer.register_forward_hook(lambda m, a, out: seen.append(a[0].detach()))
    model(**data).loss.backward()
    handle.remove()
    return seen[0][data["attention_mask"].bool()]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_q_and_v_only(dora):
    model = adapted(["query", "value"], dora=dora)
    optimizer = create_optimizer(model, "afopt", lr=1e-2, damping=0.5)
    sides = sorted((t.role, t.side) for t in optimizer.plan.matrices)
    assert sides == sorted([("q", "down"), ("q", "up"), ("v", "down"), ("v", "up")] * 2)
    before = weights(model)
    losses = train("bert", model, optimizer, 12)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    after = weights(model)
    # B starts at zero, so A has no gradient at the first step, and moves afterwards.
    for key in before:
        assert ("lora_" in key or "classifier.modules_to_save" in key) == (
            not torch.equal(before[key], after[key])
        ), key
    assert losses[-1] < losses[0] + 0.2


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapter_factors_against_dense_ones(dora):
    model = adapted(["query", "key"], dora=dora)
    optimizer = create_optimizer(model, "afopt", direction="inverse", damping=0.5, momentum=0.0)
    disturb(model)
    attention = model.base_model.model.bert.encoder.layer[0].attention.self
    kept = inputs_of(attention.query, model, batch("bert", dtype=DOUBLE))
    plans = [t for t in optimizer.plan.matrices if t.block is optimizer.structure.attention[0]]
    with torch.no_grad():
        directions(optimizer)
    features = torch.cat([kept, kept.new_ones(len(kept), 1)], 1)
    moment = features.mT @ features / len(features)

    def merged(role):
        layer = getattr(attention, role)
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
        return (layer.base_layer.weight + update).detach()

    def rows_of(role):
        if not dora:
            return torch.ones(16, dtype=DOUBLE)
        magnitude = getattr(attention, role).lora_magnitude_vector["default"].weight.detach()
        return magnitude / merged(role).square().sum(1).sqrt()

    def full(role):
        bias = getattr(attention, role).base_layer.bias[:, None]
        return torch.cat([rows_of(role).diag() @ merged(role), bias], 1)

    def damped(a):
        mean = a.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return torch.linalg.inv(a + 0.5 * mean * torch.eye(a.shape[-1], dtype=DOUBLE))

    keys = full("key").detach().unflatten(0, (2, 8))
    scale = torch.diag_embed(rows_of("query").unflatten(0, (2, 8)))
    left = scale @ keys @ moment @ keys.mT @ scale
    layer = attention.query
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    inner = down @ moment[:16, :16] @ down.mT
    above = (damped(left) @ up.grad.unflatten(0, (2, 8)) @ damped(inner)).flatten(0, 1)
    small = sum(b.mT @ a @ b for a, b in zip(left, up.unflatten(0, (2, 8)), strict=True))
    below = damped(small) @ down.grad @ damped(moment[:16, :16])
    for plan in plans:
        if plan.role == "q":
            gradient = plan.bound.gradient()[None]
            step = optimizer.directions([plan], gradient)[0].detach()
            expected = (above if plan.side == "up" else below).detach()
            torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("max_dim", [1024, 8], ids=["whole", "blocks"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_outside_attention_against_dense_factors(dora, max_dim):
    """A: ``(Bᵀ D² B)⁻¹ G A_X⁻¹``; B: ``G (A A_X Aᵀ)⁻¹``; damped, and A_X of padded tokens too.

    D are DoRA's factors of the rows. A wide A_X is its diagonal blocks.
    """
    model = adapted(["intermediate.dense"], dora=dora)
    optimizer = create_optimizer(
        model, "afopt", direction="inverse", damping=0.5, momentum=0.0, max_dim=max_dim
    )
    disturb(model)
    layer = model.base_model.model.bert.encoder.layer[1].intermediate.dense
    kept = inputs_of(layer, model, batch("bert", dtype=DOUBLE))
    plans = [p for p in optimizer.plan.matrices if "layer.1." in p.bound.matrix.name]
    assert [(p.role, p.side) for p in plans] == [("linear", "down"), ("linear", "up")]
    with torch.no_grad():
        directions(optimizer)
    moment = kept.mT @ kept / len(kept)
    if max_dim == 8:
        moment = torch.block_diag(moment[:8, :8], moment[8:, 8:])
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    rows = torch.ones(len(up), dtype=DOUBLE)
    if dora:
        merged = layer.base_layer.weight + 2.0 * up @ down
        rows = layer.lora_magnitude_vector["default"].weight / merged.square().sum(1).sqrt()

    def solved(gradient, factor):
        mean = factor.diagonal().mean()
        return gradient @ torch.linalg.inv(factor + 0.5 * mean * torch.eye(len(factor)).double())

    small = (rows[:, None] * up).mT @ (rows[:, None] * up)
    expected = {
        "down": solved(solved(down.grad, moment).mT, small).mT,
        "up": solved(up.grad, down @ moment @ down.mT),
    }
    for plan in plans:
        step = optimizer.directions([plan], plan.bound.gradient()[None])[0].detach()
        torch.testing.assert_close(step, expected[plan.side].detach(), rtol=1e-8, atol=1e-12)


def test_pairs_of_one_layer_share_the_moment_of_its_input():
    from peft import LoraConfig

    model = adapted(["intermediate.dense"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["intermediate.dense"]))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    optimizer = create_optimizer(model.double(), "afopt")
    assert len(optimizer.plan.matrices) == 8 and len(optimizer.plan.moments) == 2
    rank = {p.right.columns for p in optimizer.plan.matrices if p.side == "up"}
    assert rank == {4, 2}
    before = weights(model)
    train("bert", model, optimizer, 3)
    after = weights(model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "lora_" in key}


def test_the_moment_of_a_layer_goes_on_where_its_a_is_frozen():
    model = adapted(["intermediate.dense"])
    optimizer = create_optimizer(model, "afopt")
    train("bert", model, optimizer, 6)

    def moments():
        return [m.read(optimizer.state).clone() for m in optimizer.plan.moments]

    before = moments()
    assert len(before) == 2 and all(moment.norm() > 0 for moment in before)
    for trains in (False, True):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad = trains
        optimizer.attach(model)
        assert all(torch.equal(*pair) for pair in zip(before, moments(), strict=True))


def test_a_and_b_of_a_layer_are_refreshed_at_one_step():
    optimizer = create_optimizer(adapted(["intermediate.dense", "query"]), "afopt")
    phases = optimizer.plan.phases
    own = {p.bound.matrix.name.split(".lora_")[0]: set() for p in optimizer.plan.matrices}
    for plan in optimizer.plan.matrices:
        own[plan.bound.matrix.name.split(".lora_")[0]].add(phases[plan.bound])
    assert len(own) == 4 and all(len(steps) == 1 for steps in own.values())
