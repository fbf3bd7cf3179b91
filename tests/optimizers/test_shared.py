"""What every optimizer of the registry must do, whatever its mathematics."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

from hf_precond.linalg.products import compute_dtype
from hf_precond.registry import create_optimizer, get_info, list_optimizers
from tests.optimizers.models import MODELS, backward, batch, make, train, train_step, weights

NAMES = list_optimizers()
# Short intervals, so that a few steps pass through every kind of refresh.
QUICK = {
    "afopt": {"scope": "all_linear", "stat_interval": 1, "inverse_interval": 2},
    "adamr": {"basis_interval": 2},
    "muon": {"variant": "normuon"},
    "nkfac": {"stat_interval": 1, "inverse_interval": 2},
    "sgdph": {"probe_interval": 2},
}


def build(name, model, **values):
    fields = {"lr": 1e-3, "weight_decay": 0.01} | QUICK[name] | values
    return create_optimizer(model, name, **fields)


def same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_trains(name, model_name):
    model = make(model_name)
    optimizer = build(name, model, lr=3e-3)
    losses = [train_step(model, optimizer, batch(model_name)) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.02, losses
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(isinstance(v, float) for v in optimizer.diagnostics().values())
    optimizer.close()


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_routing_names_every_parameter_once_with_a_reason(name, model_name):
    model = make(model_name)
    optimizer = build(name, model)
    routes = list(optimizer.routing)
    assert sorted(route.name for route in routes) == sorted(n for n, _ in model.named_parameters())
    assert all(route.treatment and route.reason and route.group for route in routes)
    assert all(len(line) <= 80 for line in str(optimizer.routing).splitlines())
    optimizer.close()


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_steps_what_it_preconditions_otherwise_than_its_base_rule(name, model_name):
    model, plain = make(model_name), make(model_name)
    optimizer = build(name, model, weight_decay=0.0)
    scope = [matrix.weight_parameter for matrix in optimizer.structure.matrices]
    scope += [norm.parameter for norm in optimizer.structure.norms]
    assert scope
    fallback = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        train_step(model, optimizer, batch(model_name, step))
        fallback.zero_grad()
        plain(**batch(model_name, step)).loss.backward()
        fallback.step()
    names = {id(p): n for n, p in model.named_parameters()}
    ours, theirs = weights(model), weights(plain)
    for parameter in scope:
        key = names[id(parameter)]
        assert (ours[key] - theirs[key]).abs().max() > 1e-5, key
    optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bit_equal(name, steps, dtype):
    model = make("bert", dtype=dtype)
    optimizer = build(name, model)
    train("bert", model, optimizer, steps)
    state, saved = through_file(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train("bert", model, optimizer, 4, start=steps)

    other = make("bert", seed=7, dtype=dtype)
    resumed = build(name, other)
    resumed.load_state_dict(resumed.state_dict())
    other.load_state_dict(saved)
    resumed.load_state_dict(state)
    train("bert", other, resumed, 4, start=steps)
    same(weights(model), weights(other))


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trips_bit_for_bit_with_its_own_dtypes(name):
    model = make("gpt2", dtype=torch.bfloat16)
    optimizer = build(name, model)
    train("gpt2", model, optimizer, 3)
    before = optimizer.state_dict()
    optimizer.load_state_dict(through_file(before))
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, state in before["state"].items():
        assert state.keys() == after["state"][index].keys()
        for key, value in state.items():
            assert isinstance(value, torch.Tensor | int | float), key
            if isinstance(value, torch.Tensor):
                assert value.dtype == after["state"][index][key].dtype, key
                assert torch.equal(value, after["state"][index][key]), key
                if value.is_floating_point():
                    kept = compute_dtype(torch.bfloat16)
                    if key.endswith(("_factor", "_inverse")):
                        kept = optimizer.config.factor_dtype(torch.bfloat16)
                    assert value.dtype == kept, key


@pytest.mark.parametrize("name", NAMES)
def test_a_deep_copy_has_no_hooks_until_attached_and_then_steps_alike(name):
    model = make("bert")
    optimizer = build(name, model)
    train("bert", model, optimizer, 2)
    twin, copied = copy.deepcopy((model, optimizer))
    staged_before = copy.deepcopy(optimizer.state_dict())
    twin(**batch("bert")).loss.backward()
    twin.zero_grad()
    optimizer.zero_grad()
    assert str(staged_before["param_groups"]) == str(optimizer.state_dict()["param_groups"])
    copied.attach(twin)
    train("bert", model, optimizer, 3, start=2)
    train("bert", twin, copied, 3, start=2)
    same(weights(model), weights(twin))
    optimizer.close()
    copied.close()


@pytest.mark.parametrize("name", NAMES)
def test_close_removes_every_hook(name):
    model = make("bert")
    assert hooks(model) == 0
    optimizer = build(name, model)
    train("bert", model, optimizer, 1)
    optimizer.close()
    assert hooks(model) == 0
    optimizer.close()


@pytest.mark.parametrize("model_name", ["bert", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_the_allocation_call_allocates_everything_and_advances_nothing(name, model_name):
    model, other = make(model_name), make(model_name)
    allocated, stepped = build(name, model), build(name, other)
    before = weights(model)
    rates = [group["lr"] for group in allocated.param_groups]
    for group in allocated.param_groups:
        group["lr"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    allocated.step()
    for group, rate in zip(allocated.param_groups, rates, strict=True):
        group["lr"] = rate
    allocated.zero_grad()
    same(before, weights(model))

    fresh = copy.deepcopy(allocated.state_dict())
    train(model_name, other, stepped, 1)
    used = stepped.state_dict()
    assert [g["step"] for g in fresh["param_groups"]] == [0] * len(fresh["param_groups"])
    assert fresh["state"].keys() == used["state"].keys()
    for index, state in used["state"].items():
        assert fresh["state"][index].keys() == state.keys(), index
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert fresh["state"][index][key].shape == value.shape, key

    train(model_name, model, allocated, 1)
    same(weights(model), weights(other))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_stay(name):
    model = make("bert")
    optimizer = build(name, model, weight_decay=0.1)
    unused = model.bert.embeddings.token_type_embeddings.weight
    query = model.bert.encoder.layer[0].attention.self.query.weight
    norm = model.bert.encoder.layer[1].output.LayerNorm.weight
    before = [p.detach().clone() for p in (unused, query, norm)]
    for step in range(3):
        optimizer.zero_grad()
        backward(model, optimizer, batch("bert", step))
        for parameter in (unused, query, norm):
            parameter.grad = None
        optimizer.step()
    for old, parameter in zip(before, (unused, query, norm), strict=True):
        assert torch.equal(old, parameter)
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay_and_the_rest_trains(name):
    model = make("bert")
    for layer in (model.bert.embeddings, model.bert.encoder.layer[0]):
        layer.requires_grad_(False)
    model.bert.encoder.layer[1].attention.self.key.bias.requires_grad_(False)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = build(name, model)
    before = weights(model)
    train("bert", model, optimizer, 3)
    after = weights(model)
    for key in before:
        assert torch.equal(before[key], after[key]) == (key in frozen), key
    assert {route.name for route in optimizer.routing if route.treatment == "frozen"} == frozen
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_lr_comes_from_the_groups(name):
    model = make("bert")
    optimizer = build(name, model)
    train("bert", model, optimizer, 1)
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train("bert", model, optimizer, 2, start=1)
    same(before, weights(model))
    assert optimizer.steps == 3
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_head_has_its_own_rate_and_groups_follow_the_decay_rule(name):
    model = make("bert")
    optimizer = build(name, model, lr=1e-3, weight_decay=0.1, head_lr_scale=5.0)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for key, parameter in model.named_parameters():
        rate = 5e-3 if key.startswith("classifier") else 1e-3
        decays = not ("bias" in key or "LayerNorm" in key)
        assert found[id(parameter)] == (pytest.approx(rate), 0.1 if decays else 0.0), key
        assert ("head" in optimizer.routing[key].group) == key.startswith("classifier")
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_closure_is_called_with_grad_enabled_and_its_loss_returned(name):
    model = make("bert")
    optimizer = build(name, model)

    def closure():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        return backward(model, optimizer, batch("bert"))

    losses = [optimizer.step(closure) for _ in range(6)]
    assert losses[-1] < losses[0]
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_accumulation_equals_one_batch(name):
    # Equal lengths, so that the mean of the halves is the mean of the whole; and more images than
    # any layer is wide, since the eigenbasis of a null space would be left to rounding. AdamR's
    # eigenvectors of close eigenvalues multiply rounding by 1e5 a step: it is compared earlier.
    whole = batch("vit", size=48)
    halves = [{k: v[i * 24 : i * 24 + 24] for k, v in whole.items()} for i in range(2)]
    one, two = make("vit", dtype=torch.float64), make("vit", dtype=torch.float64)
    first, second = build(name, one), build(name, two)
    for _ in range(2 if name == "adamr" else 4):
        train_step(one, first, {**whole, "pixel_values": whole["pixel_values"].double()})
        second.zero_grad()
        for half in halves:
            half = {**half, "pixel_values": half["pixel_values"].double()}
            backward(two, second, half, scale=0.5)
        second.step()
    for key, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[key], rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_added_groups_are_stepped_and_listed(name):
    model = make("bert")
    optimizer = build(name, model)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    optimizer.zero_grad()
    backward(model, optimizer, batch("bert"))
    extra.grad = torch.ones(3)
    optimizer.step()
    assert (extra < 1).all()
    assert any("(added)" in route.name for route in optimizer.routing)
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients_and_complex_parameters_are_refused(name):
    values = {"scope": "all_linear"} if name == "afopt" else {}
    sparse = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="sparse"):
        create_optimizer(sparse, name, **values)

    model = make("bert")
    optimizer = build(name, model)
    backward(model, optimizer, batch("bert"))
    table = model.bert.embeddings.word_embeddings.weight
    table.grad = table.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    optimizer.close()

    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex"):
        create_optimizer(model, name, **values)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_nothing_to_precondition_is_refused_with_the_reason(name):
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"nothing|no "):
        create_optimizer(model, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_by_position_leads_to_the_right_call(name):
    parameters = list(make("bert").parameters())
    kind = get_info(name).optimizer_cls
    with pytest.raises(TypeError, match=rf"create_optimizer\(model, '{name}'"):
        kind(parameters, 1e-3)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'nkfac'"):
        create_optimizer(make("bert"), "nkfca")


@pytest.mark.parametrize("name", NAMES)
def test_config_can_be_passed_whole(name):
    config = get_info(name).config_cls(lr=0.02)
    optimizer = create_optimizer(make("bert"), config, weight_decay=0.5)
    assert optimizer.config == config.replace(weight_decay=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.02
    optimizer.close()


@pytest.mark.parametrize(
    ("name", "fields"),
    [*((name, {}) for name in NAMES), ("afopt", {"base": "adamr"}), ("nkfac", {"base": "adamr"}),
     ("adamr", {"basis_source": "feature"})],
    ids=str,
)  # fmt: skip
def test_a_dropped_optimizer_is_freed_at_once(name, fields):
    """Without the garbage collector: until then its hooks would stay in the model."""
    model = make("bert")
    optimizer = create_optimizer(model, name, **fields)
    train_step(model, optimizer, batch("bert"))
    dropped = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert dropped() is None
    finally:
        gc.enable()
