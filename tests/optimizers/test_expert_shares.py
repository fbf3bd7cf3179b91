"""How much of a released mixture of experts is preconditioned."""

import math
from pathlib import Path

import pytest
import torch
import transformers as tf

from hf_precond.registry import create_optimizer

SUPPORT = Path(__file__).parents[2] / "docs" / "support.md"
RELEASED = {
    "Mixtral 8x7B": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
        )
    ),
    "GPT-OSS 20B": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
            num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32,
        )
    ),
    "Qwen3 30B-A3B": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
            moe_intermediate_size=768,
        )
    ),
    "DeepSeek-V3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config()),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_nearly_all_hidden_weights_are_preconditioned(name):
    """All parameters but embeddings and heads, at the sizes of the release; the page says so."""
    with torch.device("meta"):
        model = RELEASED[name]()
    cells = []
    for optimizer_name in ("afopt", "nkfac"):
        optimizer = create_optimizer(model, optimizer_name)
        sizes = {
            row.name: (math.prod(row.shape), row.treatment == "preconditioned")
            for row in optimizer.routing
            if not row.name.startswith(("model.embed_tokens.", "lm_head."))
        }
        optimizer.close()
        total = sum(size for size, _ in sizes.values())
        share = sum(size for size, inside in sizes.values() if inside) / total
        assert share >= 0.95
        cells.append(f"{math.floor(share * 1000) / 10:.1f} %")
    assert f"| {name} | {' | '.join(cells)} |" in SUPPORT.read_text()
