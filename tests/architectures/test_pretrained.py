"""The learning rate that follows from pretrained weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_precond.architectures.pretrained import starting_lr

HIDDEN, LAYERS = 16, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A body without a head, whose weights are larger than at random."""
    path = str(tmp_path_factory.mktemp("body"))
    torch.manual_seed(0)
    config = tf.RobertaConfig(
        vocab_size=40, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    tf.RobertaModel(config).save_pretrained(path)
    return path


def classifier(folder: str) -> nn.Module:
    torch.manual_seed(1)
    return tf.RobertaForSequenceClassification.from_pretrained(folder, num_labels=3)


def body(model: nn.Module) -> list[torch.Tensor]:
    """The weights of the linear layers."""
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]


def rms(tensors: list[torch.Tensor]) -> float:
    return torch.cat([t.flatten() for t in tensors]).double().square().mean().sqrt().item()


def test_it_is_a_share_of_the_weights_size_over_the_layers(folder: str) -> None:
    model = classifier(folder)
    held = body(model.roberta.encoder)
    assert len(held) == 6 * LAYERS
    assert starting_lr(model) == pytest.approx(0.0062 * rms(held) / math.sqrt(len(held)), rel=0.05)
    assert starting_lr(model) == float(f"{starting_lr(model):.2g}")
    for parameter in model.roberta.encoder.layer[:2].parameters():
        parameter.requires_grad = False
    top = body(model.roberta.encoder.layer[2])
    assert starting_lr(model) == pytest.approx(0.0062 * rms(top) / math.sqrt(len(top)), rel=0.05)


def test_short_trainings_take_more(folder: str) -> None:
    model = classifier(folder)
    rate = 0.0062 * rms(body(model.roberta.encoder)) / math.sqrt(6 * LAYERS)
    wanted = {None: 1, -1: 1, 0: 1, 10_000: 1, 300: 1, 200: 1.5, 150: 2, 6: 2}
    for steps, times in wanted.items():
        assert starting_lr(model, steps) == pytest.approx(times * rate, rel=0.05), steps


def test_heads_and_embeddings_do_not_count(folder: str, tmp_path) -> None:
    model = classifier(folder)
    rate = starting_lr(model)
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight.mul_(100)
        model.classifier.dense.weight.mul_(100)
    assert starting_lr(model) == rate
    model.save_pretrained(tmp_path)  # a head that was trained before is no body either
    assert starting_lr(classifier(str(tmp_path))) == rate


def test_only_what_was_loaded_has_one(folder: str) -> None:
    model = classifier(folder)
    assert starting_lr(tf.RobertaForSequenceClassification(model.config)) is None
    assert starting_lr(copy.deepcopy(model)) is None
    assert starting_lr(nn.Linear(3, 3)) is None
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "classifier" in name
    assert starting_lr(model) is None


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("rslora", [False, True])
def test_of_adapters_it_changes_the_weights_below_alike(
    folder: str, rank: int, rslora: bool
) -> None:
    """The spectral norm of ``s ΔB A`` at rms(ΔB) = lr is that of a full ΔW by 0.033 / √K."""
    lora = LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value"], r=rank, lora_alpha=2 * rank,
        use_rslora=rslora,
    )  # fmt: skip
    model = get_peft_model(classifier(folder), lora)
    below = [
        m.base_layer.weight.detach() for m in model.modules() if getattr(m, "base_layer", None)
    ]
    full = 0.033 * rms(below) / math.sqrt(len(below))
    downs = [p.detach() for n, p in model.named_parameters() if "lora_A" in n]
    assert len(downs) == 2 * LAYERS
    scaling = 2 * rank / (math.sqrt(rank) if rslora else rank)
    # An orthogonal ΔB of rms lr has √out lr as singular values, a full ΔW of rms lr too.
    wanted = full / (scaling * math.sqrt(HIDDEN) * rms(downs))
    times = {None: 1, 300: 1, 200: 1.5, 150: 2, 60: 5, 6: 5}
    for steps, more in times.items():
        assert starting_lr(model, steps) == pytest.approx(more * wanted, rel=0.05), steps


def test_of_a_convolutional_network(tmp_path) -> None:
    config = tf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    tf.ResNetModel(config).save_pretrained(tmp_path)
    model = tf.ResNetForImageClassification.from_pretrained(tmp_path)
    held = [m.weight.detach() for m in model.resnet.modules() if isinstance(m, nn.Conv2d)]
    assert starting_lr(model) == pytest.approx(0.0062 * rms(held) / math.sqrt(len(held)), rel=0.05)
