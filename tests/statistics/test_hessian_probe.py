"""Estimates of the Hessian diagonal against closed forms and explicit Hessians, in float64."""

import itertools

import pytest
import torch
from torch import nn

from hf_precond.architectures.modules import find_norms
from hf_precond.architectures.structure import NormParameter
from hf_precond.statistics.hessian_probe import CurvatureProbe
from hf_precond.statistics.hessian_products import GraphProduct, diagonal_estimates, probe_vectors
from hf_precond.statistics.requests import CurvatureRequest

PROBES = ("rademacher", "ones", "exact")
NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "rms": nn.RMSNorm}
EPS = 1e-5


def normalized(kind, x):
    if kind == "batch":
        return (x - x.mean(0)) / (x.var(0, correction=0) + EPS).sqrt()
    if kind == "layer":
        return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + EPS).sqrt()
    return x / (x.square().mean(1, keepdim=True) + EPS).sqrt()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimated(model, norms, probe, loss, step=0):
    """What a source estimates for one loss: key to estimate."""
    source = CurvatureProbe(model, [CurvatureRequest(n.name, n, probe) for n in norms])
    source.enable(True, step)
    with source.context():
        source.observe(loss())
    estimates = {key: statistic.sum for key, statistic in source.take().items()}
    source.close()
    return estimates


def block_of(loss, parameter):
    """The Hessian block of one parameter, row by row."""
    (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
    rows = [
        torch.autograd.grad(entry, parameter, retain_graph=True)[0] for entry in gradient.view(-1)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    ("kind", "attribute"),
    [("batch", "weight"), ("batch", "bias"), ("layer", "weight"), ("layer", "bias"),
     ("rms", "weight")],
)  # fmt: skip
def test_squared_error_on_a_norms_output_has_a_diagonal_hessian(kind, attribute, probe):
    norm = NORMS[kind](5, eps=EPS).double()
    x, target = randn(12, 5), randn(12, 5, seed=1)
    scale = 1 / x.numel()
    parameter = NormParameter(attribute, norm, attribute)
    (estimate,) = estimated(
        norm, [parameter], probe, lambda: 0.5 * scale * (norm(x) - target).square().sum()
    ).values()
    per_token = normalized(kind, x).square() if attribute == "weight" else torch.ones_like(x)
    torch.testing.assert_close(estimate, scale * per_token.sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_linear_layer_behind_the_norm_fills_the_block(orthogonal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6, eps=EPS), nn.Linear(6, 6)).double()
    if orthogonal:
        nn.init.orthogonal_(model[1].weight)
    x, target = randn(10, 6), randn(10, 6, seed=1)
    hat, w = normalized("layer", x), model[1].weight.detach()
    block = (w.T @ w) * (hat.T @ hat) / 10
    loss = lambda: 0.5 / 10 * (model(x) - target).square().sum()  # noqa: E731
    weight = NormParameter("0.weight", model[0], "weight")
    found = {probe: estimated(model, [weight], probe, loss)["0.weight"] for probe in PROBES}
    torch.testing.assert_close(found["ones"], block.sum(1), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found["exact"], block.diagonal(), rtol=1e-11, atol=1e-14)
    (signs,) = probe_vectors([model[0].weight], "rademacher", 0)
    torch.testing.assert_close(found["rademacher"], signs * (block @ signs), rtol=1e-11, atol=1e-14)
    apart = (found["ones"] - found["exact"]).norm() / found["exact"].norm()
    assert apart < 1e-12 if orthogonal else apart > 0.05


def test_scale_invariance_makes_row_sums_the_negative_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5, eps=1e-14), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3),
    ).double()  # fmt: skip
    x, labels = randn(8, 4, 6, 6), torch.arange(8) % 3
    loss = lambda: nn.functional.cross_entropy(model(x), labels)  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(), model[0].weight)
    scale = NormParameter("0.weight", model[0], "weight")
    sums = estimated(model, [scale], "ones", loss)["0.weight"]
    assert (sums + gradient).norm() / gradient.norm() < 1e-10


