"""Queries and keys per head as the kernel sees them, and the averages over rotations."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.statistics import attention_heads
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import MomentRequest
from hf_precond.statistics.rope import average, half_split, read_layout, tables
from tests.architectures.families import FAMILIES, TEXT, build, loss_of, text


class Seen:
    """Queries and keys that the kernel of one attention was called with."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        attention_heads.observe(modules, self.see)
        self.end = lambda: attention_heads.stop_observing(modules, self.see)

    def see(self, module: nn.Module, call: attention_heads.Call) -> None:
        self.calls[module] = (call.query.detach(), call.key.detach())


def head_requests(blocks: list[AttentionBlock], **options: bool) -> list[MomentRequest]:
    return [
        MomentRequest(f"{block.name}/{kind}", kind, block.q, block, **options)
        for block in blocks
        for kind in ("query", "key")
    ]


def opened(model: nn.Module, requests: list[MomentRequest]) -> MomentCollector:
    collector = MomentCollector(model, requests)
    collector.enable(True, 0)
    return collector


def rows_of(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """``[H, real tokens, d_h]``."""
    rows = vectors.transpose(0, 1)
    return rows.flatten(1, 2) if mask is None else rows[:, mask.bool()]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen3", "gpt-neox", "vit"])
def test_moments_of_heads(name: str, kernel: str) -> None:
    model, batch = build(name), FAMILIES[name].batch()
    model.set_attn_implementation(kernel)
    blocks = find_attention(model)
    collector = opened(model, head_requests(blocks))
    seen = Seen([block.module for block in blocks])
    loss_of(model, batch).backward()
    seen.end()
    taken = collector.take()
    collector.close()
    mask = batch.get("attention_mask")
    for block in blocks:
        query, key = seen.calls[block.module]
        for kind, vectors, heads in (
            ("query", query, block.heads.query),
            ("key", key, block.heads.key_value),
        ):
            found = taken[f"{block.name}/{kind}"]
            rows = rows_of(vectors, mask)
            assert found.sum.shape == (heads, block.heads.size, block.heads.size)
            torch.testing.assert_close(found.sum, rows.mT @ rows)
            assert found.count == rows.shape[1]


def rotations_of(module: nn.Module, cos: Tensor, sin: Tensor | None, size: int) -> Tensor:
    """The matrix of each position, column by column, by the model's own function: ``[n, d, d]``."""
    forward = inspect.unwrap(type(module).forward)
    names = {n for n in forward.__code__.co_names if "rotary" in n and n in forward.__globals__}
    if len(names) > 1:
        names = {n for n in names if n.endswith("interleave") == module.config.rope_interleave}
    (name,) = names
    rotate = forward.__globals__[name]
    count, columns = cos.shape[-2], torch.eye(size, dtype=torch.float64)[None, :, None, :]
    columns = columns.expand(1, size, count, size)
    if sin is None:  # complex numbers, and [B, N, H, d]
        if cos.shape[-1] * 2 == size and "freqs_cis.unsqueeze(1)" in inspect.getsource(rotate):
            return rotate(columns, columns, cos)[0][0].permute(1, 2, 0).double()
        moved = columns.transpose(1, 2)
        return rotate(moved, moved, cos)[0][0].mT.double()
    rotated, _ = rotate(columns, columns, cos, sin)
    return rotated[0].permute(1, 2, 0)  # [positions, component, column]


LATENT: dict[str, Any] = {
    **TEXT, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 6, "q_lora_rank": 8, "qk_rope_head_dim": 6, "qk_nope_head_dim": 4,
    "v_head_dim": 5, "first_k_dense_replace": 2, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
ROTARY: dict[str, Any] = {
    "deepseek-v3, interleaved and reordered": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(**LATENT)
    ),
    "deepseek-v3, half-split": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(**LATENT, rope_interleave=False)
    ),
    "deepseek-v2, complex": lambda: tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**LATENT)),
    "llama": lambda: FAMILIES["llama"].build(),
    "qwen3": lambda: FAMILIES["qwen3"].build(),
    "modernbert": lambda: FAMILIES["modernbert"].build(),
    "gpt-neox, partly rotated": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            **(TEXT | {"hidden_size": 32}),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            },
        )
    ),
    "cohere, interleaved": lambda: tf.CohereForCausalLM(
        tf.CohereConfig(**TEXT, num_key_value_heads=2)
    ),
    "llama4, complex": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **TEXT,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size_mlp=24,
            num_local_experts=2,
            use_qk_norm=False,
            no_rope_layers=[1, 1],
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        )
    ),
    "gpt-oss, half width": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **TEXT,
            num_key_value_heads=2,
            head_dim=4,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        )
    ),
}


