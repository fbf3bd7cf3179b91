"""Decay as the Trainer decides it, and which parameters are a new head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_precond.architectures.parameters import find_head, parameter_groups, undecayed_names
from tests.architectures.families import FAMILIES, TEXT, build


class _Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 4)
        self.final_norm = nn.BatchNorm1d(4)
        self.plain = nn.LayerNorm(4)
        self.batch = nn.BatchNorm1d(4)
        self.normal = nn.Linear(4, 4)
        self.input_layernorm = nn.RMSNorm(4)


@pytest.mark.parametrize("name", [*FAMILIES, "norms"])
def test_decay_is_the_trainers(name: str, tmp_path: Path) -> None:
    model = _Norms() if name == "norms" else build(name, torch.float32)
    trainer = tf.Trainer(model, tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(model))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    undecayed = undecayed_names(model)
    assert {n for n in names if n not in undecayed} == decayed & set(names)
    groups, labels = parameter_groups(model, 1e-3, 0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("decay", 1e-3, 0.1), ("no decay", 1e-3, 0.0)
    ]
    assert set(labels) == set(names)
    by_name = dict(model.named_parameters())
    for group in groups:
        wanted = [by_name[n] for n in names if labels[n] == group["name"]]
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted]


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


def test_head_of_a_peft_model_is_what_it_saves() -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    head = find_head(get_peft_model(build("bert", torch.float32), config))
    trained = {name for name in head if ".modules_to_save." in name}
    assert trained == {
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    }


def test_a_vocabulary_that_peft_saves_is_no_new_head() -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=2,
        modules_to_save=["embed_tokens", "lm_head"],
    )
    model = get_peft_model(build("llama", torch.float32), config)
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
    assert find_head(model) == set()


def test_head_is_found_inside_wrappers() -> None:
    model = build("bert", torch.float32)
    compiled = torch.compile(nn.DataParallel(model))
    assert find_head(compiled) == {f"_orig_mod.module.{name}" for name in HEADS["bert"]}


def test_head_has_groups_of_its_own_at_another_rate() -> None:
    model = build("bert", torch.float32)
    groups, labels = parameter_groups(model, 1e-3, 0.1, head_lr_scale=5.0)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("decay", 1e-3, 0.1),
        ("no decay", 1e-3, 0.0),
        ("head decay", 5e-3, 0.1),
        ("head no decay", 5e-3, 0.0),
    ]
    assert labels["classifier.weight"] == "head decay"
    assert labels["classifier.bias"] == "head no decay"
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_nothing_to_group_says_why() -> None:
    with pytest.raises(ValueError, match="this model has no newly initialised head"):
        parameter_groups(build("gpt2", torch.float32), 1e-3, 0.0, head_lr_scale=5.0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3, 0.0)


def test_frozen_parameters_are_in_no_group() -> None:
    model = build("bert", torch.float32)
    model.bert.embeddings.requires_grad_(False)
    groups, labels = parameter_groups(model, 1e-3, 0.0)
    assert all(p.requires_grad for group in groups for p in group["params"])
    assert not any(name.startswith("bert.embeddings") for name in labels)