def mixed_network():
    """LayerNorm, RMSNorm and a curved head: a full Hessian in all norm parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3), nn.RMSNorm(3), nn.Linear(3, 4)
    ).double()  # fmt: skip
    x, labels = randn(9, 5), torch.arange(9) % 4
    return model, lambda: nn.functional.cross_entropy(model(x), labels)


def test_the_mean_over_all_signs_is_the_diagonal():
    model, loss = mixed_network()
    parameters = [model[1].weight, model[4].weight]
    product = GraphProduct(loss(), parameters)
    total = [torch.zeros_like(p) for p in parameters]
    for signs in itertools.product((-1.0, 1.0), repeat=7):
        z = list(torch.tensor(signs, dtype=torch.float64).split([4, 3]))
        estimates = diagonal_estimates(product, "rademacher", z)
        total = [t + e / 2**7 for t, e in zip(total, estimates, strict=True)]
    for parameter, mean in zip(parameters, total, strict=True):
        diagonal = block_of(loss(), parameter).diagonal()
        torch.testing.assert_close(mean, diagonal, rtol=1e-12, atol=1e-15)


def test_exact_probes_give_every_blocks_diagonal():
    model, loss = mixed_network()
    norms = find_norms(model)
    for name, estimate in estimated(model, norms, "exact", loss).items():
        diagonal = block_of(loss(), model.get_parameter(name)).diagonal()
        torch.testing.assert_close(estimate, diagonal, rtol=1e-12, atol=1e-15)


def test_products_restricted_to_one_tensor_are_those_of_the_full_list():
    model, loss = mixed_network()
    value = loss()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters, create_graph=True)
    place = next(i for i, p in enumerate(parameters) if p is model[1].weight)
    full = torch.autograd.grad(gradients[place].sum(), parameters, retain_graph=True)[place]
    restricted = GraphProduct(value, [model[1].weight])([torch.ones(4, dtype=torch.float64)])[0]
    assert torch.equal(restricted, full)


def test_products_agree_with_differences_of_gradients():
    model, loss = mixed_network()
    parameters = [norm.parameter for norm in find_norms(model)]
    vectors = probe_vectors(parameters, "rademacher", 3)
    products = GraphProduct(loss(), parameters)(vectors)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(parameters, vectors, alpha=sign * 1e-5)
        sides.append(torch.autograd.grad(loss(), parameters))
        with torch.no_grad():
            torch._foreach_add_(parameters, vectors, alpha=-sign * 1e-5)
    for product, plus, minus in zip(products, *sides, strict=True):
        difference = (plus - minus) / 2e-5
        assert (product - difference).norm() / product.norm() < 1e-6


def test_the_training_gradient_is_what_it_is_without_a_probe():
    model, loss = mixed_network()
    norms = find_norms(model)
    plain = torch.autograd.grad(loss(), list(model.parameters()))
    source = CurvatureProbe(model, [CurvatureRequest(n.name, n, "rademacher") for n in norms])
    source.enable(True, 0)
    with source.context():
        value = loss()
        assert source.observe(value)
        assert all(p.grad is None for p in model.parameters())
        value.backward()
    for parameter, gradient in zip(model.parameters(), plain, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert not parameter.grad.requires_grad
    source.close()


def test_signs_depend_on_the_step_and_on_nothing_else():
    parameters = [torch.zeros(7), torch.zeros(5, 1)]
    torch.manual_seed(1)
    first = probe_vectors(parameters, "rademacher", 20)
    torch.manual_seed(2)
    again = probe_vectors(parameters, "rademacher", 20)
    other = probe_vectors(parameters, "rademacher", 40)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    signs = torch.cat([z.view(-1) for z in probe_vectors([torch.zeros(4000)], "rademacher", 0)])
    assert signs.abs().eq(1).all() and abs(signs.mean()) < 0.05


def test_micro_batches_add_up_to_the_whole_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, labels = randn(12, 5), torch.arange(12) % 3
    norms = find_norms(model)
    whole = estimated(
        model, norms, "rademacher", lambda: nn.functional.cross_entropy(model(x), labels), step=5
    )
    source = CurvatureProbe(model, [CurvatureRequest(n.name, n, "rademacher") for n in norms])
    source.enable(True, 5)
    for rows in torch.arange(12).split(4):
        source.observe(nn.functional.cross_entropy(model(x[rows]), labels[rows]) / 3)
    parts = source.take()
    for name, estimate in whole.items():
        torch.testing.assert_close(parts[name].sum, estimate, rtol=1e-12, atol=1e-15)
        assert parts[name].count == 1
    source.close()


def test_a_linear_loss_and_an_unused_parameter():
    model = nn.ModuleDict({"used": nn.LayerNorm(4), "unused": nn.LayerNorm(4)}).double()
    norms = find_norms(model)
    estimates = estimated(model, norms, "rademacher", lambda: model["used"](randn(3, 4)).sum())
    assert set(estimates) == {"used.weight", "used.bias"}
    assert all((estimate == 0).all() for estimate in estimates.values())


def test_the_loss_scale_is_divided_out():
    model, loss = mixed_network()
    norms = find_norms(model)
    plain = estimated(model, norms, "rademacher", loss)
    source = CurvatureProbe(model, [CurvatureRequest(n.name, n, "rademacher") for n in norms])
    source.enable(True, 0)
    source.observe(loss(), weight=0.5, scale=torch.tensor(2.0**12))
    for name, statistic in source.take().items():
        torch.testing.assert_close(2 * statistic.sum, plain[name], rtol=1e-13, atol=0)
    source.close()