@pytest.mark.parametrize("name", ROTARY)
def test_average_over_rotations_equals_brute_force(name: str) -> None:
    torch.manual_seed(0)
    model = ROTARY[name]().double().train()
    if name.startswith("gpt-oss"):  # torch's grouped product has no float64
        model.set_experts_implementation("eager")
    batch = text("class" if name == "modernbert" else "tokens")
    batch["position_ids"] = torch.arange(7).expand(3, 7) + torch.tensor([[0], [5], [2]])
    blocks = [block for block in find_attention(model) if block.observed]
    assert blocks or name == "modernbert"  # an older one has its own kernels
    plain = head_requests(blocks)
    averaged = [
        MomentRequest(f"{r.key}/mean", r.kind, r.matrix, r.attention, average_rotation=True)
        for r in plain
    ]
    collector = opened(model, plain + averaged)
    rotations: dict[nn.Module, Any] = {}
    for block in blocks:
        block.module.register_forward_pre_hook(
            lambda m, args, kwargs: rotations.__setitem__(
                m, kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
            ),
            with_kwargs=True,
        )
    loss_of(model, batch).backward()
    taken = collector.take()
    collector.close()
    mask = batch["attention_mask"].bool()
    for block in blocks:
        given = rotations[block.module]
        paired = isinstance(given, Tensor)
        cos, sin = (given, None) if paired else (part.double() for part in given)
        matrices = []
        for row in range(3):
            pick = slice(row, row + 1) if cos.shape[0] == 3 else slice(0, 1)
            sines = None if sin is None else sin[pick]
            front = torch.eye(block.plain).double()
            turning = block.heads.size - block.plain
            every = rotations_of(block.module, cos[pick], sines, turning)[mask[row]]
            matrices.append(torch.stack([torch.block_diag(front, r) for r in every]))
        turned = torch.cat(matrices)
        for kind in ("query", "key"):
            moment = taken[f"{block.name}/{kind}"].sum
            expected = torch.stack(
                [torch.stack([r.T @ head @ r for r in turned]).mean(0) for head in moment]
            )
            found = taken[f"{block.name}/{kind}/mean"]
            torch.testing.assert_close(found.sum, expected, rtol=1e-6, atol=1e-8)
            assert found.count == mask.sum()
            assert not torch.allclose(found.sum, moment, rtol=1e-3), "the average does something"


@pytest.mark.parametrize("masked", [False, True])
def test_a_rotation_that_an_attention_computes_inside_equals_brute_force(masked: bool) -> None:
    """V-JEPA 2's, over three axes, in heads of which two columns are not rotated."""
    torch.manual_seed(0)
    config = tf.VJEPA2Config(crop_size=16, patch_size=4, frames_per_clip=4, tubelet_size=2)
    module = VJEPA2RopeAttention(config, hidden_size=40, num_attention_heads=2).double().train()
    (block,) = find_attention(module)
    assert block.rotary and block.observed
    plain = head_requests([block])
    averaged = [
        MomentRequest(f"{r.key}/mean", r.kind, r.matrix, r.attention, average_rotation=True)
        for r in plain
    ]
    collector = opened(module, plain + averaged)
    mask = torch.stack([torch.randperm(32)[:9] for _ in range(2)]) if masked else None
    x = torch.randn(2, 9 if masked else 32, 40, dtype=torch.float64)
    module(x, mask)[0].square().sum().backward()
    taken = collector.take()
    collector.close()
    positions = module.get_position_ids(x, masks=mask)
    columns = torch.eye(20, dtype=torch.float64)[:, None, None].expand(-1, 2, x.shape[1], -1)
    every = [
        module.apply_rotary_embeddings(
            columns, [p[row : row + 1] if masked else p for p in positions]
        )
        for row in range(2)
    ]
    turned = torch.cat([rotated[:, 0].permute(1, 2, 0) for rotated in every])
    for kind in ("query", "key"):
        moment = taken[f"/{kind}"].sum
        expected = torch.stack([(turned.mT @ head @ turned).mean(0) for head in moment])
        torch.testing.assert_close(taken[f"/{kind}/mean"].sum, expected)
        assert not torch.allclose(expected, moment, rtol=1e-3)


def test_images_that_are_attended_one_by_one_have_the_positions_of_all() -> None:
    """A rotation keeps the trace, so their average does."""
    config = tf.Qwen2VLConfig().vision_config
    for name, value in {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1,
    }.items():  # fmt: skip
        setattr(config, name, value)
    torch.manual_seed(0)
    model = tf.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)
    model = model.double().train()
    (block,) = find_attention(model)
    requests = head_requests([block]), head_requests([block], average_rotation=True)
    images, grid = torch.randn(10, 48).double(), torch.tensor([[1, 2, 2], [1, 2, 3]])
    found = []
    for asked in requests:
        collector = opened(model, asked)
        model(images, grid_thw=grid).last_hidden_state.square().sum().backward()
        found.append(collector.take())
        collector.close()
    for key, plain in found[0].items():
        mean = found[1][key]
        assert mean.count == plain.count == 10
        traces = [part.sum.diagonal(dim1=-2, dim2=-1).sum(-1) for part in (mean, plain)]
        torch.testing.assert_close(traces[0], traces[1], rtol=1e-6, atol=0)
        assert not torch.allclose(mean.sum, plain.sum, rtol=1e-3)


