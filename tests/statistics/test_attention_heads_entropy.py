"""Entropies of attention weights against those that the models themselves return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_precond.architectures.attention import find_attention
from hf_precond.statistics.attention_heads import Call, entropies, spaced
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import MomentRequest
from tests.architectures.families import FAMILIES, TEXT, build, loss_of

GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 4}
OTHERS: dict[str, Any] = {
    "gemma2, soft cap": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**GROUPED, attn_logit_softcapping=0.5, sliding_window=3)
    ),
    "gpt-oss, sinks": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1, sliding_window=3)
    ),
    "mistral, window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=3)),
}


def undropped(model: nn.Module) -> nn.Module:
    """All dropout off, in training mode."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_prob", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def captured(model: nn.Module, batch: dict[str, Any], rows: int = 0) -> dict[str, Any]:
    blocks = [block for block in find_attention(model) if block.observed]
    collector = MomentCollector(
        model, [MomentRequest(b.name, "entropy", b.q, b, rows=rows) for b in blocks]
    )
    collector.enable(True, 0)
    loss_of(model, batch).backward()
    taken = collector.take()
    collector.close()
    return taken


def weights_of(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Attention weights ``[B, H, N, M]`` by the eager kernel, in the order of the layers."""
    model.set_attn_implementation("eager")
    cast = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
    }
    with torch.no_grad():
        found = model(**cast, output_attentions=True)
    return list(found.attentions)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "gpt2", "opt", "gpt-neox", "llama", "qwen3", "vit"]
)
def test_entropies_are_those_of_the_weights(name: str, kernel: str) -> None:
    model, batch = undropped(build(name)), FAMILIES[name].batch()
    model.set_attn_implementation(kernel)
    taken = captured(model, batch)
    mask = batch.get("attention_mask")
    blocks = [block for block in find_attention(model) if block.observed]
    for block, weights in zip(blocks, weights_of(model, batch), strict=True):
        entropy = torch.special.entr(weights.double()).sum(-1)
        real = torch.ones(entropy[:, 0].shape) if mask is None else mask.double()
        expected = (entropy * real[:, None]).sum((0, 2))
        assert taken[block.name].sum.shape == (block.heads.query,)
        torch.testing.assert_close(taken[block.name].sum, expected, rtol=1e-6, atol=1e-9)
        assert taken[block.name].count == real.sum()


@pytest.mark.parametrize("name", OTHERS)
def test_windows_soft_caps_and_sinks(name: str) -> None:
    torch.manual_seed(0)
    model, batch = undropped(OTHERS[name]().double().train()), FAMILIES["llama"].batch()
    if name.startswith("gpt-oss"):  # torch's grouped product has no float64
        model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    batch["attention_mask"].fill_(1)  # padding behind a window would be not a number in float64
    taken = captured(model, batch)
    for block, weights in zip(find_attention(model), weights_of(model, batch), strict=True):
        entropy = torch.special.entr(weights.double()).sum(-1)
        if name.startswith("gpt-oss"):  # what the sink takes is a weight too
            entropy += torch.special.entr((1 - weights.double().sum(-1)).clamp(min=0))
        expected = entropy.sum((0, 2))
        torch.testing.assert_close(taken[block.name].sum, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_cross_attentions(name: str) -> None:
    model, batch = undropped(build(name)), FAMILIES[name].batch()
    taken = captured(model, batch)
    model.set_attn_implementation("eager")
    cast = {
        key: value.double() if value.is_floating_point() else value for key, value in batch.items()
    }
    with torch.no_grad():
        weights = model(**cast, output_attentions=True).cross_attentions
    crossed = [block for block in find_attention(model) if block.cross]
    for block, weight in zip(crossed, weights, strict=True):
        entropy = torch.special.entr(weight.double()).sum(-1)
        found = taken[block.name]
        labels = batch["labels"]
        real = (labels != -100).flip(-1).cumsum(-1).clamp(max=1).flip(-1).double()
        torch.testing.assert_close(found.sum, (entropy * real[:, None]).sum((0, 2)))


def by_hand(mask: Any, kernel: str, **options: Any) -> Call:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 6, 4, generator=generator).double() for _ in range(2))
    return Call(query, key, query, mask, options, kernel)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_as_flash_attention_gets_them(causal: bool, window: int | None) -> None:
    """One entry a key, the rest by arguments: as the full mask says."""
    keys = torch.ones(2, 6)
    keys[1, 4:] = 0
    ahead = torch.arange(6) - torch.arange(6)[:, None]
    allowed = torch.ones(6, 6, dtype=torch.bool)
    if causal:
        allowed &= ahead <= 0
    if window is not None:
        allowed &= ahead.abs() < window
    full = allowed & keys[:, None, None, :].bool()
    module = nn.Module()
    flash = by_hand(keys, "flash_attention_forward", is_causal=causal, sliding_window=window)
    eager = by_hand(full, "eager_attention_forward")
    positions = spaced(6, 0)
    torch.testing.assert_close(
        entropies(module, flash, positions), entropies(module, eager, positions)
    )


def test_some_rows_are_those_rows_of_all() -> None:
    call = by_hand(None, "sdpa_attention_forward")
    every = entropies(nn.Module(), call, spaced(6, 0))
    some = entropies(nn.Module(), call, spaced(6, 3))
    assert torch.equal(some, every[..., ::2])
    assert every[..., 0].abs().max() == 0  # the first position sees itself alone


def test_masks_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"list.*attn_implementation='sdpa'"):
        entropies(nn.Module(), by_hand([1], "flex_attention_forward"), spaced(6, 0))
