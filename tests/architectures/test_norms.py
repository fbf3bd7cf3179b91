"""Which modules are norms, and which only bear the name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import RobertaPreLayerNormConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm import (
    RobertaPreLayerNormLMHead,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_precond.architectures.norms import channel_parameters, is_norm


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
    assert [norm.name for norm, _ in channel_parameters(module)] == names


def test_what_only_bears_the_name_is_no_norm() -> None:
    config = RobertaPreLayerNormConfig(hidden_size=4, vocab_size=9)
    head = RobertaPreLayerNormLMHead(config)
    assert not is_norm(head) and not is_norm(FusedLayerNormLinear())
    assert [norm.name for norm, _ in channel_parameters(head)] == [
        "layer_norm.weight",
        "layer_norm.bias",
    ]
