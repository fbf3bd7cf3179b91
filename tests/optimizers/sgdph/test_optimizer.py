"""SGD-PH's step, its probes prescribed or exact, against its formulas written out."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from hf_precond.architectures.modules import find_norms
from hf_precond.architectures.structure import ModelStructure, NormParameter
from hf_precond.optimizers.sgdph.config import SGDPHConfig
from hf_precond.optimizers.sgdph.optimizer import SGDPH
from hf_precond.registry import create_optimizer
from hf_precond.statistics.hessian_probe import CurvatureProbe
from hf_precond.statistics.requests import Statistic, StatisticsSource


class Prescribed(StatisticsSource):
    """A source that hands over given estimates by step number; ``None`` collects nothing."""

    def __init__(self, requests, estimates):
        self.keys = [request.key for request in requests]
        self.estimates = estimates
        self.step, self.due = 0, False

    def enable(self, due, step):
        self.due, self.step = due, step

    def take(self):
        given = self.estimates.get(self.step)
        if given is None:
            return {}
        return {key: Statistic(given.clone(), given.new_ones(())) for key in self.keys}


def one_norm(config, estimates, width=4, seed=0):
    """A lone norm scale stepped with prescribed estimates."""
    module = nn.RMSNorm(width).double()
    with torch.no_grad():
        module.weight.copy_(randn(width, seed=seed))
    structure = ModelStructure(
        norms=[NormParameter("weight", module, "weight")],
        open_statistics=lambda requests: Prescribed(requests, estimates),
    )
    return module.weight, SGDPH(module.parameters(), structure, config)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6),
        nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip
    return model.double()


def channels(model, vectors=False):
    found = find_norms(model)
    if not vectors:
        return found
    pairs = [(name.rpartition("."), p) for name, p in model.named_parameters() if p.dim() == 1]
    return [
        NormParameter(f"{path}.{view}", model.get_submodule(path), view)
        for (path, _, view), _ in pairs
    ]


def build(model, **fields):
    config = SGDPHConfig(**fields)
    structure = ModelStructure(
        norms=channels(model, config.reference),
        open_statistics=lambda requests: CurvatureProbe(model, requests),
    )
    return SGDPH([p for p in model.parameters() if p.requires_grad], structure, config)


def loss_of(model, step):
    labels = torch.randint(3, (8,), generator=torch.Generator().manual_seed(50 + step))
    return nn.functional.cross_entropy(model(randn(8, 5, seed=step)), labels)


def train_step(model, optimizer, step):
    with optimizer.curvature_context():
        loss = loss_of(model, step)
        optimizer.probe(loss)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def same(left, right):
    for (name, ours), theirs in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


REFERENCE = {"base": "sgd", "probe": "ones", "reference": True}


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_adamw_rule_written_out(scale):
    config = SGDPHConfig(lr=0.1, weight_decay=0.3, probe_interval=2, gamma=0.05, stat_decay=0.8)
    estimates = {step: scale * randn(4, seed=9 + step) for step in (0, 2, 4)}
    weight, optimizer = one_norm(config, estimates)
    p, m, d = weight.detach().clone(), torch.zeros(4).double(), torch.zeros(4).double()
    clipped = 0
    for step in range(6):
        g = randn(4, seed=30 + step)
        weight.grad = g.clone()
        optimizer.step()
        if step % 2 == 0:
            d = 0.8 * d + 0.2 * estimates[step]
        m = 0.9 * m + 0.1 * g
        d_hat = d.abs() / (1 - 0.8 ** (step // 2 + 1))
        u = (m / (1 - 0.9 ** (step + 1))) / (0.05 * d_hat + 1e-8)
        clipped += (u.abs() > 1).sum()
        p = p - 0.1 * (u.clamp(-1, 1) + 0.3 * p)
        torch.testing.assert_close(weight.detach(), p, rtol=1e-12, atol=1e-14)
    assert 0 < clipped < 24


def test_the_sgd_rule_written_out():
    config = SGDPHConfig(
        lr=0.1, weight_decay=0.3, base="sgd", probe_interval=3, stat_decay=0.7, momentum=0.6
    )
    estimates = {0: torch.tensor([2e-3, -1e-5, 4.0, -0.3]).double(), 3: 1e-3 * randn(4)}
    weight, optimizer = one_norm(config, estimates)
    p, v, d = weight.detach().clone(), torch.zeros(4).double(), torch.zeros(4).double()
    for step in range(6):
        g = randn(4, seed=30 + step)
        weight.grad = g.clone()
        optimizer.step()
        if step % 3 == 0:
            d = 0.7 * d + 0.3 * estimates[step]
        v = 0.6 * v + g
        d_hat = d.abs() / (1 - 0.7 ** (step // 3 + 1))
        p = p - 0.1 * (v * (1e-3 / (d_hat + 1e-4)).clamp(max=10) + 0.3 * p)
        torch.testing.assert_close(weight.detach(), p, rtol=1e-12, atol=1e-14)


def test_a_boundless_curvature_takes_a_twentieth_of_adamws_step():
    """What the probe finds where the input of a norm is constant holds for no step."""
    huge = torch.tensor([1e24, 1e24, 1.0, 1e9]).double()
    config = SGDPHConfig(lr=0.1, weight_decay=0.0, probe_interval=9)
    weight, optimizer = one_norm(config, {0: huge})
    plain = weight.detach().clone().requires_grad_()
    theirs = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    for step in range(4):
        before, adamws = weight.detach().clone(), plain.detach().clone()
        weight.grad = plain.grad = 1 + randn(4, seed=30 + step).abs()
        optimizer.step()
        theirs.step()
        ratio = (weight.detach() - before) / (plain.detach() - adamws)
        torch.testing.assert_close(ratio[[0, 1, 3]], torch.full((3,), 0.05).double())
        assert ratio[2] >= 1


@pytest.mark.parametrize(("base", "forgotten"), [("adamw", 1e2), ("sgd", 1e4)])
def test_a_probe_out_of_all_proportion_is_forgotten_by_the_next(base, forgotten):
    """Also one whose square has no float32; zeros, as of an expert without tokens, forget none."""
    small, zero = 1 + randn(4).abs(), torch.zeros(4).double()
    for size in (1e30, 2 * forgotten, 0.2 * forgotten):
        start = torch.full((4,), size).double() * small.max()
        config = SGDPHConfig(probe_interval=1, stat_decay=0.8, base=base)
        weight, optimizer = one_norm(config, {0: start, 1: small, 2: zero})
        for _ in range(3):
            weight.grad = torch.ones(4).double()
            optimizer.step()
        kept = 0.8**2 * 0.2 * start if size < forgotten else 0.0
        expected = kept + 0.8 * 0.2 * small
        torch.testing.assert_close(optimizer.state[weight]["curvature"], expected)
        assert optimizer.state[weight]["probes"] == (3 if size < forgotten else 2)


@pytest.mark.parametrize("bad", [None, torch.full((4,), math.inf).double()], ids=["none", "inf"])
def test_before_a_usable_probe_it_is_the_fallback(bad):
    for base, fallback in (
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ):
        decay = 0.2 if base == "adamw" else 0.0
        weight, optimizer = one_norm(SGDPHConfig(lr=0.1, weight_decay=decay, base=base), {0: bad})
        plain = weight.detach().clone().requires_grad_()
        theirs = fallback([plain])
        for step in range(4):
            weight.grad = plain.grad = randn(4, seed=30 + step)
            optimizer.step()
            theirs.step()
            torch.testing.assert_close(weight, plain, rtol=1e-13, atol=1e-15)
        assert optimizer.diagnostics().get("dropped_probes", 0.0) == float(bad is not None)


def test_a_probe_that_is_not_finite_leaves_the_average_as_it_was():
    config = SGDPHConfig(probe_interval=1)
    bad = torch.tensor([1.0, math.nan, 1.0, 1.0]).double()
    weight, optimizer = one_norm(config, {0: randn(4), 1: bad})
    weight.grad = randn(4, seed=1)
    optimizer.step()
    before = optimizer.state[weight]["curvature"].clone()
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["curvature"], before)
    assert optimizer.state[weight]["probes"] == 1


def test_separable_quadratic_lands_in_one_step_and_flees_the_saddle():
    torch.manual_seed(0)
    module = nn.RMSNorm(6).double()
    target, curvature = randn(6), torch.tensor([0.5, 2.0, 7.0, -0.5, -2.0, 9.0]).double()
    structure = ModelStructure(
        norms=[NormParameter("weight", module, "weight")],
        open_statistics=lambda requests: CurvatureProbe(module, requests),
    )
    config = SGDPHConfig(
        lr=10.0, tau=0.1, base="sgd", momentum=0.0, stat_decay=0.0, curvature_eps=1e-30,
        probe="exact", weight_decay=0.0,
    )  # fmt: skip
    optimizer = SGDPH(module.parameters(), structure, config)
    start = module.weight.detach().clone()
    loss = 0.5 * (curvature * (module.weight - target).square()).sum()
    optimizer.probe(loss)
    loss.backward()
    optimizer.step()
    convex = curvature > 0
    torch.testing.assert_close(module.weight[convex], target[convex], rtol=1e-12, atol=1e-13)
    away = start + (start - target)
    torch.testing.assert_close(module.weight[~convex], away[~convex], rtol=1e-12, atol=1e-13)
    optimizer.close()


@pytest.mark.parametrize("fields", [REFERENCE, {"base": "sgd"}, {"base": "adamw"}])
def test_other_parameters_are_stepped_by_the_plain_fallback(fields):
    model = network()
    decay = 0.0 if fields["base"] == "sgd" and "probe" not in fields else 0.05
    optimizer = build(model, lr=0.05, weight_decay=decay, probe_interval=3, **fields)
    vectors = channels(model, optimizer.config.reference)
    held = {id(c.parameter) for c in (vectors[:-1] if "probe" in fields else vectors)}
    others = [p for p in model.parameters() if id(p) not in held]
    assert others
    plain = [p.detach().clone().requires_grad_() for p in others]
    fallback = (
        torch.optim.AdamW(plain, lr=0.05, weight_decay=decay)
        if fields["base"] == "adamw"
        else torch.optim.SGD(plain, lr=0.05, momentum=0.9, weight_decay=decay)
    )
    for step in range(20):
        with optimizer.curvature_context():
            loss = loss_of(model, step)
            optimizer.probe(loss)
            loss.backward()
        for ours, theirs in zip(others, plain, strict=True):
            theirs.grad = ours.grad.clone()
        optimizer.step()
        fallback.step()
        optimizer.zero_grad()
    for ours, theirs in zip(others, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    optimizer.close()


def test_the_authors_first_step_is_sgd_except_for_the_probed_tensor():
    # A norm first: the row sums of a bias in front of a LayerNorm would be zero.
    model, plain = (nn.Sequential(nn.LayerNorm(5), network()[:1], network()[1:]) for _ in "ab")
    model, plain = model.double(), plain.double()
    optimizer = build(model, lr=0.1, **REFERENCE)
    fallback = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    train_step(model, optimizer, 0)
    loss_of(plain, 0).backward()
    fallback.step()
    first = channels(model, vectors=True)[0].name
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name == first:
            assert not torch.allclose(ours, theirs, rtol=1e-3)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    optimizer.close()


@pytest.mark.parametrize("fields", [REFERENCE, {"base": "sgd"}, {"base": "adamw"}])
def test_decay_of_norm_parameters_is_decoupled(fields):
    model = network()
    optimizer = build(model, lr=0.1, weight_decay=0.2, **fields)
    weight = model[1].weight
    before = weight.detach().clone()
    optimizer.probe(loss_of(model, 0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.2), rtol=1e-14, atol=0)
    moment = "exp_avg" if fields["base"] == "adamw" else "momentum_buffer"
    assert (optimizer.state[weight][moment] == 0).all()
    optimizer.close()


def test_without_curvature_the_multiplier_reaches_its_cap():
    zeros = {step: torch.zeros(4).double() for step in range(200)}
    for fields in (REFERENCE, {"base": "sgd", "probe_interval": 1}):
        config = SGDPHConfig(lr=0.1, **fields)
        module = nn.LayerNorm(4).double()
        structure = ModelStructure(
            norms=channels(module), open_statistics=lambda requests: Prescribed(requests[:1], zeros)
        )
        optimizer = SGDPH(module.parameters(), structure, config)
        for step in range(200):
            module.weight.grad, module.bias.grad = randn(4, seed=step), randn(4, seed=step)
            before = module.weight.detach().clone()
            optimizer.step()
        taken = (before - module.weight.detach()) / 0.1
        ratio = taken / optimizer.state[module.weight]["momentum_buffer"]
        torch.testing.assert_close(ratio, torch.full((4,), 10.0).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("fields", [REFERENCE, {"base": "sgd"}, {"base": "adamw"}])
def test_resumed_in_mid_cycle_it_takes_the_same_path(fields):
    model = network()
    values = {"lr": 0.05, "weight_decay": 0.01, "probe_interval": 4} | fields
    optimizer = build(model, **values)
    for step in range(6):
        train_step(model, optimizer, step)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = network(seed=5)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = build(other, **values)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(6, 20):
        train_step(model, optimizer, step)
        train_step(other, resumed, step)
    same(model, other)
    optimizer.close()
    resumed.close()


class Branches(nn.Module):
    """A norm that is not used, one that is frozen, one that trains."""

    def __init__(self):
        super().__init__()
        self.unused, self.frozen, self.used = nn.LayerNorm(5), nn.LayerNorm(5), nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.used(self.frozen(x))))


@pytest.mark.parametrize("fields", [REFERENCE, {"base": "sgd"}, {"base": "adamw"}])
def test_frozen_and_unused_parameters(fields):
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = build(model, lr=0.05, weight_decay=0.1, probe_interval=2, **fields)
    before = copy.deepcopy(model)
    for step in range(9):
        train_step(model, optimizer, step)
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before.get_parameter(name))
        assert changed == name.startswith(("used", "head")), name
    assert "curvature" not in optimizer.state[model.unused.weight]
    assert optimizer.state[model.used.weight]["probes"] > 0
    optimizer.close()


def test_frozen_in_mid_training():
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = build(model, lr=0.05, probe_interval=1)
    train_step(model, optimizer, 0)
    for parameter in (*model.used.parameters(), *model.unused.parameters()):
        parameter.requires_grad_(False)
    before = model.used.weight.clone()
    train_step(model, optimizer, 1)
    assert torch.equal(model.used.weight, before)
    optimizer.close()


@pytest.mark.parametrize("fields", [REFERENCE, {"base": "sgd"}])
def test_without_momentum(fields):
    model = network()
    optimizer = build(model, lr=0.05, momentum=0.0, **fields)
    losses = [loss_of(model, 0).item()]
    for _ in range(15):
        train_step(model, optimizer, 0)
    assert loss_of(model, 0) < losses[0] - 0.02
    assert all("momentum_buffer" not in state for state in optimizer.state.values())
    optimizer.close()


def test_a_due_step_without_a_loss_says_what_to_call():
    model = network()
    optimizer = build(model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"curvature_context.*optimizer\.probe\(loss\)"):
        optimizer.step()
    optimizer.close()


def test_a_skipped_step_commits_nothing():
    model = network()
    optimizer = build(model)
    optimizer.probe(loss_of(model, 0))
    optimizer.zero_grad()
    train_step(model, optimizer, 1)
    fresh = network()
    other = build(fresh)
    train_step(fresh, other, 1)
    ours = optimizer.state[model[1].weight]["curvature"]
    assert torch.equal(ours, other.state[fresh[1].weight]["curvature"])
    optimizer.close()
    other.close()


def test_steps_that_are_not_due_compute_no_product(monkeypatch):
    model = network()
    optimizer = build(model, probe_interval=3)
    calls = []
    import hf_precond.statistics.hessian_probe as module

    original = module.GraphProduct
    monkeypatch.setattr(module, "GraphProduct", lambda *args: calls.append(step) or original(*args))
    for step in range(7):
        train_step(model, optimizer, step)
    assert calls == [0, 3, 6]
    optimizer.close()


def test_a_norm_outside_the_groups_is_refused():
    model = network()
    structure = ModelStructure(norms=channels(model))
    with pytest.raises(ValueError, match=r"the first of them: 1\.weight"):
        SGDPH([model[0].weight], structure, SGDPHConfig())


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_half_precision_parameters_keep_float32_state(base):
    model = network().to(torch.bfloat16)
    optimizer = build(model, lr=0.2, base=base, probe_interval=2)
    before = copy.deepcopy(model)
    for step in range(4):
        with optimizer.curvature_context():
            labels = torch.arange(8) % 3
            loss = nn.functional.cross_entropy(model(randn(8, 5, seed=step).bfloat16()), labels)
            optimizer.probe(loss)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[model[1].weight]["curvature"].dtype == torch.float32
    assert optimizer.state[model[1].weight]["probes"] == 2
    assert not torch.equal(model[4].weight, before[4].weight)
    optimizer.close()


def test_diagnostics_say_what_the_last_step_of_the_norms_was():
    config = SGDPHConfig(gamma=0.5, probe_interval=1)
    weight, optimizer = one_norm(config, {0: torch.tensor([0.1, 1.0, 40.0, 4.0]).double()})
    weight.grad = torch.ones(4).double()
    optimizer.step()
    values = optimizer.diagnostics()
    u = torch.tensor([1.0, 1.0, 1 / 20, 0.5]).double()
    assert values["norm_clipped"] == 0.5
    assert values["norm_update_rms"] == pytest.approx(u.square().mean().sqrt().item(), rel=1e-6)
    assert values["norm_update_over_adamw"] == pytest.approx(values["norm_update_rms"], rel=1e-6)
    assert values["probes"] == 1


def test_the_reference_is_one_set_of_fields():
    with pytest.raises(ValueError, match="base='sgd' and probe='ones'"):
        SGDPHConfig(reference=True)


@pytest.mark.parametrize(
    ("weight_norm", "name"),
    [
        (nn.utils.parametrizations.weight_norm, "0.parametrizations.weight.original0"),
        pytest.param(
            nn.utils.weight_norm,
            "0.weight_g",
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated"),
        ),
    ],
)
def test_the_scale_of_weight_norm_is_a_channel_parameter(weight_norm, name):
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh())
    model.append(nn.Linear(6, 3)).double()
    optimizer = build(model, lr=0.05, probe_interval=2)
    (norm,) = optimizer.structure.norms
    assert norm.name == name
    before = loss_of(model, 0).item()
    for _ in range(10):
        train_step(model, optimizer, 0)
    state = optimizer.state[norm.parameter]
    assert state["curvature"].shape == (6, 1) and state["curvature"].abs().min() > 0
    assert loss_of(model, 0) < before
    optimizer.close()


@pytest.mark.parametrize("fields", [REFERENCE, {"base": "sgd"}, {"base": "adamw"}])
def test_built_by_name_it_is_the_same_optimizer(fields):
    model, other = network(), network()
    optimizer = create_optimizer(model, "sgdph", lr=0.05, **fields)
    by_hand = build(other, lr=0.05, **fields)
    for step in range(5):
        train_step(model, optimizer, step)
        train_step(other, by_hand, step)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    values = optimizer.diagnostics()
    assert ("norm_multiplier" in values) == (fields["base"] == "sgd")
    optimizer.close()
    by_hand.close()
