"""Differences of gradients against exact products, and what they leave as it was."""

import copy
import random

import numpy
import pytest
import torch
from torch import nn

from hf_precond.architectures.modules import find_norms
from hf_precond.statistics.finite_differences import DifferenceProduct, machine_epsilon
from hf_precond.statistics.hessian_probe import CurvatureProbe
from hf_precond.statistics.hessian_products import diagonal_estimates, probe_vectors
from hf_precond.statistics.requests import CurvatureRequest
from tests.optimizers.models import batch, make


def taken(model, loss_function, probe="rademacher"):
    """The estimates of all norms end to end, by differences of gradients."""
    source = CurvatureProbe(model, [CurvatureRequest(n.name, n, probe) for n in find_norms(model)])
    source.enable(True, 0)
    source.observe(loss_function)
    joined = torch.cat([s.sum.flatten() for s in source.take().values()])
    source.close()
    return joined.double()


def exact(model, loss_function, probe="rademacher"):
    """The same by double backward, in float64."""
    parameters = [norm.parameter for norm in find_norms(model)]
    gradients = torch.autograd.grad(loss_function(), parameters, create_graph=True)

    def product(vectors):
        return torch.autograd.grad(gradients, parameters, vectors, retain_graph=True)

    found = diagonal_estimates(product, probe, probe_vectors(parameters, probe, 0))
    return torch.cat([estimate.flatten() for estimate in found])


def stirred(name, size):
    """A tiny model whose matrices were moved, by so much, from where they start."""
    torch.manual_seed(0)
    model = make(name).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape).mul_(parameter.dim() > 1)
    return model


def as_dtype(columns, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in columns.items()}


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-3), (torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.25)],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_the_step_suits_the_format_of_the_weights(name, dtype, bound):
    """A probe by random signs is off by one to five times the diagonal anyway."""
    model = stirred(name, 0.1)
    double = copy.deepcopy(model).double()
    wanted = exact(double, lambda: double(**as_dtype(batch(name), torch.float64)).loss)
    low = model.to(dtype)
    found = taken(low, lambda: low(**as_dtype(batch(name), dtype)).loss)
    assert (found - wanted).norm() / wanted.norm() < bound


@pytest.mark.parametrize("probe", ["rademacher", "ones", "exact"])
def test_a_quadratic_is_exact(probe):
    """L = Σ h p² / 2 has the diagonal h, whatever the step."""
    torch.manual_seed(0)
    model = nn.LayerNorm(6)
    h = torch.randn(12)

    def loss():
        return (h * torch.cat([model.weight, model.bias]).square()).sum() / 2

    torch.testing.assert_close(taken(model, loss, probe), h.double(), rtol=1e-4, atol=1e-5)


def test_the_epsilon_is_that_of_the_least_precise_format():
    layers = [nn.Linear(2, 2), nn.LayerNorm(2).double()]
    f32, low = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
    assert machine_epsilon(layers) == f32
    assert machine_epsilon(layers[1:]) == f32
    assert machine_epsilon(layers, torch.bfloat16) == low
    quantised = nn.Module()
    quantised.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    assert machine_epsilon([*layers, quantised]) == low
    assert machine_epsilon([nn.LayerNorm(2).half()]) == torch.finfo(torch.float16).eps


class Stateful(nn.Module):
    """Everything a pass may change: buffers, counters, lists, a momentum copy, generators."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.calls, self.seen = 0, {"losses": []}
        self.total = torch.zeros(())
        self.register_buffer("queue", torch.zeros(3, 4))

    def forward(self, x):
        self.calls += 1
        self.total += 1
        self.queue.copy_(torch.roll(self.queue, 1, 0)).select(0, 0).copy_(x[0].detach())
        scale = 1 + random.random() + numpy.random.rand() + torch.rand(())
        loss = self.head(self.norm(x) * scale).square().mean()
        self.seen["losses"].append(loss.item())
        return loss


def test_the_passes_leave_everything_as_it_was():
    torch.manual_seed(0)
    model, x = Stateful(), torch.randn(8, 4)
    model(x).backward()
    before = copy.deepcopy(model)
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    taken(model, lambda: model(x))
    drawn = random.random(), numpy.random.rand(), torch.rand(()).item()
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    assert drawn == (random.random(), numpy.random.rand(), torch.rand(()).item())
    assert (model.calls, model.seen) == (before.calls, before.seen)
    assert torch.equal(model.total, before.total)
    for ours, theirs in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    for parameter, (grad, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is grad and torch.equal(grad, value)
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_gradients_of_other_parameters_are_freed_as_they_come():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    held = []

    def run():
        model(torch.ones(3, 4)).square().sum().backward()
        held.append([parameter.grad is not None for parameter in model.parameters()])

    parameters = list(model[1].parameters())
    product = DifferenceProduct(run, [model], parameters, machine_epsilon([model]))
    product([torch.ones(4), torch.ones(4)])
    assert held == [[False, False, True, True, False, False]] * 2
    assert product.reached == [True, True]
