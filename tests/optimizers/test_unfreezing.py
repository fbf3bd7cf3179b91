"""Parameters that join during training, and diagnostics at every moment, with every optimizer."""

import copy

import pytest
import torch
from torch import nn

from hf_precond.registry import list_optimizers
from tests.optimizers.models import backward, batch, make, train, weights
from tests.optimizers.test_shared import build, same, through_file

NAMES = list_optimizers()


def told(optimizer):
    """Diagnostics, which are plain finite numbers."""
    values = optimizer.diagnostics()
    assert all(isinstance(v, float) and v == v and abs(v) != float("inf") for v in values.values())
    return values


def freeze(parameters):
    for parameter in parameters:
        parameter.requires_grad_(False)


def unfreeze(model, optimizer, parameters, **fields):
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": parameters, **fields})
    told(optimizer)
    optimizer.attach(model)
    told(optimizer)


def parts(model):
    """What is frozen at first, by what it is of an attention."""
    first, second = model.bert.encoder.layer
    return {
        "a layer": [*first.parameters()],
        "the first matrix": [*second.attention.self.query.parameters()],
        "a bias": [second.attention.self.query.bias, second.output.dense.bias],
        "a norm": [*second.output.LayerNorm.parameters()],
    }


@pytest.mark.parametrize("kind", ["a layer", "the first matrix", "a bias", "a norm"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_unfrozen_is_preconditioned_as_the_routing_says(name, kind):
    model, whole = make("bert"), make("bert")
    late = parts(model)[kind]
    freeze(late)
    optimizer, other = build(name, model), build(name, whole)
    train("bert", model, optimizer, 3)
    before = weights(model)
    unfreeze(model, optimizer, late, weight_decay=0.0)
    treated = {r.name: (r.treatment, r.reason) for r in optimizer.routing}
    assert treated == {r.name: (r.treatment, r.reason) for r in other.routing}
    assert len(optimizer.bound) == len(other.bound)
    train("bert", model, optimizer, 4, start=3)
    for key, value in weights(model).items():
        assert not torch.equal(value, before[key]), key
    train("bert", whole, other, 7)
    for bound, expected in zip(optimizer.bound, other.bound, strict=True):
        held, wanted = optimizer.state[bound.weight], other.state[expected.weight]
        assert held.keys() == wanted.keys(), bound
        for key, value in wanted.items():
            if isinstance(value, torch.Tensor):
                assert held[key].shape == value.shape, key
                assert key.endswith("fade") or torch.equal(held[key], 0 * held[key]) == (
                    torch.equal(value, 0 * value)
                ), key
    told(optimizer)
    optimizer.close()
    other.close()


@pytest.mark.parametrize("name", NAMES)
def test_after_unfreezing_a_run_resumes_bit_for_bit(name):
    model = make("bert")
    late = [p for parameters in list(parts(model).values())[:2] for p in parameters]
    freeze(late)
    optimizer = build(name, model)
    train("bert", model, optimizer, 3)
    unfreeze(model, optimizer, late, lr=5e-4)
    at_once = through_file(copy.deepcopy(optimizer.state_dict())), copy.deepcopy(model.state_dict())
    train("bert", model, optimizer, 2, start=3)
    saved = through_file(copy.deepcopy(optimizer.state_dict())), copy.deepcopy(model.state_dict())
    train("bert", model, optimizer, 3, start=5)
    for start, (state, values) in ((3, at_once), (5, saved)):
        again = make("bert", seed=7)
        held = [p for parameters in list(parts(again).values())[:2] for p in parameters]
        freeze(held)
        resumed = build(name, again)
        unfreeze(again, resumed, held)
        again.load_state_dict(values)
        resumed.load_state_dict(state)
        told(resumed)
        train("bert", again, resumed, 8 - start, start=start)
        same(weights(model), weights(again))


@pytest.mark.parametrize("name", NAMES)
def test_what_others_keep_is_not_lost_where_a_layer_joins(name):
    """A layer that has seen no gradient joins between two steps with statistics."""
    interval = {"stat_interval": 4, "inverse_interval": 8, "probe_interval": 8, "basis_interval": 4}
    fields = {k: v for k, v in interval.items() if hasattr(build(name, make("bert")).config, k)}
    runs = {}
    for joins in (False, True):
        model = make("bert", dtype=torch.float64)
        late = parts(model)["the first matrix"]
        freeze(late)
        optimizer = build(name, model, **fields)
        train("bert", model, optimizer, 2)
        if joins:
            unfreeze(model, optimizer, late, lr=0.0)
        train("bert", model, optimizer, 1, start=2)
        runs[joins] = weights(model)
        optimizer.close()
    for key, value in runs[False].items():
        if "query" not in key:
            torch.testing.assert_close(runs[True][key], value, rtol=1e-12, atol=1e-15, msg=key)


@pytest.mark.parametrize("scope", ["query_key", "attention", "all_linear"])
def test_afopt_takes_what_joins_late_as_soon_as_it_has_statistics(scope):
    model = make("bert")
    freeze(model.bert.encoder.layer[0].parameters())
    optimizer = build("afopt", model, scope=scope, stat_interval=2, inverse_interval=40)
    train("bert", model, optimizer, 7)
    unfreeze(model, optimizer, [*model.bert.encoder.layer[0].parameters()])
    train("bert", model, optimizer, 2, start=7)
    query = model.bert.encoder.layer[0].attention.self.query.weight
    for left in (optimizer.state[query]["left"], optimizer.plan.rights[0].read(optimizer.state)):
        eye = torch.eye(left.shape[-1]).expand_as(left)
        assert not torch.allclose(left, eye, rtol=0.1, atol=0.1)
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_diagnostics_are_told_at_any_moment(name):
    model = make("bert")
    optimizer = build(name, model, skip_nonfinite=True)
    told(optimizer)
    empty = copy.deepcopy(optimizer.state_dict())
    backward(model, optimizer, batch("bert"))
    told(optimizer)
    optimizer.step()
    told(optimizer)
    optimizer.zero_grad()
    told(optimizer)
    copied = copy.deepcopy((model, optimizer))
    told(copied[1])
    copied[1].attach(copied[0])
    told(copied[1])
    saved = copy.deepcopy(optimizer.state_dict())
    train("bert", model, optimizer, 2, start=1)
    for state in (saved, empty):
        optimizer.load_state_dict(state)
        told(optimizer)
    train("bert", model, optimizer, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))]})
    told(optimizer)
    backward(model, optimizer, batch("bert", 1))
    model.classifier.weight.grad.fill_(float("inf"))
    optimizer.step()
    assert told(optimizer)["skipped_steps"] == 1
    optimizer.attach(model)
    told(optimizer)
    optimizer.close()
    told(optimizer)
    fresh = build(name, make("bert"))
    fresh.load_state_dict(saved)
    told(fresh)
