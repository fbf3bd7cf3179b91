"""The depth of parameters: BEiT's published scheme, ELECTRA's, and what they leave open."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_precond import create_optimizer
from hf_precond.architectures.depth import layer_depths
from tests.architectures.families import TEXT, build

LAYERS = 3


def beit() -> nn.Module:
    """A BEiT of three layers with everything that its scheme names."""
    config = tf.BeitConfig(
        hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=8,
        image_size=8, patch_size=4, use_mask_token=True, use_absolute_position_embeddings=True,
        use_shared_relative_position_bias=True, out_indices=[0], num_labels=2,
    )  # fmt: skip
    return tf.BeitForImageClassification(config)


# BEiT's names of what transformers' BEiT has.
PUBLISHED = (
    ("beit.embeddings.cls_token", "cls_token"),
    ("beit.embeddings.mask_token", "mask_token"),
    ("beit.embeddings.position_embeddings", "pos_embed"),
    ("beit.embeddings.patch_embeddings", "patch_embed"),
    ("beit.encoder.relative_position_bias", "rel_pos_bias"),
    ("beit.encoder.layer", "blocks"),
    ("beit.shared_position_bias", "rel_pos_bias"),  # names of later releases
    ("beit.layers", "blocks"),
)


def published(name: str, layers: int) -> int:
    """``get_num_layer_for_vit`` of the BEiT paper's code (Bao et al., 2022), in words of its own.

    Tokens, positions and patches 0, block i: i + 1, everything else L + 1.
    """
    for ours, theirs in PUBLISHED:
        name = name.replace(ours, theirs)
    if name.split(".")[0] in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else layers + 1


def test_beit_is_as_published() -> None:
    model = beit()
    depths, top = layer_depths(model)
    assert depths == {name: published(name, LAYERS) for name, _ in model.named_parameters()}
    assert top == LAYERS + 1 and set(depths.values()) == set(range(top + 1))


@pytest.mark.parametrize("decay", [0.65, 0.9])
def test_beits_rates_are_those_of_its_scheme(decay: float) -> None:
    model = beit()
    optimizer = create_optimizer(model, "adamr", lr=2.0, layer_lr_decay=decay, weight_decay=0.1)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    undecayed = ("bias", "norm")
    for name, parameter in model.named_parameters():
        depth, group = published(name, LAYERS), found[id(parameter)]
        assert group["lr"] == pytest.approx(2.0 * decay ** (LAYERS + 1 - depth), rel=1e-12)
        decays = not any(word in name for word in undecayed)
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
        label = "decay" if decays else "no decay"
        shown = f"layer {depth} {label}" if depth <= LAYERS else label
        assert optimizer.routing[name].group == shown
    optimizer.close()


def expected(model: nn.Module, rules: dict[str, int], top: int) -> dict[str, int]:
    """The depth of the first of ``rules`` in a parameter's name, else ``top``."""
    return {
        name: next((depth for part, depth in rules.items() if part in name), top)
        for name, _ in model.named_parameters()
    }


