"""Modules under two names, ties, adapters: what the routing table says of them is so."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.parameters import tied_names
from hf_precond.linalg.matrix_functions import unpack
from hf_precond.registry import create_optimizer, list_optimizers
from tests.optimizers.models import backward, batch, make


class Wrapped(nn.Module):
    """A model, and some of its modules under a second name."""

    def __init__(self, model, place=None, first=False):
        super().__init__()
        module = None if place is None else model.get_submodule(place)
        if module is not None and first:
            self.alias = module
        self.model = model
        if module is not None and not first:
            self.alias = module

    def forward(self, **inputs):
        return self.model(**inputs)


def _parameters(optimizer):
    named = dict(optimizer.structure.model.named_parameters())
    return [named[route.name] for route in optimizer.routing]


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("place", ["", "bert", "bert.encoder.layer.1", QUERY])
@pytest.mark.parametrize("name", list_optimizers())
def test_a_module_under_two_names_is_one_module(name, place, first):
    found = []
    for alias in (None, place):
        model = Wrapped(make("bert"), alias, first)
        optimizer = create_optimizer(model, name, lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            backward(model, optimizer, batch("bert", seed=step))
            optimizer.step()
        routes = {id(p): r for p, r in zip(_parameters(optimizer), optimizer.routing, strict=True)}
        inner = model.model.named_parameters()
        treated = {key: (routes[id(p)].treatment, routes[id(p)].reason) for key, p in inner}
        found.append((treated, [p.detach().clone() for p in model.model.parameters()]))
        optimizer.close()
    assert found[0][0] == found[1][0]
    if name != "sgdph":  # whose random probes follow the order of the parameters
        # Layers of one shape are a batch, in the order of the names: on some processors a product
        # rounds by its place there. A moment that counted twice would change steps by 1e-3.
        for one, other in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_an_attention_is_found_where_a_projection_has_another_name_before():
    model = Wrapped(make("bert"), QUERY, first=True)
    blocks = find_attention(model)
    assert len(blocks) == 2
    assert blocks[0].q.module is model.alias


def test_two_modules_with_one_parameter_are_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.alias = model[1]
    assert tied_names(model) == {"0.weight": ("1.weight",)}
    optimizer = create_optimizer(model, "nkfac")
    assert optimizer.routing["0.weight"].treatment == "adamw"
    assert optimizer.routing["0.weight"].reason == "tied to 1.weight"
    assert optimizer.routing["2.weight"].treatment == "preconditioned"


def test_a_layer_in_two_places_has_the_statistics_of_both():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(layer, nn.Tanh(), layer).double()
    optimizer, weight = create_optimizer(model, "nkfac"), layer.weight.detach().clone()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    model(inputs).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        rows = torch.cat([inputs, torch.zeros_like(inputs)])
        rows[5:] = torch.tanh(inputs @ weight.mT)
    moment = rows.mT @ rows
    found = unpack(optimizer.state[layer.weight]["input_factor"])
    torch.testing.assert_close(found, moment / moment.norm())


class TiedAttention(nn.Module):
    """An attention whose queries and keys share a weight."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(4, 4) for _ in range(4))
        self.key.weight = self.query.weight
        self.num_heads = 2

    def forward(self, x):
        heads = [part(x).unflatten(-1, (2, 2)).mT for part in (self.query, self.key, self.value)]
        return self.dense(F.scaled_dot_product_attention(*heads).mT.flatten(2))


def test_an_attention_with_a_tied_weight_is_not_called_outside_scope():
    model = nn.Sequential(TiedAttention(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="frozen or tied"):
        create_optimizer(model, "afopt", scope="query_key")
    routing = create_optimizer(model, "afopt", scope="all_linear").routing
    assert routing["0.query.weight"].reason == "tied to 0.key.weight"
    assert routing["0.value.weight"].reason == "values: its attention has a tied weight (0.query)"
    assert routing["0.dense.weight"].reason.startswith("attention output: its attention has a tied")
    assert routing["1.weight"].treatment == "preconditioned"


class Speech(nn.Module):
    """Names of parts as in speech and vision models, which are no adapters of PEFT's."""

    def __init__(self):
        super().__init__()
        self.encoder, self.adapter = nn.Linear(4, 4), nn.Linear(4, 4)
        self.adapter_layers = nn.ModuleList([nn.Linear(4, 4)])
        self.score = nn.Linear(4, 1)
        self.gate = nn.Linear(4, 1)

    def forward(self, x):
        x = self.adapter_layers[0](self.adapter(self.encoder(x)))
        return self.score(x) * self.gate(x)


@pytest.mark.filterwarnings("ignore:afopt. no attention")
@pytest.mark.parametrize("name", ["afopt", "nkfac"])
def test_a_part_named_adapter_is_a_layer_like_others(name):
    routing = create_optimizer(Speech(), name).routing
    for layer in ("encoder", "adapter", "adapter_layers.0"):
        route = routing[f"{layer}.weight"]
        assert (route.treatment, route.reason) == ("preconditioned", "linear layer")
    if name == "afopt":
        assert routing["gate.weight"].reason == "a single row or column"


def test_what_peft_adds_is_an_adapter():
    model = get_peft_model(Speech(), LoraConfig(r=2, target_modules=["adapter"]))
    routing = create_optimizer(model, "nkfac").routing
    trained = {route.name: route.reason for route in routing if route.treatment != "frozen"}
    assert trained == {
        "base_model.model.adapter.lora_A.default.weight": "adapter",
        "base_model.model.adapter.lora_B.default.weight": "adapter",
    }
