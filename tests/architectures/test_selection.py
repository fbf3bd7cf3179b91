"""What each optimizer preconditions, and a route with a reason for every parameter."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_precond.architectures.structure import ModelStructure
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.optimizer import every_matrix
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.scope import attention_matrices
from hf_precond.optimizers.muon.config import MuonConfig
from hf_precond.optimizers.muon.optimizer import hidden_matrices
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.optimizers.nkfac.optimizer import layer_matrices
from hf_precond.optimizers.sgdph.config import SGDPHConfig
from hf_precond.optimizers.sgdph.optimizer import norm_parameters
from tests.architectures.families import FAMILIES, build

SELECTIONS = {
    "adamr": (every_matrix, AdamRConfig()),
    "muon": (hidden_matrices, MuonConfig()),
    "nkfac": (layer_matrices, NKFACConfig(base="sgd")),
    "query_key": (attention_matrices, AFOptConfig(scope="query_key")),
    "attention": (attention_matrices, AFOptConfig(scope="attention")),
    "all_linear": (attention_matrices, AFOptConfig(scope="all_linear")),
    "sgdph": (norm_parameters, SGDPHConfig()),
}


def select(name: str, model: nn.Module) -> ModelStructure:
    selection, config = SELECTIONS[name]
    return selection(model, config)


def covered(structure: ModelStructure) -> set[int]:
    """Parameters that belong to a matrix or norm that was found."""
    found = {id(m.weight_parameter) for m in structure.matrices}
    found |= {id(m.bias_parameter) for m in structure.matrices if m.bias is not None}
    return found | {id(norm.parameter) for norm in structure.norms}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_one_route_that_says_what_becomes_of_it(
    name: str, selection: str
) -> None:
    model = build(name, torch.float32)
    frozen = next(model.parameters()).requires_grad_(False)
    structure = select(selection, model)
    routes = {route.name: route for route in structure.routing}
    parameters = dict(model.named_parameters())
    assert len(routes) == len(structure.routing) and list(routes) == list(parameters)
    found = covered(structure)
    base = getattr(SELECTIONS[selection][1], "base", "adamw")
    for key, parameter in parameters.items():
        expected = "preconditioned" if id(parameter) in found else base
        if not parameter.requires_grad:
            expected = "frozen"
        assert routes[key].treatment == expected, key
        assert routes[key].reason and routes[key].shape == tuple(parameter.shape)
    assert id(frozen) not in found
    assert found, "nothing is preconditioned"


def names(structure: ModelStructure) -> list[str]:
    return [matrix.name for matrix in structure.matrices]


def test_adamr_takes_whole_matrices_without_bias() -> None:
    structure = select("adamr", build("gpt2", torch.float32))
    attn = [m for m in structure.matrices if "c_attn" in m.name]
    assert [(m.shape, m.rows, m.bias) for m in attn] == [((48, 16), None, None)] * 2
    assert names(structure)[:2] == ["transformer.wte", "transformer.wpe"]


def test_adamr_leaves_single_rows_to_the_base_rule() -> None:
    routing = select("adamr", build("vit", torch.float32)).routing
    assert routing["vit.embeddings.cls_token"].treatment == "adamw"
    assert "single row" in routing["vit.embeddings.cls_token"].reason
    assert routing["classifier.weight"].treatment == "preconditioned"


def test_nkfac_joins_biases_and_takes_fused_weights_whole() -> None:
    structure = select("nkfac", build("gpt2", torch.float32))
    attn = next(m for m in structure.matrices if "c_attn" in m.name)
    assert (attn.shape, attn.bias, attn.rows) == ((48, 16), "bias", None)
    routing = structure.routing
    assert "tied to lm_head.weight" in routing["transformer.wte.weight"].reason
    assert routing["transformer.wpe.weight"].reason == "embedding"


def test_nkfac_treats_wide_layers_one_sided_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 20), nn.Linear(20, 30))
    structure = layer_matrices(model, NKFACConfig(max_dim=10))
    assert names(structure) == ["0", "1"]
    assert "one side only" in structure.routing["1.weight"].reason
    assert "max_dim=10" in structure.routing["2.weight"].reason
    with pytest.raises(ValueError, match="raise max_dim"):
        layer_matrices(model, NKFACConfig(max_dim=3))


def test_nkfac_leaves_multihead_attention_of_torch() -> None:
    routing = select("nkfac", nn.TransformerEncoderLayer(16, 4, 24)).routing
    assert routing["linear1.weight"].treatment == "preconditioned"
    assert "nn.MultiheadAttention" in routing["self_attn.out_proj.weight"].reason
    assert routing["self_attn.in_proj_weight"].treatment == "sgd"


def test_afopt_scopes() -> None:
    model = build("bert", torch.float32)
    prefix = "bert.encoder.layer.0.attention."
    inner, outer = f"{prefix}self.", f"{prefix}output.dense"
    small = names(select("query_key", model))
    middle = names(select("attention", model))
    large = names(select("all_linear", model))
    assert small[:2] == [f"{inner}query", f"{inner}key"] and len(small) == 4
    assert middle[:4] == [*small[:2], f"{inner}value", outer] and len(middle) == 8
    assert set(large) - set(middle) == {
        "bert.pooler.dense",
        *(
            f"bert.encoder.layer.{i}.{part}.dense"
            for i in (0, 1)
            for part in ("intermediate", "output")
        ),
    }
    routing = select("query_key", model).routing
    assert "outside scope=query_key" in routing[f"{inner}value.weight"].reason
    assert "output head" in select("all_linear", model).routing["classifier.weight"].reason


def test_afopt_blocks_hold_the_very_matrices() -> None:
    structure = select("all_linear", build("llama", torch.float32))
    held = {id(matrix) for matrix in structure.matrices}
    for block in structure.attention:
        assert all(id(matrix) in held for matrix in block.roles().values())
    assert len(held) == len(structure.matrices)


def test_afopt_leaves_rows_outside_its_scope_to_the_base_rule() -> None:
    structure = select("query_key", build("gpt2", torch.float32))
    assert [m.part for m in structure.matrices] == ["q", "k", "q", "k"]
    reason = structure.routing["transformer.h.0.attn.c_attn.weight"].reason
    assert reason == "queries; keys; values by the fallback optimizer"


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt-neox", "t5", "bart"])
def test_afopt_leaves_the_output_head(name: str) -> None:
    model = build(name, torch.float32)
    head = id(model.get_output_embeddings().weight)
    assert head not in covered(select("all_linear", model))


def test_afopt_leaves_the_head_of_a_plain_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 4, 24)
            self.classifier = nn.Linear(16, 3)

    found = names(select("all_linear", Net()))
    assert "classifier" not in found and "layer.linear1" in found
    assert "layer.self_attn.in_proj_weight[q]" in found


def test_afopt_with_lora() -> None:
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value", "intermediate.dense"], r=2
    )
    model = get_peft_model(build("bert", torch.float32), config)
    structure = select("query_key", model)
    assert [name.split(".")[-2:] for name in names(structure)] == [
        ["lora_A", "default"],
        ["lora_B", "default"],
    ] * 2
    assert all("query" in name for name in names(structure))
    routing = select("all_linear", model).routing
    treated = [r.name for r in routing if r.treatment == "preconditioned"]
    assert len(treated) == 12 and all("lora_" in name for name in treated)
    mlp = next(r for r in routing if "intermediate" in r.name and "lora_A" in r.name)
    assert mlp.reason == "adapter of a linear layer"


def test_sgdph_takes_norms_and_biases_if_asked() -> None:
    model = build("t5", torch.float32)
    found = [norm.name for norm in select("sgdph", model).norms]
    assert found == [n for n, _ in model.named_parameters() if "layer_norm" in n]
    vit = build("vit", torch.float32)
    vectors = [n for n, p in vit.named_parameters() if p.dim() == 1]
    with_bias = norm_parameters(vit, SGDPHConfig(include_bias=True)).norms
    assert [norm.name for norm in with_bias] == vectors
    authors = SGDPHConfig(reference=True, base="sgd", probe="ones")
    reference = norm_parameters(vit, authors).norms
    assert [norm.name for norm in reference] == vectors


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm1d(4, affine=True),
        nn.SyncBatchNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_sgdph_knows_the_norms_of_torch(layer: nn.Module) -> None:
    structure = select("sgdph", nn.Sequential(nn.Linear(4, 4), layer))
    assert [n.name for n in structure.norms] == [f"1.{n}" for n, _ in layer.named_parameters()]


def test_sgdph_takes_the_scale_of_weight_norm() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    (norm,) = select("sgdph", nn.Sequential(layer)).norms
    assert norm.name == "0.parametrizations.weight.original0"
    assert norm.parameter is layer.parametrizations.weight.original0


def test_nothing_to_precondition_says_why() -> None:
    unknown = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"no attention that it knows.*declare_attention\("):
        attention_matrices(unknown, AFOptConfig(scope="attention"))
    bert = build("bert", torch.float32)
    bert.bert.requires_grad_(False)
    with pytest.raises(ValueError, match="2 attentions, but no matrix in scope=attention trains"):
        attention_matrices(bert, AFOptConfig(scope="attention"))
    with pytest.raises(ValueError, match="include_bias=True"):
        norm_parameters(unknown, SGDPHConfig())
    with pytest.raises(ValueError, match="adamw_torch"):
        every_matrix(nn.LayerNorm(4), AdamRConfig())
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        layer_matrices(nn.Embedding(4, 4), NKFACConfig())


def test_all_linear_without_attention_warns_how_to_declare() -> None:
    with pytest.warns(UserWarning, match="declare_attention"):
        structure = select("all_linear", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert names(structure) == ["0", "1"]


def test_convolutions_are_taken_where_there_is_no_attention() -> None:
    config = tf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = tf.ResNetForImageClassification(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        structure = select("all_linear", model)
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert names(structure) == convolutions
    reasons = {row.reason for row in structure.routing if row.treatment == "preconditioned"}
    assert reasons == {"convolution, as a linear layer of its patches (the model has no attention)"}
    assert structure.routing["classifier.1.weight"].reason == "output head"


def test_grouped_convolutions_stay_with_the_fallback_optimizer() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1))
    assert names(select("all_linear", model)) == ["1"]


def test_complex_and_sparse_are_refused_by_name() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))

    with pytest.raises(ValueError, match="phase is complex"):
        every_matrix(nn.Sequential(Complex()), AdamRConfig())
    with pytest.raises(ValueError, match="sparse=False"):
        every_matrix(nn.Embedding(4, 4, sparse=True), AdamRConfig())
