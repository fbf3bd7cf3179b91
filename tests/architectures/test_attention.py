"""Which modules are q, k, v and o, and what their heads are, family by family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.bark.configuration_bark import BarkSemanticConfig
from transformers.models.bark.modeling_bark import BarkSelfAttention
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoBiMultiHeadAttention,
)

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.attention_block import (
    AttentionBlock,
    Heads,
    declare_attention,
    forget_attention,
)
from hf_precond.registry import create_optimizer
from hf_precond.statistics import attention_heads
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import MomentRequest
from tests.architectures.families import FAMILIES, TEXT, build, loss_of


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_read(name: str) -> None:
    family = FAMILIES[name]
    blocks = find_attention(build(name, torch.float32))
    assert len(blocks) == family.attentions
    assert sum(block.cross for block in blocks) == family.cross
    for block in blocks:
        assert block.q.name.endswith(family.query)
        assert block.o is not None and block.o.name.endswith(family.output)
        if name != "swin":
            assert block.heads == Heads(4, family.key_value, family.size, family.size)
        heads = block.heads
        assert block.q.shape[0] == heads.query * heads.size
        assert block.k.shape[0] == heads.key_value * heads.size
        assert block.v.shape[0] == heads.key_value * heads.value_size
        assert block.o.shape[1] == heads.query * heads.value_size
        assert block.trainable == {"q", "k", "v", "o"}
        assert (block.rotary, block.normed) == (family.rotary, family.normed)
        assert family.observed is None or block.observed == family.observed


def test_swin_heads_grow_with_the_stages() -> None:
    blocks = find_attention(build("swin", torch.float32))
    assert [block.heads for block in blocks] == [Heads(4, 4, 4, 4), Heads(8, 8, 4, 4)]


def test_deberta_says_that_position_terms_are_left_out() -> None:
    assert "content" in find_attention(build("deberta-v2", torch.float32))[0].note


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gpt-neox", "modernbert", "t5", "qwen3"])
def test_heads_of_the_matrices_are_those_that_the_kernel_sees(name: str) -> None:
    """Rows of q, k found here, times the input, are the queries and keys of the kernel."""
    model = build(name).eval()
    found = compare_with_the_kernel(model, lambda: loss_of(model, FAMILIES[name].batch()))
    assert found or FAMILIES[name].observed is None


def gated() -> nn.Module:
    """A Qwen3-Next whose second layer has an attention, its queries beside a gate."""
    torch.manual_seed(0)
    config = tf.Qwen3NextConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1],
        attention_bias=True,
    )  # fmt: skip
    return tf.Qwen3NextForCausalLM(config).double()


def test_queries_beside_a_gate() -> None:
    model = gated().eval()
    tokens = torch.arange(12).reshape(2, 6)
    assert compare_with_the_kernel(model, lambda: model(input_ids=tokens)) == 1

    linear, block = find_attention(model)
    assert "convolution" in linear.note and "gate" in block.note
    weight = block.q.weight_parameter.detach()
    by_head = weight.unflatten(0, (block.heads.query, 2, block.heads.size))
    for scope, matrices in (("attention", "qkvo"), ("all_linear", "qkvo+gate")):
        optimizer = create_optimizer(model, "afopt", scope=scope)
        inside = [m for m in optimizer.structure.matrices if m.module in block.module.children()]
        assert len(inside) == len(matrices.split("+")[0]) + ("+" in matrices)
        for matrix in inside:
            if matrix.name.endswith(("[q]", "[gate]")):
                half = by_head[:, int("gate" in matrix.name)]
                assert torch.equal(matrix.weight_view(weight), half)
        reason = optimizer.routing["model.layers.1.self_attn.q_proj.weight"].reason
        assert ("gate by the fallback optimizer" in reason) == (scope == "attention")
        optimizer.close()


def compare_with_the_kernel(model: nn.Module, run: Callable[[], object]) -> int:
    """Number of attentions of which rows of q and k times the input were what the kernel saw."""
    blocks = {block.module: block for block in find_attention(model) if block.observed}
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    inputs: dict[nn.Module, torch.Tensor] = {}
    for block in blocks.values():
        for role in ("q", "k"):
            matrix = block.roles()[role]
            matrix.module.register_forward_pre_hook(
                lambda module, args, key=(block.module, role): inputs.__setitem__(key, args[0])
            )

    def see(module: nn.Module, call: attention_heads.Call) -> None:
        seen[module] = (call.query, call.key)

    attention_heads.observe(blocks, see)
    with torch.no_grad():
        run()
    attention_heads.stop_observing(blocks, see)
    assert set(seen) == set(blocks)
    for module, block in blocks.items():
        for role, vectors, heads in (
            ("q", seen[module][0], block.heads.query),
            ("k", seen[module][1], block.heads.key_value),
        ):
            matrix = block.roles()[role]
            weight = matrix.read()
            x = inputs[module, role]
            if matrix.bias is not None:
                x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
            mine = (x @ weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)
            if block.normed:
                norm = getattr(module, f"{role}_norm")
                mine = norm(mine)
            # A rotation keeps the norm of every vector, and leaves position 0 as it is.
            torch.testing.assert_close(mine.norm(dim=-1), vectors.norm(dim=-1))
            torch.testing.assert_close(mine[:, :, 0], vectors[:, :, 0])
            if not block.rotary:
                torch.testing.assert_close(mine, vectors)
    return len(blocks)


class GatedMLP(nn.Module):
    """Names and sizes of an attention, and none in it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_heads = 4
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.v_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x).sigmoid() * self.k_proj(x) + self.v_proj(x))


