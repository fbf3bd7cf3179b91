"""NKFAC on every kind of layer: convolutions, fused and shared weights, adapters, wide sides."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_precond.registry import create_optimizer
from tests.optimizers.models import batch, make, train_step

F64 = torch.float64


def build(model, **values):
    defaults = {"base": "sgd", "momentum": 0.0, "lr": 0.05, "stat_interval": 1}
    return create_optimizer(model, "nkfac", **defaults | values)


def unit(matrix):
    return matrix / matrix.norm()


def bound_of(optimizer, name):
    return next(p for p in optimizer.bound if p.matrix.name == name)


def explicit_factors(layer, inputs, deltas):
    """Unit moments from rows that torch itself makes: unfold, dilation and all."""
    groups, size = layer.groups, layer.kernel_size
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, size, strict=True)]
        left = [t // 2 for t in total]
        inputs = F.pad(inputs, (left[1], total[1] - left[1], left[0], total[0] - left[0]))
        padding = 0
    else:
        padding = layer.padding
    rows = F.unfold(inputs, size, layer.dilation, padding, layer.stride).mT
    rows = rows.reshape(-1, groups, rows.shape[-1] // groups).flatten(0, 1)
    if layer.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], 1)
    deltas = deltas.movedim(1, -1).flatten(0, -2)
    return unit(deltas.T @ deltas), unit(rows.T @ rows)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "rectangular": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 2)},
    "no bias": {"kernel_size": 3, "bias": False},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "same": {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_factors_of_convolutions(kind):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, **CONVOLUTIONS[kind])
    model = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.double()
    inputs, targets = torch.randn(6, 4, 9, 8, dtype=F64), torch.randn(6, 3, dtype=F64)
    outputs = layer(inputs)
    (deltas,) = torch.autograd.grad(F.mse_loss(model[1:](outputs), targets), outputs)
    left, right = explicit_factors(layer, inputs, deltas)
    optimizer = build(model)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == 1:
            block = optimizer.curvature(bound_of(optimizer, "0"))
            torch.testing.assert_close(block.output, left, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(block.input, right, rtol=1e-11, atol=1e-13)
    assert losses[-1] < losses[0]
    optimizer.close()


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_patches_are_ordered_like_the_kernel(dimensions):
    # One output position, one example: G = δ aᵀ, so L G R must be a multiple of G.
    torch.manual_seed(0)
    make_layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    size = (3, 2, 4)[:dimensions]
    layer = make_layer(2, 5, size)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(5, 3)).double()
    optimizer = build(model)
    loss = model(torch.randn(1, 2, *size, dtype=F64)).square().sum()
    loss.backward()
    gradient = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
    optimizer.step()
    block = optimizer.curvature(bound_of(optimizer, "0"))
    torch.testing.assert_close(block.apply(gradient), gradient, rtol=1e-11, atol=1e-13)
    optimizer.close()


def test_linear_and_conv1d_of_gpt2_are_the_same_layer():
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)),
        nn.Sequential(Conv1D(6, 4), nn.Tanh(), Conv1D(2, 6)),
    ]
    linear, transposed = [model.double() for model in models]
    with torch.no_grad():
        for index in (0, 2):
            transposed[index].weight.copy_(linear[index].weight.T)
            transposed[index].bias.copy_(linear[index].bias)
    optimizers = [build(m, inverse_interval=2) for m in (linear, transposed)]
    for step in range(4):
        x = torch.randn(5, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((linear, transposed), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for index in (0, 2):
        torch.testing.assert_close(linear[index].weight, transposed[index].weight.T)
        torch.testing.assert_close(linear[index].bias, transposed[index].bias)


def test_fused_qkv_is_one_block_and_the_tied_head_goes_by_the_fallback():
    model = make("gpt2")
    optimizer = build(model, base="adamw")
    train_step(model, optimizer, batch("gpt2"))
    fused = bound_of(optimizer, "transformer.h.0.attn.c_attn")
    assert optimizer.curvature(fused).output.shape == (48, 48)
    assert optimizer.curvature(fused).input.shape == (17, 17)
    head = optimizer.routing["transformer.wte.weight"]
    assert head.treatment == "adamw" and "tied" in head.reason
    optimizer.close()


@pytest.mark.parametrize("max_dim", [8, 20])
def test_a_side_wider_than_max_dim_has_no_factor(max_dim):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 5)).double()
    optimizer = build(model, max_dim=max_dim, damping=0.1)
    x = torch.randn(40, 4, dtype=F64)
    model(x).square().mean().backward()
    grads = [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in (model[0], model[2])]
    before = [torch.cat([m.weight, m.bias[:, None]], 1).detach() for m in (model[0], model[2])]
    optimizer.step()
    after = [torch.cat([m.weight, m.bias[:, None]], 1).detach() for m in (model[0], model[2])]
    wide, narrow = (optimizer.preconditioner(p) for p in optimizer.bound)
    assert wide.output is None and narrow.input is None
    expected = [grads[0] @ wide.input, narrow.output @ grads[1]]
    for g, e, old, new in zip(grads, expected, before, after, strict=True):
        torch.testing.assert_close(old - new, 0.05 * e * g.norm() / e.norm())
    assert "output_factor" not in optimizer.state[model[0].weight]
    optimizer.close()


def test_a_bias_makes_no_side_wider():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 9), nn.Linear(9, 9))
    optimizer = build(model, max_dim=8)
    sides = [[f.side for f in optimizer.factors(bound)] for bound in optimizer.bound]
    assert sides == [["output", "input"], ["input"]]
    assert "one side" not in optimizer.routing["0.weight"].reason
    assert "both sides wider" in optimizer.routing["2.weight"].reason
    optimizer.close()


def test_lora_pairs_have_the_rank_side_always():
    from peft import LoraConfig, get_peft_model

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer = build(model, base="adamw", max_dim=20, lr=1e-2)
    losses = [train_step(model, optimizer, batch("gpt2")) for _ in range(15)]
    assert losses[-1] < losses[0]
    down, up = sorted(optimizer.bound, key=lambda bound: "lora_B" in bound.matrix.name)
    assert "lora_A" in down.matrix.name and "lora_B" in up.matrix.name
    assert optimizer.curvature(down).output.shape == (3, 3)
    assert optimizer.curvature(down).input.shape == (16, 16)
    assert optimizer.curvature(up).input.shape == (3, 3)
    assert optimizer.curvature(up).output is None  # 48 wide
    optimizer.close()


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def test_a_layer_called_twice_adds_up_both_calls():
    torch.manual_seed(0)
    model = Twice().double()
    x = torch.randn(7, 4, dtype=F64)
    first = model.layer(x)
    second = model.layer(torch.tanh(first))
    outputs = model.head(torch.tanh(second))
    deltas = torch.cat(torch.autograd.grad(outputs.square().mean(), (first, second)))
    rows = torch.cat([x, torch.tanh(first).detach()])
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], 1)
    optimizer = build(model)
    model(x).square().mean().backward()
    optimizer.step()
    block = optimizer.curvature(bound_of(optimizer, "layer"))
    torch.testing.assert_close(block.output, unit(deltas.T @ deltas))
    torch.testing.assert_close(block.input, unit(rows.T @ rows))
    optimizer.close()


def test_a_bias_of_two_layers_is_stepped_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].bias = model[0].bias
    optimizer = build(model)
    before = model[0].bias.detach().clone()
    model(torch.randn(5, 3, dtype=F64)).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].bias, before - 0.05 * model[0].bias.grad)
    assert optimizer.routing["0.bias"].reason == "tied to 2.bias"
    optimizer.close()


def test_padded_tokens_leave_no_trace():
    models = [make("bert", dtype=F64) for _ in range(2)]
    optimizers = [build(model) for model in models]
    plain = batch("bert")
    other = {name: value.clone() for name, value in plain.items()}
    other["input_ids"][plain["attention_mask"] == 0] = 7
    for model, optimizer, inputs in zip(models, optimizers, (plain, other), strict=True):
        train_step(model, optimizer, inputs)
        optimizer.close()
    for left, right in zip(*(optimizer.bound for optimizer in optimizers), strict=True):
        ours, theirs = optimizers[0].curvature(left), optimizers[1].curvature(right)
        torch.testing.assert_close(ours.input, theirs.input, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.output, theirs.output, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "after creation"])
def test_a_frozen_bias_stays_and_its_weight_trains(later):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    if not later:
        model[0].bias.requires_grad_(False)
    optimizer = build(model)
    model[0].bias.requires_grad_(False)
    before = [p.detach().clone() for p in model[0].parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 4, dtype=F64)).square().mean().backward()
        optimizer.step()
    assert torch.equal(before[1], model[0].bias)
    assert not torch.equal(before[0], model[0].weight)
    optimizer.close()
