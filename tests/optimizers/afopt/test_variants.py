"""How long AFOpt's steps are, and the change of the logits that they make."""

import copy

import pytest
import torch

from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.optimizer import AFOpt
from hf_precond.optimizers.base.agreement import agreement
from tests.optimizers.afopt.support import (
    Attention,
    backward,
    changes,
    cosine,
    directions,
    inputs,
    optimizer_of,
    spectral,
)

DOUBLE = torch.float64


def test_rms_scaling_and_the_learning_rates_of_weight_and_bias():
    torch.manual_seed(8)
    module, x = Attention(d=16, heads=2), inputs(2, 12, 16)
    blocks_only = optimizer_of(module).structure
    decayed = {"params": [p for p in module.parameters() if p.dim() == 2], "weight_decay": 0.1}
    rest = {"params": [p for p in module.parameters() if p.dim() == 1], "lr": 3e-3}
    config = AFOptConfig.create(lr=1e-3, lr_scale=5.0, scaling="rms")
    optimizer = AFOpt([decayed, rest], blocks_only, config)
    backward(module, x)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step()
    for name in "qkvo":
        layer = getattr(module, name)
        weight = (before[f"{name}.weight"] * (1 - 1e-3 * 0.1) - layer.weight) / 1e-3
        bias = (before[f"{name}.bias"] - layer.bias) / 3e-3
        step = torch.cat([weight, bias[:, None]], 1)
        assert step.square().mean().sqrt().item() == pytest.approx(5 * 0.2, rel=1e-9)


@pytest.mark.parametrize(("nesterov", "beta"), [(True, 0.8), (False, 0.8), (True, 0.0)])
def test_adaptive_lengths_follow_the_gradients_of_each_matrix(nesterov, beta):
    """Against the recurrences, written out: gradients that turn, vanish and come back."""
    torch.manual_seed(8)
    module, x = Attention(d=16, heads=2), inputs(2, 12, 16)
    optimizer = spectral(module, lr=1e-3, momentum=beta, nesterov=nesterov, lr_scale=3.0)
    momenta, usual, lengths = {}, {}, []
    for number, factor in enumerate([1.0, 1.0, -1.0, 0.3, 0.0, 0.0, 1e-3, 5.0, 5.0, 5.0]):
        backward(module, x)
        for name in "qkvo":
            layer = getattr(module, name)
            for parameter in (layer.weight, layer.bias):
                parameter.grad.mul_(1.0 if name == "k" else factor)
            gradient = layer.weight.grad
            norm = gradient.norm().item()
            held = momenta.setdefault(name, torch.zeros_like(gradient))
            held.mul_(beta).add_(gradient, alpha=1 - beta)
            before = usual.get(name, norm)
            usual[name] = 0.99 * before + 0.01 * norm if number else norm
        moved = changes(module, optimizer)
        for name in "qkvo":
            noise = usual[name] * ((1 - beta) / (1 + beta)) ** 0.5
            wanted = min(2.0, momenta[name].norm().item() / noise)
            parts = [moved[f"{name}.{part}"].flatten() for part in ("weight", "bias")]
            rms = torch.cat(parts).square().mean().sqrt().item() / 1e-3
            assert rms == pytest.approx(3.0 * 0.2 * wanted, rel=1e-6, abs=1e-12), (number, name)
            lengths.append(wanted)
    assert min(lengths) < 0.5 and max(lengths) == 2.0