class AttentionMLP(GatedMLP):
    """Even its class is called so."""


class Mixer(nn.Module):
    """An attention that nobody could know."""

    def __init__(self) -> None:
        super().__init__()
        self.groups_of_heads = 4
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)
        self.c, self.d = nn.Linear(16, 8), nn.Linear(16, 16)
        self.abc = nn.Linear(16, 32)


def test_an_mlp_with_the_names_is_not_an_attention() -> None:
    assert find_attention(nn.Sequential(GatedMLP(), AttentionMLP())) == []


def test_shapes_must_fit_the_heads() -> None:
    class SomeAttention(nn.Module):
        __init__ = GatedMLP.__init__

    good, bad = SomeAttention(), SomeAttention()
    bad.num_heads = 5
    assert len(find_attention(nn.Sequential(good, bad))) == 1


@pytest.mark.parametrize("target", ["Mixer", Mixer, "layers.*"])
def test_declared_attention_is_found(target: object) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Mixer()])})
    assert find_attention(model) == []
    declaration = declare_attention(
        target,
        query="a",
        key="b",
        value="c",
        output="d",
        heads="groups_of_heads",
        key_value_heads=2,
        rotary=True,
    )
    try:
        (block,) = find_attention(model)
    finally:
        forget_attention(declaration)
    assert block.name == "layers.0"
    assert block.heads == Heads(4, 2, 4, 4)
    assert [m.name for m in block.roles().values()] == [f"layers.0.{x}" for x in "abcd"]
    assert block.rotary and not block.normed and not block.cross
    assert find_attention(model) == []


def test_declared_fused_attention_is_split() -> None:
    model = Mixer()
    declaration = declare_attention(
        "Mixer", fused="abc", output="d", heads=4, key_value_heads=2, layout="interleaved"
    )
    try:
        (block,) = find_attention(model)
    finally:
        forget_attention(declaration)
    rows = model.abc.weight.detach().view(2, 16, 16)
    weight = block.q.weight_view(model.abc.weight).reshape(16, 16)
    torch.testing.assert_close(weight, rows[:, :8].reshape(16, 16))
    torch.testing.assert_close(
        block.v.weight_view(model.abc.weight).reshape(8, 16), rows[:, 12:].reshape(8, 16)
    )


def test_wrong_declarations_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match="give query, key and value, or fused"):
        declare_attention("Mixer", query="a", key="b", heads=4)
    declaration = declare_attention("Mixer", query="a", key="b", value="nope", heads=4)
    try:
        with pytest.raises(ValueError, match=r"Its children are a, b, c, d, abc"):
            find_attention(Mixer())
    finally:
        forget_attention(declaration)


