"""Groups of the user's own, and classes called as torch's are, for every registered optimizer."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_precond.registry import create_optimizer, get_info, list_optimizers
from tests.optimizers.models import backward, batch, make, train, weights
from tests.optimizers.test_shared import QUICK, hooks, same, through_file

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)


def fields(name, **values):
    return {"lr": 1e-3, "weight_decay": 0.01} | QUICK[name] | values


def apart(model, **values):
    """Weights and biases of a BERT in different groups, and one group without a matrix."""
    named = list(model.named_parameters())
    norms = [p for n, p in named if "LayerNorm" in n]
    biases = [p for n, p in named if n.endswith("bias") and "LayerNorm" not in n]
    taken = {id(p) for p in (*norms, *biases)}
    matrices = [p for _, p in named if id(p) not in taken]
    return [
        {"params": matrices, "lr": 2e-3, "weight_decay": 0.1} | values,
        {"params": biases, "lr": 5e-4, "weight_decay": 0.0},
        {"params": norms, "weight_decay": 0.0},
    ]


@each_name
def test_groups_of_ones_own_are_stepped_as_ours_at_the_same_settings(name):
    """Only rates and decay come from the groups, whatever their number and order."""
    one, two = make("bert"), make("bert")
    ours = create_optimizer(one, name, **fields(name))
    named = dict(two.named_parameters())
    decays = {n for g in ours.param_groups if g["weight_decay"] for n, p in one.named_parameters()
              if any(p is q for q in g["params"])}  # fmt: skip
    groups = [
        {"params": [(n, p) for n, p in named.items() if n not in decays], "weight_decay": 0.0},
        {"params": [(n, p) for n, p in named.items() if n in decays and "bert" not in n]},
        {"params": [(n, p) for n, p in named.items() if n in decays and "bert" in n]},
    ]
    theirs = create_optimizer(two, name, params=groups, **fields(name))
    train("bert", one, ours, 4)
    train("bert", two, theirs, 4)
    for key, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[key], rtol=1e-4, atol=1e-6, msg=key)
    for each in (ours, theirs):
        each.close()


@each_name
def test_each_group_has_its_own_rate_and_decay(name):
    """A group at rate 0 stands still, one at a rate alone moves, joined biases too."""
    for still in range(3):
        model = make("bert")
        groups = apart(model)
        for number, group in enumerate(groups):
            group["lr"] = 0.0 if number == still else 1e-3
        optimizer = create_optimizer(model, name, params=groups, **fields(name))
        held = {id(p): n for n, g in enumerate(optimizer.param_groups) for p in g["params"]}
        before = weights(model)
        train("bert", model, optimizer, 2)
        for key, parameter in model.named_parameters():
            moved = not torch.equal(before[key], parameter)
            assert moved == (held[id(parameter)] != still), key
        optimizer.close()


@each_name
def test_the_routing_says_which_group_holds_what(name):
    model, loss = make("bert"), nn.Linear(3, 3)
    body, query = model.bert.encoder, model.bert.encoder.layer[0].attention.self.query
    groups = [
        {"params": [p for p in body.parameters() if p is not query.weight], "name": "body"},
        {"params": loss.parameters(), "lr": 0.1},
    ]
    optimizer = create_optimizer(model, name, params=groups, **fields(name))
    routing = optimizer.routing
    path = "bert.encoder.layer.0.attention.self"
    assert routing[f"{path}.key.weight"].group == "body"
    left = routing[f"{path}.query.weight"]
    assert left.treatment == "not stepped" and "in no parameter group" in left.reason
    outside = routing["(outside) group 1, parameter 0"]
    assert (outside.reason, outside.group) == ("outside the model", "group 1")
    assert outside.shape == (3, 3) and outside.treatment != "preconditioned"
    assert all(bound.weight is not query.weight for bound in optimizer.bound)
    stepped = [route for route in routing if route.treatment != "not stepped"]
    assert len(stepped) == len(list(body.parameters())) - 1 + 2
    assert all(len(line) <= 80 for line in str(routing).splitlines())
    optimizer.close()


@each_name
def test_what_is_in_no_group_stays_and_is_said_once(name):
    model = make("bert")
    left = model.bert.encoder.layer[1].attention.self.value.weight
    groups = [p for p in model.parameters() if p is not left]
    optimizer = create_optimizer(model, name, params=groups, **fields(name))
    before = left.detach().clone()
    with pytest.warns(UserWarning, match=r"1 parameters of the model \(.*value\.weight.*none of"):
        train("bert", model, optimizer, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train("bert", model, optimizer, 3, start=4)
    assert torch.equal(before, left)
    optimizer.close()


@each_name
def test_nothing_is_said_where_another_optimizer_steps_the_rest(name):
    model = make("bert")
    head = list(model.classifier.parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizer, other = (
        create_optimizer(model, name, params=body, **fields(name)), torch.optim.SGD(head, lr=0.1)
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in range(4):
            other.zero_grad()
            train("bert", model, optimizer, 1, start=step)
            other.step()
    optimizer.close()


@each_name
def test_parameters_outside_the_model_are_stepped_and_resumed(name):
    def run(steps, start=0, saved=None):
        model, loss = make("bert"), nn.Linear(3, 3)
        nn.init.eye_(loss.weight)
        whole = nn.ModuleList([model, loss])
        params = [*model.parameters(), *loss.parameters()]
        optimizer = create_optimizer(model, name, params=params, **fields(name))
        if saved is not None:
            whole.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for step in range(start, start + steps):
            optimizer.zero_grad()
            inputs = batch("bert", step)
            labels = inputs.pop("labels")
            context = getattr(optimizer, "curvature_context", torch.enable_grad)
            with context():
                value = nn.functional.cross_entropy(loss(model(**inputs).logits), labels)
                if hasattr(optimizer, "probe"):
                    optimizer.probe(value)
                value.backward()
            optimizer.step()
        optimizer.close()
        return whole, optimizer

    whole, _ = run(4)
    half, optimizer = run(2)
    state = through_file(optimizer.state_dict())
    resumed, _ = run(2, 2, (half.state_dict(), state))
    same(weights(whole), weights(resumed))
    assert not torch.equal(whole[1].weight, torch.eye(3))


# What may stand in a group ---------------------------------------------------------


@each_name
@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"state_dtype": "float64"}, "state_dtype in a parameter group.*for all groups alike"),
        ({"layer_lr_decay": 0.5}, "layer_lr_decay in a parameter group"),
        ({"lr": -1.0}, r"lr=-1.0: .* takes a number in \[0"),
        ({"weight_decay": "much"}, "weight_decay='much'"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"beta1": 0.5}, "^beta1 in a parameter group: .* did you mean 'betas'"),
        ({"learning_rate": 0.5}, "^learning_rate in a parameter group: .* did you mean 'lr'"),
        ({"maximize": True}, "^maximize=True in a parameter group: .* negate the loss"),
        ({"amsgrad": True}, "^amsgrad=True in a parameter group: "),
    ],
)
def test_what_a_group_cannot_say_is_refused(name, group, said):
    model = make("bert")
    if "group" not in said and not hasattr(get_info(name).config_cls, next(iter(group))):
        pytest.skip("no such field")
    with pytest.raises(ValueError, match=said):
        create_optimizer(model, name, params=[{"params": model.parameters()} | group])
    optimizer = create_optimizer(model, name, **fields(name))
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=said):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]} | group)
    assert len(optimizer.param_groups) == groups
    optimizer.close()


@each_name
@pytest.mark.parametrize(
    ("key", "near"), [("lrr", "lr"), ("weightdecay", "weight_decay"), ("beta", "betas")]
)
def test_a_key_that_resembles_a_field_is_warned_of(name, key, near):
    model = make("bert")
    groups = [{"params": model.parameters(), key: 0.5}]
    with pytest.warns(UserWarning, match=f"^{key} in a parameter group: .* mean '{near}'"):
        get_info(name).optimizer_cls(groups)


@each_name
def test_keys_of_scripts_schedules_and_other_optimizers_are_let_be(name):
    model = make("bert")
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9)
    groups = [group | {"layer": 3, "use_muon": True} for group in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_info(name).optimizer_cls(groups)


@each_name
def test_names_relative_to_a_part_of_the_model_load_before_attach(name):
    def made(model):
        parts = [{"params": part.named_parameters()} for part in (model.bert, model.classifier)]
        return get_info(name).optimizer_cls(parts, **fields(name))

    model, twin = make("bert"), make("bert")
    first, second = made(model), made(twin)
    first.attach(model)
    train("bert", model, first, 2)
    second.load_state_dict(through_file(first.state_dict()))
    second.attach(twin)
    twin.load_state_dict(model.state_dict())
    train("bert", model, first, 2, start=2)
    train("bert", twin, second, 2, start=2)
    same(weights(model), weights(twin))


@each_name
def test_a_parameter_given_twice_is_refused(name):
    model = make("bert")
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match="more than one parameter group"):
        create_optimizer(model, name, params=[{"params": parameters}, {"params": parameters[:1]}])
    with (
        pytest.raises(ValueError, match="stands twice in a parameter group"),
        pytest.warns(UserWarning, match="duplicate"),
    ):
        create_optimizer(model, name, params=[*parameters, parameters[0]])


@each_name
def test_groups_without_anything_to_precondition_are_refused(name):
    model = make("bert")
    with pytest.raises(ValueError, match=f"none of the matrices that {name} would pre"):
        create_optimizer(model, name, params=[model.classifier.bias])


# The class itself ------------------------------------------------------------------


def ways(model, kind, values):
    """The calls that trainers make."""
    yield lambda: kind(model.parameters(), **values)
    yield lambda: kind(params=[{"params": list(model.parameters())}], **values)
    yield lambda: kind(optimizer_dict=[{"params": model.parameters()}], **values)
    yield lambda: kind(model.named_parameters(), **values)
    yield lambda: kind(list(model.parameters()), config=kind_config(kind)(**values))


def kind_config(kind):
    return get_info(kind.registered_name).config_cls.create


@each_name
@pytest.mark.parametrize("way", range(5))
def test_the_class_is_called_as_torchs_and_attached_later(name, way):
    model, twin = make("bert"), make("bert")
    kind = get_info(name).optimizer_cls
    optimizer = list(ways(model, kind, fields(name)))[way]()
    assert isinstance(optimizer, torch.optim.Optimizer) and not optimizer.attached
    assert hooks(model) == 0 and not any(optimizer.diagnostics().values())
    assert {route.reason for route in optimizer.routing} == {"no model is attached yet"}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert optimizer.param_groups[0]["lr"] == 5e-4
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    said = rf"^{name}: step\(\) before .*optimizer.attach\(model\)"
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    optimizer.attach(model)
    schedule.step()
    other = create_optimizer(twin, name, params=twin.parameters(), **fields(name, lr=5e-4))
    optimizer.zero_grad()
    train("bert", model, optimizer, 3)
    train("bert", twin, other, 3)
    same(weights(model), weights(twin))
    assert str(optimizer.routing).count("preconditioned") == str(other.routing).count(
        "preconditioned"
    )
    for each in (optimizer, other):
        each.close()


@each_name
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_state_is_loaded_before_or_after_attach(name, when):
    model = make("bert")
    kind = get_info(name).optimizer_cls
    first = kind(apart(model), attach_to=model, **fields(name))
    train("bert", model, first, 2)
    state, saved = through_file(first.state_dict()), copy.deepcopy(model.state_dict())
    train("bert", model, first, 3, start=2)
    twin = make("bert", seed=7)
    second = kind(apart(twin), **fields(name))
    second.load_state_dict(second.state_dict())  # as accelerate's prepare does
    if when == "after":
        second.attach(twin)
    second.load_state_dict(state)
    second.attach(twin)
    twin.load_state_dict(saved)
    train("bert", twin, second, 3, start=2)
    same(weights(model), weights(twin))
    for each in (first, second):
        each.close()


@each_name
def test_a_state_of_another_model_is_refused_at_the_latest_by_attach(name):
    model, twin = make("bert"), make("bert")
    kind = get_info(name).optimizer_cls
    first = kind(model.parameters(), attach_to=model, **fields(name))
    train("bert", model, first, 1)
    state = first.state_dict()
    twin.bert.embeddings.LayerNorm, twin.other = nn.Module(), twin.bert.embeddings.LayerNorm
    params = [dict(twin.named_parameters()).get(n) for n, _ in model.named_parameters()]
    params = [
        p if p is not None else getattr(twin.other, n.rsplit(".")[-1])
        for p, (n, _) in zip(params, model.named_parameters(), strict=True)
    ]
    second = kind(params, **fields(name))
    second.load_state_dict(state)
    with pytest.raises(ValueError, match=r"another model.*LayerNorm\.\w+ .*missing here"):
        second.attach(twin)
    with pytest.raises(ValueError, match="another model"):
        kind(params[:-1], **fields(name)).load_state_dict(state)
    first.close()


@each_name
@pytest.mark.parametrize("field", ["head_lr_scale", "layer_lr_decay"])
def test_rates_that_need_the_model_are_refused_without_it(name, field):
    model = make("bert")
    kind = get_info(name).optimizer_cls
    with pytest.raises(ValueError, match=rf"^{field}=0.5: .*create_optimizer\(model, '{name}'"):
        kind(model.parameters(), **{field: 0.5})
    optimizer = kind(model.parameters(), attach_to=model, **{field: 0.5})
    assert len({group["lr"] for group in optimizer.param_groups}) == (2 if "head" in field else 4)
    optimizer.close()


@each_name
def test_a_copy_of_an_optimizer_without_a_model_is_attached_to_its_own(name):
    model = make("bert")
    optimizer = get_info(name).optimizer_cls(model.parameters(), **fields(name))
    twin, copied = copy.deepcopy((model, optimizer))
    for one, other in ((model, optimizer), (twin, copied)):
        other.attach(one)
        train("bert", one, other, 2)
        other.close()
    same(weights(model), weights(twin))


@each_name
def test_two_models_have_an_optimizer_each(name):
    """As the generator and the critic of a GAN: what one collects never reaches the other."""
    alone, first, second = make("bert"), make("bert"), make("bert", seed=5)
    kind = get_info(name).optimizer_cls
    optimizers = [kind(m.parameters(), **fields(name)) for m in (alone, first, second)]
    for m, optimizer in zip((alone, first, second), optimizers, strict=True):
        optimizer.attach(m)
    for step in range(3):
        train("bert", alone, optimizers[0], 1, start=step)
        for optimizer in optimizers[1:]:
            optimizer.zero_grad()
        backward(second, optimizers[2], batch("bert", 50 + step))
        backward(first, optimizers[1], batch("bert", step))
        for optimizer in optimizers[1:]:
            optimizer.step()
    same(weights(alone), weights(first))
    for optimizer in optimizers:
        optimizer.close()


@each_name
def test_the_class_refuses_what_is_not_its_own(name):
    kind = get_info(name).optimizer_cls
    with pytest.raises(ValueError, match=f"dampin: {name} has no such field"):
        kind(make("bert").parameters(), dampin=1.0)
    with pytest.raises(TypeError, match=r"params is a Bert.*pass parameters"):
        kind(make("bert"))
    with pytest.raises(ValueError, match="params is empty"):
        kind()
    other = get_info(next(n for n in NAMES if n != name)).config_cls()
    with pytest.raises(TypeError, match=f"config is a {type(other).__name__}, which is another"):
        kind(make("bert").parameters(), config=other)
