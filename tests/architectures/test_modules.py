"""Every weight is found once, as the matrix its layer multiplies with; which modules are norms."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, RobertaPreLayerNormConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm import (
    RobertaPreLayerNormLMHead,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from hf_precond.architectures.modules import (
    find_matrices,
    find_norms,
    is_linear,
    is_norm,
    is_readable,
    layer_matrix,
    refusal,
)
from hf_precond.architectures.parameters import tied_names
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.optimizer import every_matrix
from tests.architectures.families import FAMILIES, build


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_two_dimensions_is_one_matrix(name: str) -> None:
    model = build(name, torch.float32)
    found = [id(matrix.weight_parameter) for matrix in find_matrices(model)]
    wanted = [id(p) for p in model.parameters() if p.dim() >= 2 and p.requires_grad]
    assert sorted(found) == sorted(wanted)


def test_a_linear_layer_computes_with_its_matrix() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64)
    ones = torch.cat([x, torch.ones(3, 1, dtype=torch.float64)], dim=1)
    for layer in (nn.Linear(4, 5).double(), Conv1D(5, 4).double()):
        nn.init.normal_(layer.bias)
        (matrix,) = find_matrices(layer)
        assert matrix.shape == (5, 4) and matrix.columns == 5
        torch.testing.assert_close(ones @ matrix.read().T, layer(x))


def test_subclasses_of_linear_are_linear_layers() -> None:
    class Scaled(nn.Linear):
        pass

    (matrix,) = find_matrices(Scaled(3, 2))
    assert matrix.bias == "bias" and is_linear(matrix.module)


def test_frozen_parts_are_left_out() -> None:
    frozen_bias, frozen_weight = nn.Linear(3, 2), nn.Linear(3, 2)
    frozen_bias.bias.requires_grad_(False)
    frozen_weight.weight.requires_grad_(False)
    (matrix,) = find_matrices(nn.Sequential(frozen_bias, frozen_weight))
    assert (matrix.name, matrix.bias, matrix.columns) == ("0", None, 3)
    both = [layer_matrix(frozen_bias, "0"), layer_matrix(frozen_weight, "1")]
    assert [m.bias for m in both] == [None, "bias"]


def test_convolutions_keep_their_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv1d(6, 6, 5, groups=6, bias=False))
    dense, depthwise = find_matrices(model)
    assert (dense.shape, dense.columns, dense.groups) == ((8, 36), 37, 1)
    assert (depthwise.shape, depthwise.columns, depthwise.groups) == ((6, 5), 5, 6)


def test_tied_weights_come_once_and_are_known() -> None:
    model = build("gpt2", torch.float32)
    names = [matrix.name for matrix in find_matrices(model)]
    assert "transformer.wte" in names and "lm_head" not in names
    assert tied_names(model) == {"transformer.wte.weight": ("lm_head.weight",)}


def test_a_bias_of_several_layers_is_joined_to_none() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].bias = model[0].bias
    model.append(model[1])  # one layer called twice is no second owner
    model.register_parameter("tied", model[1].bias)  # nor is what is no layer
    assert [matrix.bias for matrix in find_matrices(model)] == [None, "bias", None]


def test_lora_leaves_are_found_and_the_base_is_not() -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    names = [m.name for m in find_matrices(get_peft_model(build("bert", torch.float32), config))]
    assert len([name for name in names if "lora_A" in name or "lora_B" in name]) == 8
    assert [name for name in names if "lora" not in name] == [
        "base_model.model.classifier.modules_to_save.default"
    ]


def test_other_parameters_are_read_as_first_by_rest() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.Parameter(torch.randn(4, 3, 2))
            self.scale = nn.Parameter(torch.ones(3))

    (matrix,) = find_matrices(nn.Sequential(Experts()))
    assert (matrix.name, matrix.shape, matrix.bias) == ("0.kernels", (4, 6), None)


def test_what_is_not_a_dense_real_matrix_is_refused_with_a_reason() -> None:
    assert refusal(torch.zeros(2, 2, dtype=torch.complex64)) == "complex numbers"
    assert refusal(torch.zeros(2, 2, dtype=torch.int8)) == "quantised"
    assert refusal(torch.zeros(2, 2).to_sparse()) == "sparse"
    assert refusal(torch.zeros(2, 2)) is None
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert not is_readable(packed)
    packed.weight = nn.Parameter(torch.zeros(8, 2))
    assert not is_readable(packed)


def test_weights_of_experts_are_stacks_and_their_biases_none_for_adamr() -> None:
    config = GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    stacks = {m.weight: tuple(m.weight_parameter.shape) for m in find_matrices(model) if m.stacked}
    assert stacks == {"gate_up_proj": (4, 16, 24), "down_proj": (4, 12, 16)}
    routing = every_matrix(model, AdamRConfig()).routing
    assert routing["model.layers.0.mlp.experts.gate_up_proj"].treatment == "preconditioned"
    bias = routing["model.layers.0.mlp.experts.gate_up_proj_bias"]
    assert bias.treatment == "adamw" and bias.reason == "bias"

    # The position table of a vision model is no stack, nor is a convolution of as many channels.
    others = nn.Module()
    others.table = nn.Parameter(torch.zeros(1, 5, 4))
    others.convolution = nn.Conv1d(6, 6, 3)
    others.convolution.num_experts = 7
    assert not any(matrix.stacked for matrix in find_matrices(others))


class Conditional(nn.LayerNorm):
    """A norm with more in it than torch's."""

    def __init__(self) -> None:
        super().__init__((2, 3), bias=False)
        self.mix = nn.Linear(3, 3)


class GatedRMSNorm(nn.Module):
    """Called a norm: a scale, and an activation without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.ones(3)), nn.SiLU()


class FusedLayerNormLinear(nn.Module):
    """A norm and a matrix in one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.LayerNorm((2, 3)), ["weight", "bias"]),
        (nn.LayerNorm(3, bias=False), ["weight"]),
        (nn.LayerNorm(3, elementwise_affine=False), []),
        (nn.RMSNorm(3), ["weight"]),
        (nn.GroupNorm(1, 3), ["weight", "bias"]),
        (nn.BatchNorm2d(3, affine=False), []),
        (nn.SyncBatchNorm(3), ["weight", "bias"]),
        (nn.InstanceNorm1d(3, affine=True), ["weight", "bias"]),
        (LlamaRMSNorm(3), ["weight"]),
        (T5LayerNorm(3), ["weight"]),
        (Conditional(), ["weight"]),
        (GatedRMSNorm(), ["weight"]),
    ],
)
def test_a_norms_own_parameters_are_channel_wise(module: nn.Module, names: list[str]) -> None:
    assert is_norm(module)
    assert [norm.name for norm in find_norms(module)] == names


def test_what_only_bears_the_name_is_no_norm() -> None:
    config = RobertaPreLayerNormConfig(hidden_size=4, vocab_size=9)
    head = RobertaPreLayerNormLMHead(config)
    assert not is_norm(head) and not is_norm(FusedLayerNormLinear())
    assert [norm.name for norm in find_norms(head)] == [
        "layer_norm.weight",
        "layer_norm.bias",
    ]
