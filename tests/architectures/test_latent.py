"""Multi-head latent attention: which rows of its projections are what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.attention_block import Heads, declare_attention, forget_attention
from hf_precond.architectures.latent import latent_layout
from hf_precond.registry import create_optimizer
from tests.architectures.families import TEXT

SIZES: dict[str, Any] = {
    **TEXT, "kv_lora_rank": 6, "q_lora_rank": 8, "qk_rope_head_dim": 2, "qk_nope_head_dim": 4,
    "v_head_dim": 5, "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 2,
}  # fmt: skip


def deepseek(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**(SIZES | EXPERTS | fields)))


@pytest.mark.parametrize("rank", [8, None])
def test_rows_and_heads(rank: int | None) -> None:
    for block in find_attention(deepseek(q_lora_rank=rank)):
        assert block.heads == Heads(4, 4, 6, 5)
        layers = block.module
        shared = {"q": "q_b_proj" if rank else "q_proj", "o": "o_proj"}
        for role, name in shared.items():
            assert block.roles()[role].module is layers.get_submodule(name)
        up = layers.kv_b_proj.weight.unflatten(0, (4, 9))
        assert torch.equal(block.k.weight_view(layers.kv_b_proj.weight), up[:, :4])
        assert torch.equal(block.v.weight_view(layers.kv_b_proj.weight), up[:, 4:])
        down = layers.kv_a_proj_with_mqa.weight
        latent, rotated = block.downs["kv_down"], block.parts["k_rot"]
        assert torch.equal(latent.matrix.weight_view(down), down[:6])
        assert torch.equal(rotated.matrix.weight_view(down), down[6:])
        assert (rotated.span, block.span("k"), block.plain) == ((4, 6), (0, 4), 4)
        assert latent.norm is layers.kv_a_layernorm
        assert ("q_down" in block.downs) == bool(rank)
        if rank:
            assert block.downs["q_down"].norm is layers.q_a_layernorm
        reads = {role: block.reads(role) for role in block.roles()}
        assert reads.pop("q") == ("query_latent" if rank else "x")
        assert reads.pop("q_down", "x") == "x"
        assert reads == {"k": "latent", "v": "latent", "o": "o", "k_rot": "x", "kv_down": "x"}


def test_every_weight_of_the_attention_has_its_reason() -> None:
    optimizer = create_optimizer(deepseek(), "afopt")
    reasons = {
        row.name.removeprefix("model.layers.0.self_attn."): row.reason
        for row in optimizer.routing if "layers.0.self_attn" in row.name and len(row.shape) == 2
    }  # fmt: skip
    optimizer.close()
    assert reasons == {
        "q_a_proj.weight": "latent of queries",
        "q_b_proj.weight": "queries",
        "kv_a_proj_with_mqa.weight": "keys that all heads share; latent of keys and values",
        "kv_b_proj.weight": "keys; values",
        "o_proj.weight": "attention output",
    }


def test_adapters_of_all_projections_are_preconditioned() -> None:
    names = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    model = get_peft_model(
        deepseek(), LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    )
    optimizer = create_optimizer(model, "afopt", lr=1e-2, stat_interval=1)
    assert len(optimizer.bound) == 2 * (5 + 7)  # B has rows of its own for every role
    tokens = torch.arange(3, 15).reshape(2, 6)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert all((p != before[n]).any() and p.isfinite().all() for n, p in trained.items())
    assert optimizer.diagnostics()["failed_refreshes"] == 0
    optimizer.close()


class Own(nn.Module):
    """Names that no table has; keys above values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 4
        self.down, self.up = nn.Linear(16, 8), nn.Linear(6, 36)
        self.query, self.out = nn.Linear(16, 24), nn.Linear(20, 16)


def test_a_latent_layer_of_ones_own_is_declared() -> None:
    assert find_attention(Own()) == []
    declaration = declare_attention(
        "Own", query="query", fused="up", latent="down", output="out", heads="count"
    )
    try:
        (block,) = find_attention(Own())
    finally:
        forget_attention(declaration)
    assert block.heads == Heads(4, 4, 6, 5) and block.span("k") == (0, 4)
    assert block.k.rows is not None and block.v.rows is not None
    assert (block.k.rows.span, block.v.rows.span) == ((0, 16), (16, 36))
    assert [block.reads(role) for role in ("q", "k", "k_rot")] == ["x", "latent", "x"]


def test_latents_need_a_query_projection() -> None:
    with pytest.raises(ValueError, match="give query"):
        declare_attention("Own", fused="up", latent="down", heads=4)


SHAPES = {"q": (24, 8), "qkv": (36, 6), "kv_down": (8, 16), "o": (16, 20)}


@pytest.mark.parametrize(
    ("changed", "heads"),
    [
        ({}, Heads(4, 4, 6, 5)),
        ({"kv_down": (6, 16), "q": (16, 8)}, Heads(4, 4, 4, 5)),  # nothing shared
        ({"q": (44, 8)}, Heads(4, 4, 6, 5)),  # a gate behind the queries
        ({"q": (28, 8)}, None),
        ({"kv_down": (4, 16)}, None),
        ({"o": (16, 24)}, None),
    ],
)
def test_shapes_must_fit(changed: dict[str, tuple[int, int]], heads: Heads | None) -> None:
    layout = latent_layout((4, 4), SHAPES | changed, 0, "interleaved")
    assert (None if layout is None else layout.heads) == heads