def test_lora_pairs_are_adapters_of_the_frozen_matrices() -> None:
    model = get_peft_model(
        build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    )
    for block in find_attention(model):
        assert block.trainable == frozenset()
        assert set(block.adapters) == {"q", "v"}
        pair = block.adapters["q"]
        assert pair.down.shape == (2, 16) and pair.up.shape == (16, 2)
        torch.nn.init.normal_(pair.up.weight_parameter)
        wrapper = model.get_submodule(block.q.name.removesuffix(".base_layer"))
        torch.testing.assert_close(
            block.effective("q"), wrapper.base_layer.weight + wrapper.get_delta_weight("default")
        )
        torch.testing.assert_close(block.effective("k"), block.k.read())


def test_lora_on_a_fused_weight_has_one_down_and_the_rows_of_up() -> None:
    model = get_peft_model(
        build("gpt2"), LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=2)
    )
    block = find_attention(model)[0]
    pairs = [block.adapters[role] for role in "qkv"]
    assert pairs[0].down is pairs[1].down is pairs[2].down
    up = pairs[0].up.weight_parameter
    torch.nn.init.normal_(up)
    torch.testing.assert_close(torch.cat([pair.up.read() for pair in pairs]), up.detach())
    merged = model.get_submodule(block.q.name.partition("[")[0].removesuffix(".base_layer"))
    whole = merged.base_layer.weight.T + (
        merged.scaling["default"] * up @ merged.lora_A["default"].weight
    )
    torch.testing.assert_close(block.effective("k")[:, :-1], whole[16:32])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_scales_the_rows_of_the_sum(name: str) -> None:
    target = {"llama": "q_proj", "gpt2": "c_attn"}[name]
    config = LoraConfig(target_modules=[target], r=2, use_dora=True, fan_in_fan_out=name == "gpt2")
    model = get_peft_model(build(name), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.rand_like(parameter))
    block = find_attention(model)[0]
    layer = dict(model.named_modules())[block.adapters["q"].down.name.split(".lora_A")[0]]
    x = torch.randn(5, block.q.shape[1], dtype=torch.float64)
    outputs = layer(x)[:, : block.q.shape[0]]
    weight = block.effective("q")
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)[:, : weight.shape[1]]
    torch.testing.assert_close(rows @ weight.mT, outputs)


def test_an_adapter_of_another_form_is_not_one() -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, alora_invocation_tokens=[1]
    )
    assert find_attention(get_peft_model(build("llama"), config))[0].adapters == {}


def test_multihead_attention_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True).double().eval()
    inner, outer = find_attention(layer)
    assert (inner.name, inner.cross) == ("self_attn", False)
    assert (outer.name, outer.cross) == ("multihead_attn", True)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    weights = inner.module(x, x, x, average_attn_weights=False)[1]
    rows = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    q, k = ((rows @ m.read().T).unflatten(-1, (4, 4)).transpose(1, 2) for m in (inner.q, inner.k))
    torch.testing.assert_close((q @ k.mT / 2).softmax(-1), weights)


def test_requests_for_unobservable_heads_say_what_to_do() -> None:
    model = build("mpnet", torch.float32)
    block = find_attention(model)[0]
    with pytest.raises(ValueError, match="rope='ignored'"):
        MomentCollector(model, [MomentRequest("k", "key", block.k, block)])


@pytest.mark.parametrize(
    ("name", "scale"), [("bert", 0.5), ("t5", 1.0), ("deberta-v2", (4 * 3) ** -0.5)]
)
def test_what_the_logits_are_multiplied_with(name, scale):
    for block in find_attention(build(name)):
        assert block.logit_scale == pytest.approx(scale)


def test_logits_of_gpt_neo_are_not_scaled():
    """Read off its weights: log p of two keys differs by the logits' difference."""
    config = tf.GPTNeoConfig(
        vocab_size=40, hidden_size=16, num_layers=1, num_heads=4, attention_dropout=0.0,
        attention_types=[[["global"], 1]], intermediate_size=24, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager", embed_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.GPTNeoModel(config).double()
    (block,) = find_attention(model)
    seen = []
    block.q.module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    found = model(torch.arange(3, 10)[None], output_attentions=True).attentions[0]
    q, k = (seen[0] @ getattr(block, role).read().T for role in "qk")
    q, k = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in (q, k))
    logits = (q @ k.mT * block.logit_scale)[..., -1, :]
    differences = found[..., -1, :].log().diff(dim=-1)
    torch.testing.assert_close(differences, logits.diff(dim=-1))


