"""Which rows of q, k and v belong to which head, seen in what reaches the output projection."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.attention_block import AttentionBlock
from tests.optimizers.test_every_architecture import example

TYPES = {
    "codegen": "CodeGenAttention",
    "convbert": "ConvBertSelfAttention",
    "cvt": "CvtSelfAttention",
    "deberta": "DisentangledSelfAttention",
    "deepseek_v3": "DeepseekV3Attention",
    "diffllama": "DiffLlamaAttention",
    "funnel": "FunnelRelMultiheadAttention",
    "gpt_bigcode": "GPTBigCodeAttention",
    "groupvit": "GroupViTAssignAttention",
    "led": "LEDEncoderSelfAttention",
    "lightglue": "LightGlueAttention",
    "minimax": "MiniMaxLightningAttention",
    "moshi": "MoshiAttention",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "pix2struct": "Pix2StructTextAttention",
    "qwen3_5_text": "Qwen3_5GatedDeltaNet",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "superglue": "SuperGlueSelfAttention",
}
"""Attentions whose names or rows are ordered in a way of their own."""


def columns_read(block: AttentionBlock, run: Callable[[], object]) -> Tensor:
    """What enters the output projection at the first call, ``[…, heads · values]``."""
    assert block.o is not None
    seen: list[Tensor] = []
    handle = block.o.module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        run()
    handle.remove()
    inputs = seen[0].movedim(1, -1) if isinstance(block.o.module, nn.Conv2d) else seen[0]
    return inputs[..., : block.heads.query * block.heads.value_size]


def moved_columns(
    block: AttentionBlock, role: str, head: int, run: Callable[[], object], plain: Tensor
) -> set[int]:
    """Columns that change when the rows of one head of a role give something else."""
    matrix = block.roles()[role]
    rows = matrix.shape[0] if matrix.rows is None else matrix.rows.total
    marked = torch.zeros(rows)
    own = torch.zeros(block.heads_of(role), matrix.shape[0] // block.heads_of(role))
    own[head] = 1
    selected = matrix.bias_view(marked)
    selected.copy_(own.view(selected.shape))

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        mask = marked[:, None, None] if isinstance(module, nn.Conv2d) else marked
        return output + mask * torch.randn(output.shape, generator=generator).to(output)

    handle = matrix.module.register_forward_hook(add)
    other = columns_read(block, run)
    handle.remove()
    change = (other - plain).flatten(0, -2).abs().amax(0)
    return set((change > 1e-6 * change.max()).nonzero().flatten().tolist())


def assert_heads_are_where_they_are_read(block: AttentionBlock, run: Callable[[], object]) -> None:
    heads, plain = block.heads, columns_read(block, run)
    columns = torch.arange(heads.query * heads.value_size).view(heads.query, heads.value_size)
    if block.paired_values:  # half of the heads are subtracted from the others
        columns = columns.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    for role in ("q", "k", "v"):
        if block.paired_values and role != "v":
            continue
        for head in range(block.heads_of(role)):
            group = 1 if role == "q" else heads.group
            expected = set(columns[head * group : (head + 1) * group].flatten().tolist())
            moved = moved_columns(block, role, head, run, plain)
            assert moved and moved <= expected, (block.name, role, head)


def attention_of(model_type: str, kind: str) -> tuple[AttentionBlock, Callable[[], object]]:
    """The first attention of a class in a tiny model in float64, and what runs the model."""
    model, batch, _ = example(model_type)
    model = model.double().eval()
    if hasattr(model, "set_experts_implementation"):  # torch's grouped product has no float64
        model.set_experts_implementation("eager")
    given = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    blocks = (b for b in find_attention(model) if type(b.module).__name__.startswith(kind))
    return next(blocks), lambda: model(**given)


@pytest.mark.parametrize("model_type", TYPES)
def test_heads_are_where_the_model_has_them(model_type: str) -> None:
    block, run = attention_of(model_type, TYPES[model_type])
    for name in ("groupnorm", "norm") if model_type in ("diffllama", "minimax") else ():
        setattr(block.module, name, nn.Identity())  # of several heads
    assert_heads_are_where_they_are_read(block, run)


def alone(module: nn.Module, *inputs: Tensor) -> None:
    module.double().train(False)  # LeViT's returns nothing
    (block,) = find_attention(module)
    assert_heads_are_where_they_are_read(block, lambda: module(*inputs))


def test_heads_of_layers_that_no_tiny_model_calls() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 12).double()
    granite = tf.models.granite_speech
    config = granite.GraniteSpeechEncoderConfig(
        hidden_dim=12, num_heads=3, dim_head=4, context_size=8, max_pos_emb=8
    )
    distances = torch.arange(8)[:, None] - torch.arange(8)[None] + 8
    alone(granite.modeling_granite_speech.GraniteSpeechConformerAttention(config), x, distances)
    levit = tf.models.levit.modeling_levit
    alone(levit.LevitAttention(12, 5, 3, 2, 4), x)
    alone(levit.LevitAttentionSubsample(12, 9, 5, 3, 2, 2, 4, 2), x)
    rf_detr = tf.models.rf_detr
    config = rf_detr.RfDetrConfig(d_model=12, decoder_self_attention_heads=3)
    alone(rf_detr.modeling_rf_detr.RfDetrAttention(config, 0), x)
    evolla = tf.models.evolla.modeling_evolla
    compressor = evolla.EvollaSequenceCompressorAttention(12, dim_head=4, heads=3)
    alone(compressor, x, x[:, :5], torch.ones(2, 21))
    janus = tf.models.janus.modeling_janus
    alone(janus.JanusVQVAEAttnBlock(32), torch.randn(2, 32, 3, 3).double())
