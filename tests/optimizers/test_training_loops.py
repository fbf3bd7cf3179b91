"""What training loops do around a step, for every optimizer."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_precond.registry import create_optimizer, list_optimizers
from tests.optimizers.models import backward, batch, make, train, train_step, weights
from tests.optimizers.test_shared import QUICK, build, same, through_file

each_name = pytest.mark.parametrize("name", list_optimizers())


class Network(nn.Module):
    """A convolution, a norm and two linear layers."""

    def __init__(self):
        super().__init__()
        self.convolution, self.hidden = nn.Conv2d(3, 8, 3), nn.Linear(8, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, images):
        return self.head(self.norm(self.hidden(self.convolution(images).relu().mean((2, 3)))))


@each_name
def test_a_step_written_inside_autocast_is_the_same_step(name):
    model, twin = make("bert"), make("bert")
    optimizer, plain = build(name, model), build(name, twin)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, optimizer, batch("bert", step))
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
    train("bert", twin, plain, 5)
    same(weights(model), weights(twin))
    for each in (optimizer, plain):
        each.close()


@each_name
def test_a_rate_that_is_a_tensor_steps_weights_of_any_layout(name):
    trained = []
    for rate, layout in ((1e-3, torch.contiguous_format), (1e-3, torch.channels_last),
                         (torch.tensor(1e-3), torch.channels_last)):  # fmt: skip
        torch.manual_seed(0)
        model = Network().double().to(memory_format=layout)
        fields = QUICK[name] | ({"scope": "all_linear"} if name == "afopt" else {})
        optimizer = create_optimizer(model, name, lr=1e-3, weight_decay=0.1, **fields)
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = torch.empty_like(parameter).copy_(noise)
        optimizer.close()
        for _ in range(2):  # AdamR's first step moves no matrix
            optimizer.step()
        trained.append(weights(model))
    for other in trained[1:]:
        for key, value in trained[0].items():
            torch.testing.assert_close(value, other[key], rtol=1e-6, atol=1e-9, msg=key)


@each_name
def test_the_allocation_call_knows_a_rate_that_is_a_tensor(name):
    model = make("bert")
    optimizer = build(name, model)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.steps == 0 and optimizer.state_dict()["state"]
    optimizer.close()


@each_name
def test_hooks_see_and_change_what_is_loaded(name):
    model = make("bert", dtype=torch.bfloat16)
    optimizer = build(name, model)
    train("bert", model, optimizer, 3)
    wrapped = {"optimizer": copy.deepcopy(optimizer.state_dict())}
    for state in wrapped["optimizer"]["state"].values():
        state["mark"] = 1
    other = build(name, make("bert", dtype=torch.bfloat16))
    found = []
    other.register_load_state_dict_pre_hook(lambda _, given: given["optimizer"])
    other.register_load_state_dict_post_hook(lambda own: found.append(own.state_dict()))
    other.load_state_dict(wrapped)
    for index, state in wrapped["optimizer"]["state"].items():
        for key, value in found[0]["state"][index].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == state[key].dtype and torch.equal(value, state[key])
    assert all(state["mark"] == 1 for state in other.state.values())
    for each in (optimizer, other):
        each.close()


@each_name
def test_what_was_staged_before_a_checkpoint_is_loaded_enters_no_step(name):
    model = make("bert")
    optimizer = build(name, model)
    train("bert", model, optimizer, 2)
    state, saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train("bert", model, optimizer, 3, start=2)
    expected = weights(model)
    for given_up in (True, False):  # a Trainer clears gradients by the model
        model.load_state_dict(saved)
        optimizer.load_state_dict(state)
        model.zero_grad()
        if given_up:
            backward(model, optimizer, batch("bert", 50))
    for step in range(2, 5):
        model.zero_grad()
        backward(model, optimizer, batch("bert", step))
        optimizer.step()
    same(expected, weights(model))
    optimizer.close()


@each_name
def test_parameters_that_the_model_has_replaced_are_refused(name):
    model = make("bert")
    optimizer = build(name, model)
    train("bert", model, optimizer, 1)
    loaded = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    with pytest.raises(RuntimeError, match="in none of the parameter groups any more"):
        train_step(model, optimizer, batch("bert", 1))
    optimizer.close()


@each_name
def test_groups_may_be_changed_between_steps(name):
    trained = []
    for changed in (True, False):
        model = make("bert")
        optimizer = build(name, model)
        train("bert", model, optimizer, 2)
        query = model.bert.encoder.layer[0].attention.self.query.weight
        norm, left = model.bert.embeddings.LayerNorm.bias, model.bert.pooler.dense.bias
        kept = [parameter.detach().clone() for parameter in (query, norm)]
        if changed:  # two parameters get a group of their own, and one leaves
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if p is query or p is norm]
                group["params"] = [
                    p for p in group["params"] if p is not left and p not in set(moved)
                ]
                if moved:
                    optimizer.param_groups.append(group | {"params": moved, "lr": 0.0})
        for step in range(2, 5):
            optimizer.zero_grad()
            left.grad = None
            backward(model, optimizer, batch("bert", step))
            left.grad = None
            optimizer.step()
            if not changed:
                with torch.no_grad():
                    for parameter, value in zip((query, norm), kept, strict=True):
                        parameter.copy_(value)
        trained.append(weights(model))
        optimizer.close()
    same(*trained)


@each_name
@pytest.mark.parametrize("role", ["weight", "bias"])
def test_half_of_a_fused_layer_may_stop_training(name, role):
    model = make("gpt2")
    optimizer = build(name, model, weight_decay=0.1)
    train("gpt2", model, optimizer, 2)
    layer = model.transformer.h[0].attn.c_attn
    getattr(layer, role).requires_grad_(False)
    before = weights(model)
    train("gpt2", model, optimizer, 2, start=2)
    kept = {key for key, value in weights(model).items() if torch.equal(value, before[key])}
    assert kept == {f"transformer.h.0.attn.c_attn.{role}"}
    optimizer.close()


@pytest.mark.parametrize("source", ["gradient", "feature"])
def test_what_fresh_memory_holds_reaches_neither_steps_nor_state(source):
    # Wide enough for products of which one triangle is computed.
    trained = []
    for filled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(260, 8), nn.Linear(8, 3))
        optimizer = create_optimizer(model, "adamr", basis_source=source, basis_interval=2)
        # Fills memory with NaN that nobody has written.
        torch.use_deterministic_algorithms(filled)
        try:
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(300, 260)).square().mean().backward()
                optimizer.step()
        finally:
            torch.use_deterministic_algorithms(False)
        assert optimizer.diagnostics().get("statistics_dropped", 0) == 0
        held = [v for state in optimizer.state.values() for v in state.values()]
        assert all(v.isfinite().all() for v in held if isinstance(v, torch.Tensor) and v.dim())
        trained.append(weights(model))
        optimizer.close()
    same(*trained)


@each_name
def test_a_layer_without_weights_disturbs_nothing(name):
    """Pruned to nothing: ``nn.Linear(3, 0)``."""
    torch.manual_seed(0)
    model = Network()
    model.pruned = nn.Linear(3, 0)
    optimizer = create_optimizer(model, name, **QUICK[name])
    before = model.hidden.weight.detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        output = model(torch.randn(5, 3, 8, 8))
        loss = output.square().mean() + model.pruned(output).sum()
        if hasattr(optimizer, "probe"):
            optimizer.probe(loss)
        loss.backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(model.hidden.weight, before)
    (route,) = [r for r in optimizer.routing if r.name == "pruned.weight"]
    assert route.reason == "empty"
    optimizer.close()


@each_name
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_state_follows_a_model_that_is_converted(name, dtypes):
    """By ``model.double()`` under way, and by loading into a model of another precision."""
    before, after = (getattr(torch, dtype) for dtype in dtypes)
    model = make("bert", dtype=before)
    optimizer = build(name, model)
    train("bert", model, optimizer, 3)
    saved = through_file(optimizer.state_dict())
    other = make("bert", seed=1, dtype=after)
    loaded = build(name, other)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(saved)
    model.to(after)
    train("bert", model, optimizer, 4, start=3)
    train("bert", other, loaded, 4, start=3)
    same(weights(model), weights(other))
    for state in optimizer.state.values():
        counts = ("step", "probes")
        kept = {k: v for k, v in state.items() if torch.is_tensor(v) and not k.endswith(counts)}
        for key, value in kept.items():
            narrow = key.endswith(("_factor", "_inverse"))
            dtype = optimizer.config.factor_dtype(after) if narrow else after
            assert value.dtype == dtype or not value.is_floating_point(), key
    for each in (optimizer, loaded):
        each.close()


@each_name
@pytest.mark.parametrize("model_name", ["gpt2", "llama"])
def test_a_vocabulary_resized_under_way_is_refused(name, model_name):
    """The parameter is the same one, larger: its state would be read beyond its end."""
    model = make(model_name)
    optimizer = build(name, model)
    train(model_name, model, optimizer, 2)
    model.resize_token_embeddings(55, mean_resizing=False)
    with pytest.raises(RuntimeError, match="resize_token_embeddings"):
        train(model_name, model, optimizer, 1, start=2)
    optimizer.close()


@each_name
@pytest.mark.parametrize("path", ["classifier.weight", "bert.pooler.dense.bias",
                                  "bert.embeddings.LayerNorm.bias"])  # fmt: skip
def test_any_parameter_that_was_replaced_is_refused(name, path):
    """It would train no more, and nobody would say so."""
    model = make("bert")
    optimizer = build(name, model)
    train("bert", model, optimizer, 1)
    module, _, attribute = path.rpartition(".")
    old = model.get_parameter(path)
    setattr(model.get_submodule(module), attribute, nn.Parameter(old.detach().clone()))
    with pytest.raises(RuntimeError, match="replaced"):
        train("bert", model, optimizer, 1, start=1)
    optimizer.close()


@each_name
def test_layers_unfrozen_under_way_that_no_group_holds_are_told_of_once(name):
    model = make("bert")
    layer = model.bert.encoder.layer[0]
    layer.requires_grad_(False)
    optimizer = build(name, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train("bert", model, optimizer, 1)
    layer.requires_grad_(True)
    before = weights(layer)
    with pytest.warns(UserWarning, match=r"add_param_group.*attach"):
        train("bert", model, optimizer, 3, start=1)
    same(before, weights(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train("bert", model, optimizer, 1, start=4)
        optimizer.add_param_group({"params": list(layer.parameters())})
        optimizer.attach(model)
        train("bert", model, optimizer, 2, start=5)
    assert not any(torch.equal(value, before[key]) for key, value in weights(layer).items())
    optimizer.close()


@each_name
def test_layers_that_another_optimizer_steps_are_not_told_of(name):
    model = make("bert")
    layer = model.bert.encoder.layer[0]
    layer.requires_grad_(False)
    optimizer = build(name, model)
    layer.requires_grad_(True)
    other = torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            train_step(model, optimizer, batch("bert", step))
            other.step()
            other.zero_grad()
    optimizer.close()


@pytest.mark.parametrize("name", ["adamr", "nkfac"])
def test_weights_tied_under_way_are_refused(name):
    model = make("llama")
    optimizer = build(name, model)
    train("llama", model, optimizer, 3)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="tie_weights"):
        train("llama", model, optimizer, 1, start=3)
    optimizer.close()


@pytest.mark.parametrize("name", ["afopt", "nkfac", "sgdph"])
def test_schedules_that_cycle_the_momentum_cycle_that_of_sgd(name):
    model = make("bert")
    optimizer = build(name, model, base="sgd")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=8, base_momentum=0.7, max_momentum=0.95
    )
    found = []
    for step in range(4):
        found.append(optimizer.param_groups[0]["momentum"])
        train_step(model, optimizer, batch("bert", step))
        schedule.step()
    assert found[0] == 0.95 and min(found) < 0.75
    optimizer.close()


@pytest.mark.parametrize("fields", [{}, {"max_dim": 3}], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", ["nkfac", "afopt"])
def test_beside_a_bias_that_was_frozen_a_weight_steps_by_its_own_block(name, fields):
    """With inputs far from zero, the inverse's block is far from the inverse of the block."""
    if name == "nkfac":
        values = {"base": "sgd", "momentum": 0.0, "stat_interval": 1, "inverse_interval": 1}
    else:
        values = {"direction": "inverse", "momentum": 0.0, "stat_interval": 1, **fields}
        values |= {"inverse_interval": 1, "damping": 1e-2}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = create_optimizer(model, name, lr=1e-3, **values)
    inputs = torch.randn(40, 7).double() + 3
    for step in range(3):
        if step == 2:
            model[0].bias.requires_grad_(False)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        before, gradient = model[0].weight.detach().clone(), model[0].weight.grad
        optimizer.step()
    moved = before - model[0].weight.detach()
    rows = torch.cat([inputs, torch.ones(40, 1).double()], 1)
    if name == "nkfac":
        bound = next(p for p in optimizer.bound if p.matrix.module is model[0])
        block = optimizer.curvature(bound)
        left, right = (m + 0.01 * torch.linalg.eigvalsh(m)[-1] * torch.eye(len(m)).double()
                       for m in (block.output, block.input))  # fmt: skip
        wanted = torch.linalg.solve(left, gradient) @ torch.linalg.inv(right[:7, :7])
    else:
        moment = rows.T @ rows / 40
        shift = 1e-2 * moment.trace() / 8 * torch.eye(8).double()
        if fields:  # three diagonal blocks of three columns
            moment = torch.block_diag(moment[:3, :3], moment[3:6, 3:6], moment[6:, 6:])
        wanted = gradient @ torch.linalg.inv((moment + shift)[:7, :7])
    cosine = (moved * wanted).sum() / (moved.norm() * wanted.norm())
    assert 1 - cosine < 1e-7
    optimizer.close()