def test_attentions_across_that_share_a_rotating_class_are_not_rotated():
    """Moonshine's cross-attention: its rotation could not be read, and training stopped."""
    config = tf.MoonshineConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    blocks = find_attention(tf.MoonshineForConditionalGeneration(config))
    assert [(block.cross, block.rotary) for block in blocks] == [
        (False, True), (False, True), (True, False)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["relative_key", "relative", "rotary", None])
def test_conformers_rotate_what_q_and_k_read(kind: str | None) -> None:
    """A first pass stopped in search of a rotation of the queries, whatever the kind."""
    small = TEXT | {"vocab_size": 40}
    config = tf.Wav2Vec2BertConfig(
        **small, feature_projection_input_dim=8, position_embeddings_type=kind,
        apply_spec_augment=False, layerdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Wav2Vec2BertForSequenceClassification(config).train()
    optimizer = create_optimizer(model, "afopt", lr=1e-3, stat_interval=1)
    before = model.wav2vec2_bert.encoder.layers[0].self_attn.linear_q.weight.detach().clone()
    for _ in range(2):
        batch = {"input_features": torch.randn(2, 9, 8), "labels": torch.tensor([0, 1])}
        model(**batch).loss.backward()
        optimizer.step()
    assert not any(block.rotary for block in optimizer.structure.attention)
    after = model.wav2vec2_bert.encoder.layers[0].self_attn.linear_q.weight
    assert (after - before).abs().max() > 1e-4
    optimizer.close()


def computed(block: AttentionBlock, x: torch.Tensor, memory: torch.Tensor) -> list[torch.Tensor]:
    """Attention weights and output, from the matrices and heads that were found."""

    def split(role: str, rows: torch.Tensor) -> torch.Tensor:
        matrix = block.roles()[role].read()
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)[..., : matrix.shape[1]]
        return (rows @ matrix.mT).unflatten(-1, (block.heads_of(role), -1)).transpose(1, 2)

    logits = split("q", x) @ split("k", memory).mT * block.logit_scale
    weights = logits.softmax(-1)
    return [weights, split("o", (weights @ split("v", memory)).transpose(1, 2).flatten(2))[:, 0]]


def test_projections_of_grounding_dinos_fusion() -> None:
    """Image to text; the values and outputs of text to image are other linear layers."""
    torch.manual_seed(0)
    config = tf.GroundingDinoConfig(d_model=12, encoder_ffn_dim=32, encoder_attention_heads=4)
    module = GroundingDinoBiMultiHeadAttention(config).double().eval()
    (block,) = find_attention(module)
    assert block.heads == Heads(2, 2, 8, 8) and block.reads("k") == block.reads("v") == "context"
    image, words = (torch.randn(2, n, 12, dtype=torch.float64) for n in (7, 5))
    (output, weights), _ = module(image, words)
    expected, made = computed(block, image, words)
    torch.testing.assert_close(weights.view(expected.shape), expected)
    torch.testing.assert_close(output, made)


def test_projections_of_bark() -> None:
    torch.manual_seed(0)
    config = BarkSemanticConfig(hidden_size=16, num_heads=2, block_size=8, bias=True, dropout=0.0)
    module = BarkSelfAttention(config).double().eval()
    (block,) = find_attention(module)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], computed(block, x, x)[1])


@pytest.mark.skipif(not hasattr(tf, "Kolibri1Config"), reason="a later release has it")
def test_global_layers_of_kolibri_are_not_rotated():
    types = ["sliding_attention", "full_attention"]
    config = tf.Kolibri1Config(**TEXT, num_key_value_heads=2, layer_types=types)
    blocks = find_attention(tf.Kolibri1ForCausalLM(config))
    assert [block.rotary for block in blocks] == [True, False]
