"""Layers whose weight is computed: what it is, what is stepped of it, and that reading is free."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hf_precond.architectures import computed
from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.modules import find_matrices, layer_matrix
from hf_precond.architectures.parameters import ParameterSurvey
from tests.optimizers.models import make


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def quantised(layer):
    """The layer with eight bits a weight, packed: rows of W as int8 and a scale each."""
    return Linear8(layer)


class Linear8(nn.Linear):
    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (layer.weight.detach() / scale).round().to(torch.int8).flatten()[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def dense(self):
        return self.weight.view(self.out_features, self.in_features) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


KINDS = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
    "spectral": parametrizations.spectral_norm,
    "spectral, old": nn.utils.spectral_norm,
    "weight": parametrizations.weight_norm,
    "weight, old": nn.utils.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()) or layer,
    "quantised": quantised,
}
STEPPED = {"pruned": "weight_orig", "spectral": "original", "spectral, old": "weight_orig"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_is_what_the_layer_multiplies_with(kind):
    torch.manual_seed(0)
    layer = KINDS[kind](nn.Linear(5, 4))
    eye = torch.eye(5)
    outputs = layer(eye)  # the older hooks compute the weight in a forward pass
    expected = (outputs - layer.bias).mT.detach()
    before = copy.deepcopy(layer.state_dict())
    matrix = layer_matrix(layer, "fc")
    assert matrix.name == "fc" and matrix.shape == (4, 5) and matrix.bias == "bias"
    read = matrix.read()
    torch.testing.assert_close(read, torch.cat([expected, layer.bias.detach()[:, None]], 1))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert layer.training and all(module.training for module in layer.modules())
    assert matrix.trains == (kind in STEPPED)
    if matrix.trains:
        held = dict(layer.named_parameters())
        (name,) = [key for key in held if key.endswith(STEPPED[kind])]
        assert matrix.weight_parameter is held[name]
        assert [m.weight_parameter is held[name] for m in find_matrices(layer)] == [True]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_attention_is_whole_where_one_projection_is_computed(kind):
    plain = make("bert")
    model = copy.deepcopy(plain)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = KINDS[kind](attention.query)
    attention(torch.randn(2, 3, 16))
    found, expected = find_attention(model)[0], find_attention(plain)[0]
    assert found.heads == expected.heads
    for role, matrix in found.roles().items():
        assert matrix.shape == expected.roles()[role].shape
    others = {"k", "v", "o"}
    assert found.trainable == (others | {"q"} if kind in STEPPED else others)
    weight = (attention.query(torch.eye(16)) - attention.query.bias).mT.detach()
    torch.testing.assert_close(found.effective("q")[:, :-1], weight, rtol=1e-4, atol=1e-5)


def test_a_step_of_a_pruned_and_of_a_normed_weight_is_what_it_changes():
    torch.manual_seed(0)
    for kind in ("pruned", "spectral"):
        layer = KINDS[kind](nn.Linear(5, 4).double()).eval()
        matrix = layer_matrix(layer, "fc")
        step = torch.randn(4, 6, dtype=torch.float64)
        expected = step.clone()
        if kind == "pruned":
            expected[:, :5] *= layer.weight_mask
        else:  # u and v are at rest in evaluation mode: sigma is that of the weight as it is
            held = layer.parametrizations.weight.original
            expected[:, :5] *= layer.weight[0, 0].detach() / held[0, 0].detach()
        torch.testing.assert_close(computed.effective_step(matrix, step), expected)


def test_what_is_no_matrix_of_its_layer_says_so():
    layer = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.LayerNorm(4))
    prune.l1_unstructured(layer[1], "weight", 0.5)
    survey = ParameterSurvey(layer)
    assert survey.describe("0.parametrizations.weight.original") == (
        "its layer's weight is computed from it by Orthogonal"
    )
    assert survey.describe("1.weight_orig") == "scale of LayerNorm"
