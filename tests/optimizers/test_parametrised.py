"""Pruned and parametrised layers with every optimizer, before training and in the middle of it."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hf_precond.registry import list_optimizers
from tests.architectures.test_computed import Doubled
from tests.optimizers.models import batch, make, train, train_step, weights
from tests.optimizers.test_shared import build, through_file

NAMES = list_optimizers()
KINDS = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "structured": lambda layer: prune.ln_structured(layer, "weight", 0.3, 2, 0),
    "bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.3),
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "old spectral_norm": nn.utils.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
}
PRUNED = ("prune", "structured", "bias")
REPLACED = ("weight_norm", "old weight_norm")
FALLEN = ("orthogonal", "own")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def layers(model):
    """A query, a value and a layer of the MLP."""
    first, second = model.bert.encoder.layer
    return first.attention.self.query, second.attention.self.value, first.intermediate.dense


def places(model, kinds):
    """Each kind to a linear layer of its own, in the attentions where there is room."""
    found = [m for m in model.bert.encoder.modules() if isinstance(m, nn.Linear)]
    order = [0, 7, 2, 9, 4, 1, 6, 3, 8]
    return {kind: found[order[number]] for number, kind in enumerate(kinds)}


def norm(model):
    return model.bert.encoder.layer[0].output.LayerNorm


def keep_everything(layer):
    prune.identity(layer, "weight")


def unmasked(model):
    """A copy of every parameter by the name that it has without a mask."""
    return {key.removesuffix("_orig"): value for key, value in weights(model).items()}


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_every_parameter_moves(name):
    model = make("bert")
    for kind, layer in places(model, KINDS).items():
        KINDS[kind](layer)
    for layer in (model.bert.pooler.dense, norm(model), model.classifier):
        KINDS["prune"](layer)
    optimizer = build(name, model, lr=3e-3)
    optimizer.diagnostics()
    before = weights(model)
    losses = [train_step(model, optimizer, batch("bert")) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.01
    for key, value in weights(model).items():
        assert not torch.equal(value, before[key]), key
    if name in ("afopt", "muon", "nkfac"):
        matrices = {bound.matrix.module for bound in optimizer.bound}
        for kind, layer in places(model, KINDS).items():
            assert (layer in matrices) == (kind not in REPLACED + FALLEN), kind
    if name != "sgdph":
        assert all(optimizer.state[bound.weight] for bound in optimizer.bound)
    assert all(isinstance(value, float) for value in optimizer.diagnostics().values())
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_ones_changes_no_bit_from_the_start_or_from_the_middle(name):
    def masked(model):  # SGD-PH draws its vectors in the order of the norms' parameters
        return layers(model) if name == "sgdph" else (*layers(model), norm(model))

    plain, pruned, later = make("bert"), make("bert"), make("bert")
    for layer in masked(pruned):
        keep_everything(layer)
    optimizers = [build(name, model) for model in (plain, pruned, later)]
    for step in range(8):
        if step in (2, 5):  # before a step with statistics, and before one without
            for layer in masked(later):
                (keep_everything if step == 2 else lambda m: prune.remove(m, "weight"))(layer)
            optimizers[2].diagnostics()
        for model, optimizer in zip((plain, pruned, later), optimizers, strict=True):
            train("bert", model, optimizer, 1, start=step)
    for model in (pruned, later):
        for key, value in unmasked(model).items():
            assert torch.equal(value, unmasked(plain)[key]), key
    assert str(optimizers[0].diagnostics()) == str(optimizers[2].diagnostics())
    held = [len(optimizer.state_dict()["state"]) for optimizer in optimizers]
    assert len(set(held)) == 1


@pytest.mark.parametrize("name", ["afopt", "nkfac"])
def test_a_pruned_layer_is_stepped_as_one_whose_gradient_is_masked(name):
    pruned = make("bert", dtype=torch.float64)
    layer = layers(pruned)[0]
    KINDS["prune"](layer)
    mask, held = layer.weight_mask.clone(), layer.weight_orig.detach().clone()
    masked = make("bert", dtype=torch.float64)
    plain = layers(masked)[0]
    plain.weight.data.mul_(mask)
    plain.weight.register_hook(lambda gradient: gradient * mask)
    one, two = build(name, pruned, weight_decay=0.0), build(name, masked, weight_decay=0.0)
    for step in range(5):
        train("bert", pruned, one, 1, start=step)
        train("bert", masked, two, 1, start=step)
        plain.weight.data.mul_(mask)
    torch.testing.assert_close(layer.weight_orig * mask, plain.weight, rtol=1e-9, atol=1e-12)
    assert torch.equal(layer.weight_orig[mask == 0], held[mask == 0])
    for key, value in weights(pruned).items():
        if "query" not in key:
            torch.testing.assert_close(value, weights(masked)[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_parametrised_during_training_goes_on(name):
    kinds = [kind for kind in KINDS if kind not in REPLACED]
    model = make("bert")
    optimizer = build(name, model, lr=3e-3)
    train("bert", model, optimizer, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for kind, layer in places(model, kinds).items():
            KINDS[kind](layer)
        KINDS["prune"](norm(model))
        optimizer.diagnostics()
        before = weights(model)
        train("bert", model, optimizer, 4, start=3)
    for key, value in weights(model).items():
        assert not torch.equal(value, before[key]), key
    ours = [str(w.message) for w in said if "during training" in str(w.message)]
    assert len(ours) == (name in ("afopt", "muon", "nkfac")), ours
    assert all("2 matrices" in text and "is computed from it by" in text for text in ours)
    for kind, layer in places(model, PRUNED).items():
        prune.remove(layer, "bias" if kind == "bias" else "weight")
    prune.remove(norm(model), "weight")
    optimizer.diagnostics()
    train("bert", model, optimizer, 3, start=7)
    assert [route.name for route in optimizer.routing] == [n for n, _ in model.named_parameters()]
    optimizer.close()


@pytest.mark.parametrize("name", ["afopt", "muon", "nkfac"])
def test_a_model_of_which_nothing_can_be_preconditioned_any_more_trains_on(name):
    model = make("bert")
    optimizer = build(name, model)
    train("bert", model, optimizer, 2)
    said = "by the fallback optimizer from now on: .*computed from it by"
    with pytest.warns(UserWarning, match=said):
        for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            parametrizations.orthogonal(layer)
        before = weights(model)
        train("bert", model, optimizer, 3, start=2)
    assert all(not torch.equal(value, before[key]) for key, value in weights(model).items())
    assert "preconditioned" not in optimizer.routing.count()
    optimizer.diagnostics()
    through_file(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_pruned_resumes_bit_for_bit(name):
    model = make("bert")
    optimizer = build(name, model)
    train("bert", model, optimizer, 2)
    KINDS["prune"](layers(model)[0])
    train("bert", model, optimizer, 1, start=2)
    state = through_file(optimizer.state_dict())
    values = {key: value.clone() for key, value in model.state_dict().items()}
    train("bert", model, optimizer, 2, start=3)
    again = make("bert", seed=5)
    resumed = build(name, again)
    keep_everything(layers(again)[0])
    again.load_state_dict(values)
    resumed.load_state_dict(state)
    resumed.diagnostics()
    train("bert", again, resumed, 2, start=3)
    for key, value in weights(model).items():
        assert torch.equal(value, weights(again)[key]), key


@pytest.mark.parametrize(("name", "kind"), [(n, REPLACED[i % 2]) for i, n in enumerate(NAMES)])
def test_new_parameters_in_the_place_of_one_are_refused_until_they_are_in_a_group(name, kind):
    model = make("bert")
    optimizer = build(name, model)
    train("bert", model, optimizer, 1)
    layer = layers(model)[2]
    before = set(model.parameters())
    KINDS[kind](layer)
    with pytest.raises(RuntimeError, match=r"layer.0.intermediate.dense.weight.*weight_norm"):
        train("bert", model, optimizer, 1, start=1)
    optimizer.add_param_group({"params": [p for p in model.parameters() if p not in before]})
    optimizer.attach(model)
    optimizer.diagnostics()
    old = weights(model)
    train("bert", model, optimizer, 3, start=1)
    assert all(not torch.equal(value, old[key]) for key, value in weights(model).items())


IN_TORCH = {
    "prune": lambda attention: prune.l1_unstructured(attention, "in_proj_weight", 0.3),
    "bias": lambda attention: prune.l1_unstructured(attention, "in_proj_bias", 0.3),
    "spectral": lambda attention: parametrizations.spectral_norm(attention, "in_proj_weight"),
    "orthogonal": lambda attention: parametrizations.orthogonal(attention, "in_proj_weight"),
    "output": lambda attention: parametrizations.orthogonal(attention.out_proj),
}


@pytest.mark.parametrize("name", ["adamr", "afopt", "nkfac"])
def test_torchs_attention_goes_on_where_its_weights_are_computed(name):
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in IN_TORCH]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    kinds = list(IN_TORCH.values())
    for layer, change in zip(layers[:3], kinds, strict=False):
        change(layer.self_attn)
    optimizer = build(name, model)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 5, 16)).square().mean().backward()
        optimizer.step()
        optimizer.diagnostics()

    step()
    for layer, change in zip(layers[3:], kinds[3:], strict=True):
        change(layer.self_attn)
    before = weights(model)
    for _ in range(3):
        step()
    assert all(not torch.equal(value, before[key]) for key, value in weights(model).items())