CASES = {
    "bert": ({"embeddings": 0, "layer.0.": 1, "layer.1.": 2}, 3),
    "electra": ({"embeddings": 0, "layer.0.": 1, "layer.1.": 2}, 3),
    "distilbert": ({"embeddings": 0, "layer.0.": 1, "layer.1.": 2}, 3),
    "vit": ({"embeddings": 0, "layers.0.": 1, "layers.1.": 2}, 3),
    "gpt2": ({"wte": 0, "wpe": 0, "h.0.": 1, "h.1.": 2}, 3),
    "llama": ({"embed_tokens": 0, "layers.0.": 1, "layers.1.": 2}, 3),
    "mpnet": ({"embeddings": 0, "layer.0.": 1, "layer.1.": 2}, 3),
    "opt": ({"embed": 0, "layers.0.": 1, "layers.1.": 2}, 3),
    # A decoder lies above its encoder; its embeddings are right below its first layer.
    "t5": (
        {"shared": 0, "encoder.block.0.": 1, "encoder.final": 2, "decoder.block.0.": 2,
         "decoder.block.1.": 3}, 4,
    ),
    "bart": (
        {"shared": 0, "encoder.layers.0.": 1, "decoder.layers.0.": 2, "decoder.layers.1.": 3,
         "model.encoder": 0, "model.decoder": 1}, 4,
    ),
    "whisper": (
        {"encoder.layers.0.": 1, "decoder.layers.0.": 2, "decoder.layers.1.": 3,
         "encoder.layer_norm": 2, "decoder.layer_norm": 4, "model.encoder": 0, "model.decoder": 1},
        4,
    ),
    # Two towers side by side end at the same depth.
    "clip": (
        {"layers.0.": 1, "embeddings": 0, "pre_layrnorm": 0, "final_layer_norm": 2}, 2,
    ),
    # What joins two stages belongs to the layer before it.
    "swin": ({"embeddings": 0, "encoder.layers.0.": 1, "encoder.layers.1.": 2}, 3),
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_depths_of_a_family(family: str) -> None:
    model = build(family, torch.float32)
    rules, top = CASES[family]
    assert layer_depths(model) == (expected(model, rules, top), top)


def test_stages_count_their_layers_one_by_one() -> None:
    config = tf.ConvNextConfig(
        num_stages=2, depths=[2, 3], hidden_sizes=[4, 8], num_channels=1, num_labels=2
    )
    model = tf.ConvNextForImageClassification(config)
    depths, top = layer_depths(model)
    assert top == 6
    for name, depth in depths.items():
        for stage, below in ((0, 0), (1, 2)):
            for layer in range(config.depths[stage]):
                if f"stages.{stage}.layers.{layer}." in name:
                    assert depth == below + layer + 1, name
    assert depths["convnext.encoder.stages.1.downsampling_layer.1.weight"] == 2
    assert depths["convnext.embeddings.patch_embeddings.weight"] == 0
    assert depths["convnext.layernorm.weight"] == depths["classifier.weight"] == 6


def test_a_language_model_lies_above_its_vision_tower() -> None:
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    text = {key: value for key, value in TEXT.items() if key != "num_labels"}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision), text_config=tf.LlamaConfig(**text)
    )
    depths, top = layer_depths(tf.LlavaForConditionalGeneration(config))
    layers = config.text_config.num_hidden_layers
    assert top == 2 + layers + 1
    by_part = {
        "vision_model.embeddings": 0, "vision_tower.encoder.layers.0.": 1, "projector": top,
        "language_model.embed": 2, "language_model.layers.0.": 3, "language_model.norm": top,
        "lm_head": top,
    }  # fmt: skip
    for part, depth in by_part.items():
        found = {d for name, d in depths.items() if part in name.replace("vision_model.enc", "enc")}
        assert found <= {depth}, (part, found)
    assert {d for name, d in depths.items() if "language_model.layers.0." in name} == {3}
    assert {d for name, d in depths.items() if "encoder.layers.1." in name} == {2}


def test_adapters_are_as_deep_as_their_layers() -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    model = get_peft_model(build("bert", torch.float32), config)
    depths, top = layer_depths(model)
    trained = {name: depths[name] for name, p in model.named_parameters() if p.requires_grad}
    assert {n: d for n, d in trained.items() if "lora" in n} == {
        n: 1 + int(n.split("layer.")[1][0]) for n in trained if "lora" in n
    }
    assert {d for n, d in trained.items() if "modules_to_save" in n} == {top}


def test_wrappers_change_no_depth() -> None:
    model = build("bert", torch.float32)
    plain, top = layer_depths(model)
    wrapped, same = layer_depths(torch.compile(nn.DataParallel(model)))
    assert wrapped == {f"_orig_mod.module.{name}": depth for name, depth in plain.items()}
    assert same == top


class _Tower(nn.Module):
    """A model that is not one of transformers': a loss with weights of its own around a body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.token = nn.Embedding(5, 4)
        self.project = nn.Conv1d(4, 4, 1)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(4, 2, 4) for _ in range(2)))
        self.norm = nn.LayerNorm(4)


def test_a_model_of_ones_own() -> None:
    rules = {"token": 0, "project": 0, "blocks.0.": 1, "blocks.1.": 2}
    model = _Tower()
    assert layer_depths(model) == (expected(model, rules, 3), 3)
    outer = nn.Module()
    outer.model, outer.classifier = build("bert", torch.float32), nn.Linear(2, 2)
    depths, top = layer_depths(outer)
    assert depths["classifier.weight"] == top == 3
