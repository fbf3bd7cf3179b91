"""Matrices whose statistics never come are said and stepped by the fallback optimizer."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from hf_precond.registry import create_optimizer
from tests import ranks

EVERY_STEP = {"stat_interval": 1, "inverse_interval": 1}


class Opaque(torch.autograd.Function):
    """``x Wᵀ + b`` by a kernel that nothing can look into."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.mT + bias

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        return gradient @ weight, gradient.mT @ inputs, gradient.sum(0)


class Fused(nn.Module):
    """Two layers; the second is given to a kernel, or called, or not used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()
        self.use = "kernel"

    def forward(self, inputs):
        hidden = self.first(inputs).tanh()
        if self.use == "kernel":
            return Opaque.apply(hidden, self.second.weight, self.second.bias)
        if self.use == "zero":
            return hidden.sum() + 0 * Opaque.apply(hidden, *self.second.parameters()).sum()
        return self.second(hidden) if self.use == "module" else hidden


def take(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


def told_by(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if "no statistics" in str(w.message)]


@pytest.mark.parametrize("name", ["nkfac", "afopt"])
@pytest.mark.filterwarnings("ignore:afopt. no attention")
def test_at_the_second_step_without_statistics_the_fallback_takes_over(name):
    model = Fused()
    optimizer = create_optimizer(model, name, lr=0.1, weight_decay=0.1, **EVERY_STEP)
    assert told_by(lambda: take(model, optimizer, 0)) == []
    assert optimizer.routing["second.weight"].treatment == "preconditioned"
    messages = told_by(lambda: take(model, optimizer, 1))
    assert len(messages) == 1
    assert messages[0].startswith(f"{name}: 1 matrix (second) had gradients at two steps")
    assert "adamw steps them" in messages[0] and "was not called" in messages[0]
    for parameter in ("second.weight", "second.bias"):
        route = optimizer.routing[parameter]
        assert route.treatment == "adamw" and "linear layer: no statistics" in route.reason
        assert route.group
    assert optimizer.routing["first.weight"].treatment == "preconditioned"
    assert optimizer.diagnostics()["unobserved_matrices"] == 1
    assert told_by(lambda: [take(model, optimizer, step) for step in range(2, 5)]) == []


def test_from_then_on_the_step_is_adamws():
    model = Fused()
    fields = {"lr": 0.1, "weight_decay": 0.1}
    optimizer = create_optimizer(model, "nkfac", **fields, **EVERY_STEP)
    weight, bias = (p.detach().clone().requires_grad_() for p in model.second.parameters())
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, **fields)
    with pytest.warns(UserWarning, match="no statistics"):
        for step in range(5):
            take(model, optimizer, step)
            weight.grad, bias.grad = model.second.weight.grad, model.second.bias.grad
            plain.step()
    torch.testing.assert_close(model.second.weight, weight)
    torch.testing.assert_close(model.second.bias, bias)


@pytest.mark.parametrize("name", ["nkfac", "afopt"])
@pytest.mark.filterwarnings("ignore:afopt. no attention")
def test_when_statistics_come_the_preconditioner_is_back(name):
    model = Fused()
    optimizer = create_optimizer(model, name, lr=0.01, **EVERY_STEP)
    before = str(optimizer.routing)
    with pytest.warns(UserWarning, match="no statistics"):
        for step in range(3):
            take(model, optimizer, step)
    assert str(optimizer.routing) != before
    model.use = "module"
    assert told_by(lambda: take(model, optimizer, 3)) == []
    assert str(optimizer.routing) == before
    assert "unobserved_matrices" not in optimizer.diagnostics()
    model.use = "kernel"
    assert told_by(lambda: take(model, optimizer, 4)) == []
    assert len(told_by(lambda: take(model, optimizer, 5))) == 1


@pytest.mark.parametrize("use", ["none", "zero"])
def test_a_layer_without_a_gradient_is_no_news(use):
    """An expert that no token reaches has none, or one of zeros."""
    model = Fused()
    model.use = use
    optimizer = create_optimizer(model, "nkfac", **EVERY_STEP)
    assert told_by(lambda: [take(model, optimizer, step) for step in range(4)]) == []
    assert optimizer.routing["second.weight"].treatment == "preconditioned"


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.filterwarnings("ignore:afopt. no attention")
@pytest.mark.filterwarnings("ignore:afopt. 1 matrix")
def test_a_resumed_run_does_the_same(steps):
    models = [Fused(), Fused()]
    optimizers = [create_optimizer(m, "afopt", lr=0.01, **EVERY_STEP) for m in models]
    for step in range(steps):
        take(models[0], optimizers[0], step)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for step in range(steps, steps + 3):
        for model, optimizer in zip(models, optimizers, strict=True):
            take(model, optimizer, step)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    treatments = [[route.treatment for route in o.routing] for o in optimizers]
    assert treatments[0] == treatments[1] and "adamw" in treatments[0]


def test_adamr_keeps_the_gradients_bases_and_says_so():
    model = Fused()
    optimizer = create_optimizer(model, "adamr", basis_source="feature", stat_interval=1)
    messages = told_by(lambda: [take(model, optimizer, step) for step in range(4)])
    assert len(messages) == 1 and "their bases stay those of the gradients" in messages[0]
    route = optimizer.routing["second.weight"]
    assert route.treatment == "preconditioned" and "no statistics" in route.reason


def on_ranks():
    """The second layer's use on this rank: what was told, and how it is routed."""
    rank, told = torch.distributed.get_rank(), []
    for uses in (("kernel", "module"), ("kernel", "kernel")):
        model = Fused()
        optimizer = create_optimizer(model, "nkfac", **EVERY_STEP)
        model.use = uses[rank]
        for step in range(3):
            told += told_by(partial(_take_averaged, model, optimizer, step))
        told.append(optimizer.routing["second.weight"].treatment)
    return told


def _take_averaged(model, optimizer, step):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(7, 4, generator=generator, dtype=torch.float64)).square().sum().backward()
    for parameter in model.parameters():
        torch.distributed.all_reduce(parameter.grad)
    optimizer.step()


@pytest.mark.slow
def test_ranks_agree():
    first, second = ranks.run(on_ranks)
    assert first[0] == "preconditioned" and first[2] == "adamw" and len(first) == 3
    assert first[::2] == second[::2] and len(second) == 3
