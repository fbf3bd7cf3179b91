"""AFOpt on LoRA's adapters."""

import torch

from hf_precond.registry import create_optimizer
from tests.optim.afopt_support import (
    directions,
    optimizer_of,
)
from tests.optim.models import batch, make, train, weights

DOUBLE = torch.float64


def spectral(module, **fields):
    return optimizer_of(module, **{"direction": "spectral", "damping": 1.0, **fields})


def changes(module, optimizer):
    """Name to change of every parameter in one step."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in module.named_parameters()}


def adapted(targets, dtype=DOUBLE):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=["classifier"])
    return get_peft_model(make("bert", dtype=dtype), config).train()


def test_adapters_of_q_and_v_only():
    model = adapted(["query", "value"])
    optimizer = create_optimizer(model, "afopt", lr=1e-2, damping=0.5)
    sides = sorted((t.role, t.side) for t in optimizer.plan.treatments)
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


def test_adapter_factors_against_dense_ones():
    model = adapted(["query", "key"])
    optimizer = create_optimizer(model, "afopt", direction="inverse", damping=0.5, momentum=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    seen = []
    attention = model.base_model.model.bert.encoder.layer[0].attention.self
    handle = attention.query.register_forward_hook(lambda m, a, out: seen.append(a[0].detach()))
    data = batch("bert", dtype=DOUBLE)
    model(**data).loss.backward()
    handle.remove()
    treatments = [t for t in optimizer.plan.treatments if t.block is optimizer.blocks.attention[0]]
    with torch.no_grad():
        directions(optimizer)
    kept = seen[0][data["attention_mask"].bool()]
    features = torch.cat([kept, kept.new_ones(len(kept), 1)], 1)
    moment = features.mT @ features / len(features)

    def full(role):
        layer = getattr(attention, role)
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
        return torch.cat([layer.base_layer.weight + update, layer.base_layer.bias[:, None]], 1)

    def damped(a):
        mean = a.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return torch.linalg.inv(a + 0.5 * mean * torch.eye(a.shape[-1], dtype=DOUBLE))

    keys = full("key").detach().unflatten(0, (2, 8))
    left = keys @ moment @ keys.mT
    layer = attention.query
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    inner = down @ moment[:16, :16] @ down.mT
    above = (damped(left) @ up.grad.unflatten(0, (2, 8)) @ damped(inner)).flatten(0, 1)
    small = sum(b.mT @ a @ b for a, b in zip(left, up.unflatten(0, (2, 8)), strict=True))
    below = damped(small) @ down.grad @ damped(moment[:16, :16])
    for treatment in treatments:
        if treatment.role == "q":
            gradient = treatment.placed.gradient()[None]
            step = optimizer._directions([treatment], gradient)[0].detach()
            expected = (above if treatment.side == "up" else below).detach()
            torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-12)
