"""State dicts of another optimizer, another model, other settings, or with parts missing."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_precond.optimizers.base.checkpoint import KEY
from hf_precond.registry import create_optimizer, list_optimizers
from tests.optimizers.models import make, train, weights
from tests.optimizers.test_shared import build, same, through_file

each_name = pytest.mark.parametrize("name", list_optimizers())
# A field of each optimizer that decides which tensors its state has.
OTHER = {
    "adamr": {"basis": "one_sided"},
    "afopt": {"scope": "attention"},
    "muon": {"variant": "muon"},
    "nkfac": {"max_dim": 20},
    "sgdph": {"include_bias": True},
}


def trained(name, model_name="bert", steps=2, **values):
    model = make(model_name)
    optimizer = build(name, model, **values)
    train(model_name, model, optimizer, steps)
    return model, optimizer


def refused(optimizer, state, message):
    """The state is refused and the optimizer is as it was, its groups too."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, held in before["state"].items():
        for key, value in held.items():
            now = after["state"][index][key]
            assert torch.equal(value, now) if torch.is_tensor(value) else value == now, key
    optimizer.close()


@each_name
def test_the_identity_names_every_parameter_and_survives_a_file(name):
    model, optimizer = trained(name)
    own = through_file(optimizer.state_dict())[KEY]
    assert own["optimizer"] == name and "state_dtype" in own["layout"]
    named = {entry[0]: tuple(entry[1]) for group in own["parameters"] for entry in group}
    assert named == {key: tuple(p.shape) for key, p in model.named_parameters()}
    optimizer.close()


@each_name
def test_another_optimizer_is_refused(name):
    _, optimizer = trained(name)
    other = next(n for n in list_optimizers() if n != name)
    _, theirs = trained(other)
    theirs.close()
    refused(optimizer, theirs.state_dict(), rf"^{name}: .*saved by {other}; .*--optim {other}")


@each_name
def test_an_optimizer_of_another_package_is_refused(name):
    _, optimizer = trained(name)
    groups = [group["params"] for group in optimizer.param_groups]
    stock = torch.optim.AdamW([{"params": params} for params in groups])
    stock.step()
    refused(optimizer, stock.state_dict(), "another package")


@each_name
def test_another_model_is_refused_with_the_parameters_that_differ(name):
    _, optimizer = trained(name)
    state = optimizer.state_dict()
    model = make("bert")
    model.classifier = nn.Linear(16, 5)
    other = create_optimizer(model, optimizer.config)
    refused(other, state, r"another model.*classifier\.\w+ .* is \(3.* there and \(5.* here")
    optimizer.close()


def test_a_model_with_other_names_groups_or_order_is_refused():
    _, optimizer = trained("adamr")
    state = through_file(optimizer.state_dict())
    renamed = copy.deepcopy(state)
    renamed[KEY]["parameters"][0][0][0] = "bert.else"
    refused(optimizer, renamed, r"bert\.else \(group 0\) is \(50, 16\) there and missing here")
    swapped = copy.deepcopy(state)
    group = swapped[KEY]["parameters"][0]
    group[3], group[4] = group[4], group[3]
    refused(optimizer, swapped, "another order")
    fewer = copy.deepcopy(state)
    fewer[KEY]["parameters"].pop()
    refused(optimizer, fewer, r"in 1 groups there, .* in 2 here.* more")


@each_name
def test_other_settings_are_refused_with_both_values(name):
    _, optimizer = trained(name)
    state = optimizer.state_dict()
    ((field, value),) = OTHER[name].items()
    _, other = trained(name, **OTHER[name])
    there = getattr(optimizer.config, field)
    refused(other, state, rf"{field}={there!r} there and {value!r} here.*optimizer_config\.json")
    optimizer.close()


@each_name
def test_settings_that_leave_the_state_alone_may_change(name):
    _, optimizer = trained(name)
    _, other = trained(name, steps=1, lr=0.5, weight_decay=0.3, eps=1e-5)
    other.load_state_dict(optimizer.state_dict())
    assert other.steps == 2
    for each in (optimizer, other):
        each.close()


@each_name
def test_a_state_with_parts_missing_is_refused(name):
    _, optimizer = trained(name)
    state = through_file(optimizer.state_dict())
    lost = copy.deepcopy(state)
    del lost["state"][0]
    refused(optimizer, lost, r"not whole: it has none of bert\.\S+ \(1 of \d+ parameters\)")
    for key in ("state", "param_groups"):
        refused(optimizer, {k: v for k, v in state.items() if k != key}, f"it has no {key}")
    refused(optimizer, {"model": 1}, "it has no state and no param_groups")


@each_name
def test_an_optimizer_without_steps_loads_its_own_empty_state(name):
    model = make("bert")
    optimizer = build(name, model)
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    train("bert", model, optimizer, 1)
    assert optimizer.steps == 1
    optimizer.close()


