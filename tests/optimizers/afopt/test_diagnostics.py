"""AFOpt's report of its steps, and of the entropy of attention weights when asked."""

import copy

import pytest
import torch

from hf_precond.registry import create_optimizer
from hf_precond.statistics.moments import request_shape
from tests.architectures.families import FAMILIES, build, loss_of
from tests.optimizers.afopt.support import Attention, backward, inputs, spectral


def trained(name, steps=2, **fields):
    model = build(name, torch.float32)
    optimizer = create_optimizer(model, "afopt", stat_interval=1, **fields)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, FAMILIES[name].batch()).backward()
        optimizer.step()
    return model, optimizer


def test_entropies_of_every_layer_between_none_and_uniform():
    model, optimizer = trained("bert", attention_entropy=True)
    actual = {k: v for k, v in optimizer.diagnostics().items() if k.startswith("entropy")}
    names = [block.name for block in optimizer.structure.attention]
    assert set(actual) == {f"{key}/{n}" for n in names for key in ("entropy", "entropy_min")}
    uniform = torch.tensor(float(FAMILIES["bert"].batch()["input_ids"].shape[1])).log().item()
    assert all(0 < value <= uniform + 1e-6 for value in actual.values())
    optimizer.close()
    model, twin = copy.deepcopy((model, optimizer))
    twin.attach(model)
    assert any(request.kind == "entropy" for request in twin.requests())
    twin.close()


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_every_statistic_has_the_shape_that_ranks_expect(name):
    model = build(name, torch.float32)
    optimizer = create_optimizer(model, "afopt", scope="all_linear", attention_entropy=True)
    loss_of(model, FAMILIES[name].batch()).backward()
    taken = optimizer.statistics.take()
    shapes = {request.key: request_shape(request) for request in optimizer.requests()}
    assert {key: tuple(actual.sum.shape) for key, actual in taken.items()} == shapes
    optimizer.close()


def test_nothing_is_collected_unless_asked():
    _, optimizer = trained("bert")
    assert not any(request.kind == "entropy" for request in optimizer.requests())
    assert not any(key.startswith("entropy") for key in optimizer.diagnostics())
    optimizer.close()


def test_the_steps_are_the_same():
    plain, asked = trained("llama")[0], trained("llama", attention_entropy=True)[0]
    for ours, theirs in zip(asked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_attentions_with_kernels_of_their_own_are_named():
    with pytest.warns(UserWarning, match="attention_entropy leaves out 2 attentions"):
        _, optimizer = trained("deberta-v2", attention_entropy=True)
    optimizer.close()


def test_reported_change_of_a_layer_is_the_one_really_seen():
    """q and k together, cross term included, for one sequence to first order."""
    torch.manual_seed(12)
    module, x = Attention(d=32, heads=4), inputs(1, 24, 32, spread=30.0, shift=0.2)
    optimizer = spectral(module, roles="qk", lr=1e-6, nesterov=False)
    backward(module, x)
    with torch.no_grad():
        old = module.logits.clone()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a scheduler's, for the step to come
    predicted = optimizer.diagnostics()
    with torch.no_grad():
        module(x)
        change = (module.logits - old).square().mean((0, 2, 3)).sqrt()
    assert predicted["logit_change/"] == pytest.approx(
        change.square().mean().sqrt().item(), rel=1e-3
    )
    assert predicted["logit_change_max/"] == pytest.approx(change.max().item(), rel=1e-3)
    assert 0 < predicted["cosine"] < 1


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_an_observed_step_is_reported_like_one_computed_again(name):
    """Without momentum the step computed again from the state is the step that was taken."""
    model = build(name, torch.float64)
    optimizer = create_optimizer(model, "afopt", stat_interval=1, momentum=0.0, lr=1e-3)
    reports = []
    for observed in (True, False):
        optimizer.zero_grad()
        torch.manual_seed(0)  # for dropout
        loss_of(model, FAMILIES[name].batch()).backward()
        twin = copy.deepcopy(optimizer.state_dict())
        weights = copy.deepcopy(model.state_dict())
        if observed:
            optimizer.expect_log()
        optimizer.step()
        assert (optimizer.observed is not None) == observed
        reports.append(optimizer.report())
        assert optimizer.observed is None and not optimizer.observing
        reports.append(optimizer.report())
        model.load_state_dict(weights)
        optimizer.load_state_dict(twin)
    for other in reports[1:]:
        assert other == pytest.approx(reports[0], rel=1e-9)
    assert any(key.startswith("logit_change/") for key in reports[0])
    optimizer.close()
