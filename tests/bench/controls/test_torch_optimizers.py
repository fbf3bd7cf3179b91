"""torch's optimizers as controls: which parameters each gets; schedule-free AdamW's formula."""

import sys

import numpy as np
import pytest
import torch

from hf_precond.bench import optimizers
from tests.bench.controls.oracles import batch, net


def run(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*batch(generator)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_torch_muon_is_muon_on_hidden_matrices_and_adamw_on_the_rest():
    fields = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1, "lr_scale": 3.0}
    found, model = net(), net()
    run(found, optimizers.build(found, "torch_muon", fields, 1))
    matrices = [model.up.weight, model.down.weight]
    rest = [{"params": [model.head.weight]},
            {"params": [model.down.bias, model.head.bias], "weight_decay": 0.0}]  # fmt: skip
    muon = torch.optim.Muon(
        matrices, lr=0.06, momentum=0.8, weight_decay=0.1 / 3, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1)
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        for optimizer in (muon, adamw):
            optimizer.zero_grad()
        model(*batch(generator)).backward()
        muon.step()
        adamw.step()
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_beta1_and_beta2_replace_one_of_betas():
    optimizer = optimizers.build(net(), "adamw", {"beta2": 0.95}, 1)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    with pytest.raises(ValueError, match="betas"):
        optimizers.check("adamw", {"beta1": 1.5})
    with pytest.raises(ValueError, match="has no effect under sgd"):
        optimizers.check("sgd", {"beta1": 0.5})


def test_schedule_free_adamw_is_the_papers():
    """z, y and x of Defazio et al., algorithm 1, with AdamW's step and warm-up's weights."""
    pytest.importorskip("schedulefree")
    model = net()
    lr, b1, b2, decay, warmup = 0.02, 0.9, 0.99, 0.1, 3
    fields = {"lr": lr, "beta2": b2, "weight_decay": decay}
    optimizer = optimizers.build(model, "schedulefree", fields, warmup)
    assert optimizers.has_own_schedule(optimizer)
    start = model.up.weight.detach().numpy().copy()
    z, x, v, total, rate = start.copy(), start.copy(), np.zeros_like(start), 0.0, 0.0
    generator = torch.Generator().manual_seed(4)
    optimizers.switch(optimizer, training=True)
    for step in range(6):
        y = (1 - b1) * z + b1 * x
        np.testing.assert_allclose(model.up.weight.detach().numpy(), y, rtol=1e-9)
        optimizer.zero_grad()
        model(*batch(generator)).backward()
        grad = model.up.weight.grad.numpy().copy()
        optimizer.step()
        rate = lr * min(1, (step + 1) / warmup)
        v = b2 * v + (1 - b2) * grad**2
        update = grad / (np.sqrt(v / (1 - b2 ** (step + 1))) + 1e-8) + decay * y
        z = z - rate * update
        total += rate**2
        x = x + rate**2 / total * (z - x)
    optimizers.switch(optimizer, training=False)
    np.testing.assert_allclose(model.up.weight.detach().numpy(), x, rtol=1e-8)


def test_without_the_package_schedulefree_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(RuntimeError, match="pip install schedulefree"):
        optimizers.build(net(), "schedulefree", {}, 1)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'soap_muon'"):
        optimizers.check("soapmuon", {})
    with pytest.raises(ValueError, match="no --optim name"):
        optimizers.check_for_script("soap", {})