def test_adaptive_lengths_are_one_for_noise_and_two_for_gradients_that_agree():
    torch.manual_seed(8)
    noise = torch.randn(4000, 50, dtype=DOUBLE)
    beta, momentum, usual, found = 0.8, torch.zeros(50, dtype=DOUBLE), torch.zeros(()), []
    for gradient in noise:
        momentum = beta * momentum + (1 - beta) * gradient
        usual = 0.99 * usual + 0.01 * gradient.norm() if usual else gradient.norm()
        found.append(agreement(momentum.norm(), usual, beta, 2.0))
    assert torch.stack(found[100:]).mean().item() == pytest.approx(1.0, rel=0.02)
    assert agreement(gradient.norm(), gradient.norm(), beta, 2.0).item() == 2.0
    zero = torch.zeros((), dtype=DOUBLE)
    assert agreement(zero, zero, beta, 2.0).item() == 0.0


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_norm_recovery_keeps_every_norm_and_hands_the_gradient_to_the_fallback_optimizer(base):
    torch.manual_seed(9)
    module, x = Attention(d=16, heads=2), inputs(2, 12, 16)
    optimizer = optimizer_of(
        module, scaling="norm_recovery", direction="inverse", damping=0.1, base=base, lr=1e-2
    )
    twin = copy.deepcopy(module)
    backward(module, x)
    actual = directions(optimizer)
    twin_parameters = dict(twin.named_parameters())
    for role in "qkvo":
        layer = getattr(module, role)
        raw = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        recovered = actual[role] * raw.norm() / actual[role].norm()
        twin_parameters[f"{role}.weight"].grad = recovered[:, :-1].clone()
        twin_parameters[f"{role}.bias"].grad = recovered[:, -1].clone()
        assert recovered.norm().item() == pytest.approx(raw.norm().item(), rel=1e-12)
    optimizer.step()
    if base == "adamw":
        peer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    else:
        peer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    peer.step()
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def seen_change(module, x, delta, role):
    """Root mean square of the logits' real change when one matrix moves."""
    with torch.no_grad():
        module(x)
        before = module.logits.clone()
        layer = getattr(module, role)
        layer.weight += delta[:, :-1]
        layer.bias += delta[:, -1]
        module(x)
        change = (module.logits - before).square().mean().sqrt().item()
        layer.weight -= delta[:, :-1]
        layer.bias -= delta[:, -1]
    return change


@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize("role", ["q", "k"])
def test_predicted_logit_change_is_the_one_really_seen(batch_size, role):
    """Within 10 % on the batch it was measured on; exactly, for one sequence."""
    torch.manual_seed(11)
    module, x = Attention(d=32, heads=4), inputs(batch_size, 24, 32, spread=30.0, shift=0.2)
    optimizer = spectral(module, roles=role, scaling="cap", lr_scale=1e6, rho=1.0, lr=1e-3)
    backward(module, x)
    layer = getattr(module, role)
    start = copy.deepcopy(module.state_dict())
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
    optimizer.step()
    after = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
    module.load_state_dict(start)
    change = seen_change(module, x, after - before, role)
    assert change == pytest.approx(1e-3, rel=1e-9 if batch_size == 1 else 0.1)


def test_cap_only_shrinks():
    torch.manual_seed(13)
    module, x = Attention(d=16, heads=2), inputs(2, 12, 16)
    steps = {}
    for name, fields in {
        "rms": {"scaling": "rms"},
        "loose": {"scaling": "cap", "rho": 1e6},
        "tight": {"scaling": "cap", "rho": 1e-3},
    }.items():
        twin = copy.deepcopy(module)
        optimizer = spectral(twin, lr=1e-3, **fields)
        backward(twin, x)
        steps[name] = (changes(twin, optimizer), twin)
    for key, value in steps["rms"][0].items():
        torch.testing.assert_close(steps["loose"][0][key], value, rtol=1e-12, atol=0)
        tight = steps["tight"][0][key]
        if key[0] in "qk":
            assert tight.norm() < 0.1 * value.norm()
            assert cosine(tight, value) > 1 - 1e-9
        else:
            torch.testing.assert_close(tight, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "fields", [{}, {"scaling": "cap"}, {"direction": "inverse"}, {"nesterov": False}]
)
def test_steps_fade_where_a_matrix_gets_no_gradient_any_more(fields):
    """A set length would carry an expert that gets no token along its old momentum for long."""
    torch.manual_seed(14)
    module, x = Attention(d=16, heads=2), inputs(2, 12, 16)
    optimizer = spectral(module, lr=1e-3, momentum=0.8, **({"scaling": "rms"} | fields))
    backward(module, x)
    first = changes(module, optimizer)
    full, sizes = first["o.weight"].norm(), []
    for _ in range(4):
        backward(module, x)
        module.o.weight.grad.zero_()
        module.o.bias.grad.zero_()
        actual = changes(module, optimizer)
        sizes.append(actual["o.weight"].norm())
        assert actual["v.weight"].norm() > 0.7 * first["v.weight"].norm()  # the others have theirs
    for number, size in enumerate(sizes):
        assert size.item() == pytest.approx(0.8 ** (number + 1) * full.item(), rel=0.05)
        if number:  # only the length changes
            assert size.item() == pytest.approx(0.8 * sizes[number - 1].item(), rel=1e-9)
    backward(module, x)
    assert changes(module, optimizer)["o.weight"].norm().item() == pytest.approx(full.item(), 0.05)
