"""Tiny models of the families, with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

WORDS, LENGTH, ROWS = 40, 7, 3
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
PAIRS = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def text(labels: str = "class") -> dict[str, Tensor]:
    """Token ids with a padded row, and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels == "class":
        batch["labels"] = torch.tensor([0, 1, 0])
    else:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch


def image(size: int = 8) -> dict[str, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(ROWS, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2])}


def pairs() -> dict[str, Tensor]:
    """Source ids with padding, and shorter target labels with padding."""
    batch = text("tokens")
    batch["labels"] = batch["labels"][:, :5].clone()
    return batch


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        build: makes the model.
        batch: makes a batch for it.
        attentions: how many attentions it has.
        query, output: endings of the names of q and o (of any version of
            transformers in the range).
        key_value: key-value heads (of 4).
        rotary, normed, observed: as of the attention block; ``None`` where
            it depends on the version.
        cross: how many of the attentions are cross-attentions.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    attentions: int = 2
    query: str | tuple[str, ...] = "query"
    output: str | tuple[str, ...] = "output.dense"
    key_value: int = 4
    size: int = 4
    rotary: bool = False
    normed: bool = False
    observed: bool | None = True
    cross: int = 0


def classifier(config: Any) -> Callable[[], nn.Module]:
    """A text classifier of a config."""
    return lambda: tf.AutoModelForSequenceClassification.from_config(config())


def causal(config: Any) -> Callable[[], nn.Module]:
    """A causal language model of a config."""
    return lambda: tf.AutoModelForCausalLM.from_config(config())


def vision(config: Any) -> Callable[[], nn.Module]:
    """An image classifier of a config."""
    return lambda: tf.AutoModelForImageClassification.from_config(config())


def _albert() -> nn.Module:
    config = tf.AlbertConfig(**TEXT, embedding_size=8, num_hidden_groups=1)
    return tf.AlbertForSequenceClassification(config)


def _deberta() -> nn.Module:
    config = tf.DebertaV2Config(
        **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8
    )
    return tf.DebertaV2ForSequenceClassification(config)


def _distilbert() -> nn.Module:
    config = tf.DistilBertConfig(
        vocab_size=WORDS, dim=16, n_layers=2, n_heads=4, hidden_dim=24, pad_token_id=0
    )
    return tf.DistilBertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = tf.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=4,
        vocab_size=WORDS,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.GPT2LMHeadModel(config)


def _clip() -> nn.Module:
    small = {"projection_dim": 8, "hidden_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4, "intermediate_size": 24}
    text_config = small | {"vocab_size": WORDS, "eos_token_id": 2, "bos_token_id": 1}
    image_config = small | {"image_size": 8, "patch_size": 4}
    config = tf.CLIPConfig(text_config=text_config, vision_config=image_config, projection_dim=8)
    return tf.CLIPModel(config)


def _clip_batch() -> dict[str, Any]:
    batch = text()
    del batch["labels"]
    return batch | {"pixel_values": image()["pixel_values"], "return_loss": True}


def _swin() -> nn.Module:
    config = tf.SwinConfig(
        image_size=8,
        patch_size=2,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[4, 8],
        window_size=2,
        num_labels=3,
    )
    return tf.SwinForImageClassification(config)


def _t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=WORDS,
        d_model=16,
        d_kv=4,
        num_heads=4,
        num_layers=1,
        num_decoder_layers=2,
        d_ff=24,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config)


def _whisper() -> nn.Module:
    config = tf.WhisperConfig(
        **PAIRS, num_mel_bins=8, max_source_positions=8, max_target_positions=8
    )
    return tf.WhisperForConditionalGeneration(config)


def _whisper_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(ROWS, 8, 16, generator=generator)
    return {"input_features": features, "labels": pairs()["labels"]}


def _opt() -> nn.Module:
    config = tf.OPTConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=24,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return tf.OPTForCausalLM(config)


def _tokens() -> dict[str, Tensor]:
    return text("tokens")


_VISION: dict[str, Any] = {"query": ("q_proj", "query"), "output": ("o_proj", "output.dense")}
_GROUPED = {"num_key_value_heads": 2}
FAMILIES: dict[str, Family] = {
    "bert": Family(classifier(lambda: tf.BertConfig(**TEXT)), text),
    "roberta": Family(classifier(lambda: tf.RobertaConfig(**TEXT)), text),
    "electra": Family(classifier(lambda: tf.ElectraConfig(**TEXT, embedding_size=8)), text),
    "albert": Family(_albert, text, attentions=1, output="attention.dense"),
    "distilbert": Family(_distilbert, text, query="q_lin", output="out_lin"),
    "deberta-v2": Family(_deberta, text, query="query_proj", observed=False),
    "mpnet": Family(
        classifier(lambda: tf.MPNetConfig(**TEXT)),
        text,
        query="attn.q",
        output="attn.o",
        observed=False,
    ),
    "modernbert": Family(
        classifier(lambda: tf.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)),
        text,
        query="Wqkv[q]",
        output="Wo",
        rotary=True,
        observed=None,
    ),
    "vit": Family(vision(lambda: tf.ViTConfig(**IMAGE)), image, **_VISION),
    "deit": Family(lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**IMAGE)), image, **_VISION),
    "dinov2": Family(vision(lambda: tf.Dinov2Config(**IMAGE)), image, **_VISION),
    "swin": Family(_swin, image, **_VISION, observed=None),
    "clip": Family(_clip, _clip_batch, query="q_proj", output="out_proj"),
    "gpt2": Family(_gpt2, _tokens, query="c_attn[q]", output="c_proj"),
    "gpt-neox": Family(
        causal(lambda: tf.GPTNeoXConfig(**TEXT)),
        _tokens,
        query="query_key_value[q]",
        output="dense",
        rotary=True,
    ),
    "llama": Family(
        causal(lambda: tf.LlamaConfig(**TEXT, **_GROUPED)),
        _tokens,
        query="q_proj",
        output="o_proj",
        key_value=2,
        rotary=True,
    ),
    "qwen3": Family(
        causal(lambda: tf.Qwen3Config(**TEXT, **_GROUPED, head_dim=8)),
        _tokens,
        query="q_proj",
        output="o_proj",
        key_value=2,
        size=8,
        rotary=True,
        normed=True,
    ),
    "opt": Family(_opt, _tokens, query="q_proj", output="out_proj"),
    "t5": Family(_t5, pairs, attentions=5, query=".q", output=".o", cross=2, observed=None),
    "bart": Family(
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**PAIRS)),
        pairs,
        attentions=5,
        query="q_proj",
        output="out_proj",
        cross=2,
    ),
    "whisper": Family(
        _whisper, _whisper_batch, attentions=5, query="q_proj", output="out_proj", cross=2
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The family's model, seeded, in training mode."""
    torch.manual_seed(0)
    return FAMILIES[name].build().to(dtype).train()


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's own loss, floating inputs in its dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    cast = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }
    return model(**cast).loss
