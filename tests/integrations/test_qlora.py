"""LoRA over a quantised base is preconditioned as over the dense one: same routing, same step."""

import copy

import peft
import pytest
import torch
from torch import nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.computed import effective_weight
from hf_precond.integrations.arguments import own_optimizer
from tests.architectures.test_computed import Linear8
from tests.integrations.test_trainer import make
from tests.integrations.tiny import llama, text_data

NAMES = ["adamr", "afopt", "muon", "nkfac"]  # SGD-PH has nothing to do: no norm trains


def bitsandbytes_4(layer):
    bnb = pytest.importorskip("bitsandbytes")
    sizes = layer.in_features, layer.out_features
    made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def bitsandbytes_8(layer):
    bnb = pytest.importorskip("bitsandbytes")
    sizes = layer.in_features, layer.out_features
    made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def torchao_8(layer):
    quantization = pytest.importorskip("torchao.quantization")
    held = nn.Sequential(copy.deepcopy(layer))
    quantization.quantize_(held, quantization.Int8WeightOnlyConfig())
    return held[0]


def hqq_4(layer):
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
    return hqq.HQQLinear(
        copy.deepcopy(layer), config, compute_dtype=torch.float32, device="cpu", del_orig=True
    )


PACKAGES = {
    "subclass": Linear8,
    "bitsandbytes 4": bitsandbytes_4,
    "bitsandbytes 8": bitsandbytes_8,
    "torchao 8": torchao_8,
    "hqq 4": hqq_4,
}


def both(kind, targets=("q_proj", "v_proj", "o_proj", "up_proj"), **fields):
    """A model with LoRA over quantised layers, and over dense ones of the same weights."""
    dense = llama()
    for name, layer in list(dense.model.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, attribute = f"model.{name}".rpartition(".")
            setattr(dense.get_submodule(parent), attribute, PACKAGES[kind](layer))
    quantised = dense
    dense = llama()
    layers = dict(quantised.named_modules())
    for name, layer in dense.named_modules():
        if type(layer) is nn.Linear and "lm_head" not in name:
            layer.weight.data.copy_(effective_weight(layers[name]))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **fields
    )
    if kind == "bitsandbytes 4":
        quantised.is_loaded_in_4bit = True
    if kind == "bitsandbytes 8":
        quantised.is_loaded_in_8bit = True
    made = []
    for model in (quantised, dense):
        prepared = peft.prepare_model_for_kbit_training(model)
        torch.manual_seed(3)
        made.append(peft.get_peft_model(prepared, config))
    return made


def data():
    return [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in text_data()]


def adapters(model):
    return {key: p.detach().clone() for key, p in model.named_parameters() if "lora_" in key}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", PACKAGES)
def test_routing_and_steps_are_those_over_the_dense_base(name, kind, tmp_path):
    found, moved, start = [], [], []
    for number, model in enumerate(both(kind)):
        start.append(adapters(model))
        trainer = make(
            name, tmp_path / str(number), model, data(), max_steps=2, learning_rate=1e-3,
            gradient_checkpointing=True,
        )  # fmt: skip
        trainer.train()
        own = own_optimizer(trainer.optimizer)
        found.append({r.name: r for r in own.routing if "lora_" in r.name})
        after = adapters(model)
        moved.append({key: after[key] - value for key, value in start[-1].items()})
        assert all(own.state[bound.weight] for bound in own.bound)
    assert found[0] == found[1]
    assert all((start[0][key] == start[1][key]).all() for key in start[0])
    # Eight-bit layers of bitsandbytes round their inputs too. AdamR's eigenvectors of close
    # eigenvalues multiply rounding: it is compared where both layers multiply alike. Muon's sign is
    # bfloat16.
    tolerance = 0.3 if kind == "bitsandbytes 8" else 2e-2 if name == "muon" else 1e-3
    if name == "adamr" and kind != "subclass":
        return
    for key, step in moved[0].items():
        error = (step - moved[1][key]).norm() / moved[1][key].norm()
        assert error < tolerance, (key, float(error))


@pytest.mark.parametrize("kind", PACKAGES)
def test_attention_and_its_pairs_are_found_with_heads_by_the_layers_sizes(kind):
    quantised, dense = both(kind, use_dora=kind == "bitsandbytes 4")
    blocks = zip(find_attention(quantised), find_attention(dense), strict=True)
    for block, expected in blocks:
        assert block.heads == expected.heads and block.adapters.keys() == expected.adapters.keys()
        assert block.trainable == frozenset()
        for role in "qkvo":
            torch.testing.assert_close(
                block.effective(role), expected.effective(role), rtol=1e-4, atol=1e-5
            )