def test_layers_without_rotation_are_told() -> None:
    config = {**TEXT, "num_key_value_heads": 2, "num_hidden_layers": 4}
    smol = tf.SmolLM3ForCausalLM(tf.SmolLM3Config(**config, no_rope_layers=[1, 0, 1, 1]))
    assert [b.rotary for b in find_attention(smol)] == [True, False, True, True]
    windows = ["sliding_attention", "full_attention"] * 2
    cohere = tf.Cohere2ForCausalLM(tf.Cohere2Config(**config, layer_types=windows))
    assert [b.rotary for b in find_attention(cohere)] == [True, False, True, False]


def test_average_is_the_identity_at_position_zero() -> None:
    layout = half_split(6, 6)
    moment = torch.randn(2, 6, 6, dtype=torch.float64)
    moment = moment + moment.mT
    cos, sin = torch.ones(1, 3, 6), torch.zeros(1, 3, 6)
    mean = tables(layout, cos.double(), sin.double(), None) / 3
    torch.testing.assert_close(average(layout, moment, mean), moment)


def test_layout_of_an_unknown_rotation_is_half_split() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    layout, expected = read_layout(Own(), 8, torch.ones(1, 3, 4)), half_split(8, 4)
    for item in ("partner", "sign", "cosine", "sine", "rotated", "order"):
        torch.testing.assert_close(getattr(layout, item), getattr(expected, item))
    assert layout.partner.tolist() == [2, 3, 0, 1, 4, 5, 6, 7]


def test_an_attention_whose_rotation_cannot_be_read_is_not_observed_any_more() -> None:
    model = build("bert").train()
    first, second = find_attention(model)
    collector = opened(
        model,
        head_requests([first], average_rotation=True) + head_requests([second]),
    )
    loss_of(model, text()).backward()
    taken = collector.take()
    collector.close()
    assert collector.outdated
    assert (first.observed, second.observed) == (False, True)
    assert set(taken) == {f"{second.name}/query", f"{second.name}/key"}


def test_look_up_is_wrapped_only_while_needed_and_models_do_not_mix() -> None:
    original = AttentionInterface.get_interface
    first, second = build("llama"), build("llama")
    blocks = find_attention(first)
    plain = MomentCollector(first, [MomentRequest("x", "input", blocks[0].q)])
    assert AttentionInterface.get_interface is original, "inputs need no look-up"
    one = opened(first, head_requests(blocks))
    two = opened(second, head_requests(find_attention(second)))
    assert AttentionInterface.get_interface is not original and len(attention_heads.OBSERVERS) == 4
    batch = FAMILIES["llama"].batch()
    loss_of(first, batch).backward()
    assert two.take() == {} and len(one.take()) == 4
    one.close()
    one.close()
    assert AttentionInterface.get_interface is not original and len(attention_heads.OBSERVERS) == 2
    loss_of(second, batch).backward()
    assert len(two.take()) == 4 and one.take() == {}
    two.close()
    plain.close()
    assert AttentionInterface.get_interface is original and not attention_heads.OBSERVERS


def test_a_collector_without_references_restores_the_look_up() -> None:
    original = AttentionInterface.get_interface
    model = build("llama")
    blocks = find_attention(model)
    inputs = [MomentRequest(block.name, "input", block.q, block) for block in blocks]
    collector = opened(model, head_requests(blocks, average_rotation=True) + inputs)
    gone = weakref.ref(collector), weakref.ref(model)
    assert collector.switch.held
    switch = collector.switch
    del model, collector, blocks, inputs
    gc.collect()
    assert [reference() for reference in gone] == [None, None] and not switch.held
    assert AttentionInterface.get_interface is original and not attention_heads.OBSERVERS


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_heads_count_once(reentrant: bool) -> None:
    taken = []
    for checkpointed in (True, False):
        model = build("llama")
        if checkpointed:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        collector = opened(model, head_requests(find_attention(model), average_rotation=True))
        loss_of(model, FAMILIES["llama"].batch()).backward()
        taken.append(collector.take())
        collector.close()
    assert taken[0].keys() == taken[1].keys()
    for key in taken[0]:
        torch.testing.assert_close(taken[0][key].sum, taken[1][key].sum)
        torch.testing.assert_close(taken[0][key].count, taken[1][key].count)