@each_name
def test_an_optimizer_attached_again_keeps_the_names_of_its_groups(name):
    """A second ``train()`` attaches again; its checkpoints are those of the same model."""
    model, optimizer = trained(name)
    extra = nn.Parameter(torch.ones(3))
    before = str(optimizer.routing)
    optimizer.attach(model)
    assert str(optimizer.routing) == before
    state = through_file(optimizer.state_dict())
    other, resumed = trained(name, steps=1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert state[KEY] == optimizer.state_dict()[KEY] == resumed.state_dict()[KEY]
    optimizer.add_param_group({"params": [extra]})
    optimizer.attach(model)
    assert [route.name for route in optimizer.routing][-1] == "(added) group 2"
    for each in (optimizer, resumed):
        each.close()


@each_name
def test_layers_added_and_not_attached_are_told_once_and_shown(name):
    model = make("bert")
    layer = model.bert.encoder.layer[0]
    layer.requires_grad_(False)
    optimizer = build(name, model)
    layer.requires_grad_(True)
    optimizer.add_param_group({"params": list(layer.parameters()), "name": "late"})
    rows = [row for row in optimizer.routing if ".layer.0." in row.name]
    assert {(row.treatment, row.reason, row.group) for row in rows} == {
        ("base", "added after creation", "late")
    }
    assert not any("(added)" in row.name for row in optimizer.routing)
    with pytest.warns(UserWarning, match=r"16 parameters .*call optimizer.attach\(model\)"):
        train("bert", model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train("bert", model, optimizer, 1, start=1)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        optimizer.attach(model)
        train("bert", model, optimizer, 1, start=2)
    optimizer.close()


@each_name
def test_layers_unfrozen_under_way_are_preconditioned_once_added_and_attached(name):
    trained_weights, saved = [], ({}, {})
    for resumes in (False, True):
        model = make("bert")
        layer = model.bert.encoder.layer[0]
        layer.requires_grad_(False)
        optimizer = build(name, model)
        if not resumes:
            train("bert", model, optimizer, 2)
        layer.requires_grad_(True)
        optimizer.add_param_group({"params": list(layer.parameters())})
        optimizer.attach(model)
        route = optimizer.routing["bert.encoder.layer.0.output.LayerNorm.weight"]
        assert (route.treatment == "preconditioned") == (name == "sgdph")
        assert not any("(added)" in row.name for row in optimizer.routing)
        if resumes:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        else:
            train("bert", model, optimizer, 2, start=2)
            saved = copy.deepcopy(model.state_dict()), through_file(optimizer.state_dict())
        train("bert", model, optimizer, 2, start=4)
        trained_weights.append(weights(model))
        optimizer.close()
    same(*trained_weights)


@each_name
def test_a_vocabulary_resized_before_the_first_step_is_still_named(name):
    """The Trainer makes the optimizer first where a script resizes late."""
    model, other = make("gpt2"), make("gpt2")
    optimizer = build(name, model)
    for each in (model, other):
        each.resize_token_embeddings(53, mean_resizing=False)
    train("gpt2", model, optimizer, 2)
    resumed = build(name, other)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for each in (optimizer, resumed):
        each.close()


# Wrappers -------------------------------------------------------------------------


class Replica(nn.parallel.DistributedDataParallel):
    """DDP around a model, without a process group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


WRAPPED = {
    "bare": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "replica": Replica,
    "compiled replica": lambda model: torch.compile(Replica(model), backend="eager"),
    "replica of a compiled one": lambda model: Replica(torch.compile(model, backend="eager")),
}


@each_name
def test_states_of_wrapped_and_bare_models_load_into_each_other(name):
    states, expected = {}, None
    for kind, wrap in WRAPPED.items():
        model = make("bert")
        optimizer = build(name, wrap(model))
        train("bert", model, optimizer, 2)  # not the wrapper: names are what matters
        states[kind] = through_file(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        optimizer.close()
    names = [states[kind][0][KEY] for kind in WRAPPED]
    assert all(own == names[0] for own in names)
    assert all("module" not in entry[0] for group in names[0]["parameters"] for entry in group)
    for kind, (state, saved) in states.items():
        target = list(WRAPPED)[(list(WRAPPED).index(kind) + 1) % len(WRAPPED)]
        model = make("bert", seed=7)
        optimizer = build(name, WRAPPED[target](model))
        model.load_state_dict(saved)
        optimizer.load_state_dict(state)
        train("bert", model, optimizer, 2, start=2)
        expected = expected or weights(model)
        same(expected, weights(model))
        optimizer.close()


def test_a_state_of_0_1_that_was_made_on_a_wrapped_model_loads():
    """0.1 wrote the wrapper's names, and none for groups that were added."""
    _, optimizer = trained("nkfac")
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    state = through_file(optimizer.state_dict())
    for group in state[KEY]["parameters"][:2]:
        for entry in group:
            entry[0] = f"_orig_mod.module.{entry[0]}"
    assert state[KEY]["parameters"][2] == [["parameter 0", [3]]]
    optimizer.load_state_dict(state)
    state[KEY]["parameters"][0][0][0] = "_orig_mod.module.bert.else"
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_state_dict(state)
    optimizer.close()


@each_name
def test_groups_without_names_load_what_named_ones_wrote(name):
    """The Trainer's own groups, whose rule is ours, and a checkpoint of 0.1."""
    model, optimizer = trained(name)
    state, saved = through_file(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train("bert", model, optimizer, 2, start=2)
    other = make("bert", seed=7)
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]}
              for g in build(name, other).param_groups]  # fmt: skip
    for attach_to in (other, None):
        other.load_state_dict(saved)
        again = type(optimizer)(groups, attach_to=attach_to, config=optimizer.config)
        again.load_state_dict(state)
        if attach_to is None:
            again.attach(other)
        assert [g["name"] for g in again.param_groups] == ["decay", "no decay"]
        train("bert", other, again, 2, start=2)
        same(weights(model), weights(other))
        again.close()
