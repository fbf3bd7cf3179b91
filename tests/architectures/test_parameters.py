"""Which parameters are a new head."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_precond.architectures.parameters import find_head
from tests.architectures.families import TEXT, build

HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{a}.{b}" for a in ("dense", "out_proj") for b in ("weight", "bias")},
    "vit": {"classifier.weight", "classifier.bias"},
    "modernbert": {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"},
    "gpt2": set(),
    "llama": set(),
    "t5": set(),
    "bart": set(),
    "clip": set(),
}


@pytest.mark.parametrize("name", HEADS)
def test_head_of_a_family(name: str) -> None:
    assert find_head(build(name, torch.float32)) == HEADS[name]


def test_heads_of_other_tasks() -> None:
    llama = tf.LlamaForSequenceClassification(tf.LlamaConfig(**TEXT, num_labels=3))
    assert find_head(llama) == {"score.weight"}
    reader = tf.BertForQuestionAnswering(tf.BertConfig(**TEXT))
    assert find_head(reader) == {"qa_outputs.weight", "qa_outputs.bias"}
    assert find_head(tf.BertForMaskedLM(tf.BertConfig(**TEXT))) == set()
    assert find_head(nn.Sequential(nn.Linear(2, 2))) == set()


def test_heads_of_models_whose_prefix_names_no_child() -> None:
    image = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    image |= {"intermediate_size": 8, "image_size": 8, "patch_size": 4}
    for name in ("CLIP", "Siglip", "Siglip2", "MetaClip2"):
        config = getattr(tf, f"{name}Config", None)
        if config is not None:
            small = config(vision_config=image, text_config=image, num_labels=3)
            model = getattr(tf, f"{name}ForImageClassification")(small)
            assert find_head(model) == {"classifier.weight", "classifier.bias"}, name


def test_embeddings_and_necks_are_no_head() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"intermediate_size": 8, "image_size": 16, "patch_size": 4}
    assert find_head(tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**small))) == set()
    beit = tf.BeitForSemanticSegmentation(tf.BeitConfig(**small, out_indices=[1, 2, 3, 4]))
    assert {name.split(".")[0] for name in find_head(beit)} == {"decode_head", "auxiliary_head"}
    dpt = tf.DPTForSemanticSegmentation(tf.DPTConfig(**small, backbone_out_indices=[0, 1, 2, 3]))
    assert {name.split(".")[0] for name in find_head(dpt)} == {"head", "auxiliary_head"}


def test_head_of_a_peft_model_is_what_it_saves() -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    head = find_head(get_peft_model(build("bert", torch.float32), config))
    trained = {name for name in head if ".modules_to_save." in name}
    assert trained == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }


def test_a_vocabulary_that_peft_saves_is_no_new_head() -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        r=2,
        modules_to_save=["embed_tokens", "lm_head"],
    )
    model = get_peft_model(build("llama", torch.float32), config)
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
    assert find_head(model) == set()


def test_head_is_found_inside_wrappers() -> None:
    model = build("bert", torch.float32)
    compiled = torch.compile(nn.DataParallel(model))
    assert find_head(compiled) == {f"_orig_mod.module.{name}" for name in HEADS["bert"]}
