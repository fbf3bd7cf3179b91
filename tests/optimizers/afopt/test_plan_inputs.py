"""The factor of a matrix is of the tensors that its layer was called with, whichever they are."""

import contextlib
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

from hf_precond.architectures.attention_block import declare_attention, forget_attention
from hf_precond.distributed import collectives
from hf_precond.registry import create_optimizer
from tests import ranks
from tests.architectures.families import FAMILIES, TEXT, build, loss_of, text

ROWS, LENGTH = 3, 7
CHANNELS = {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "vocab_size": 40}


def _perceiver(width):
    config = tf.PerceiverConfig(
        num_latents=5, d_latents=16, d_model=width, num_blocks=1, num_self_attends_per_block=1,
        max_position_embeddings=LENGTH, qk_channels=16, v_channels=16, **CHANNELS,
    )  # fmt: skip
    batch = text() | {"attention_mask": torch.ones(ROWS, LENGTH)}
    return tf.PerceiverForSequenceClassification(config), {"inputs": batch.pop("input_ids")} | batch


def _mobilebert():
    widths = {"intra_bottleneck_size": 8, "embedding_size": 8, "true_hidden_size": 8}
    config = tf.MobileBertConfig(**TEXT, **widths)
    return tf.MobileBertForSequenceClassification(config), text()


def _pix2struct():
    config = tf.Pix2StructTextConfig(
        vocab_size=40, hidden_size=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4,
        initializer_range=0.02,
    )  # fmt: skip
    batch = text() | {"encoder_hidden_states": torch.randn(ROWS, 5, 16)}
    return tf.Pix2StructTextModel(config), batch | {"labels": batch["input_ids"]}


def _segformer():
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], patch_sizes=[3, 3], strides=[2, 2],
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    return tf.SegformerForImageClassification(config), batch


MODELS = {
    "perceiver": lambda: _perceiver(24),
    "perceiver, equal widths": lambda: _perceiver(16),
    "mobilebert": _mobilebert,
    "pix2struct": _pix2struct,
    "segformer": _segformer,
}


def inputs_of(modules):
    """What layers are called with, as rows, from now on."""
    seen = {module: [] for module in modules}
    for module, rows in seen.items():
        module.register_forward_hook(
            lambda _, args, output, rows=rows: rows.append(args[0].detach())
        )
    return seen


def moment(rows, constant, mask=None):
    kept = rows.new_ones(rows.shape[:-1]) if mask is None else mask.to(rows)
    full = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if constant else rows
    return torch.einsum("bt,bti,btj->ij", kept, full, full) / kept.sum()


def assert_factors_are_of_their_own_inputs(optimizer, run, mask=None):
    """After a pass, each input moment that was taken is of what its layer was called with."""
    seen = inputs_of({t.bound.matrix.module for t in optimizer.plan.matrices})
    run()
    taken = optimizer.statistics.take()
    for plan in optimizer.plan.matrices:
        matrix = plan.bound.matrix
        (rows,) = seen[matrix.module]
        kept = mask if mask is not None and mask.shape == rows.shape[:2] else None
        actual = taken[plan.right.moment.request.key]
        size = matrix.columns
        mean = (actual.sum / actual.count)[:size, :size]
        expected = moment(rows, matrix.bias is not None, kept)
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12, msg=matrix.name)


@pytest.mark.parametrize("name", MODELS)
def test_every_factor_is_of_its_own_layers_inputs(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model = model.double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    optimizer = create_optimizer(model, "afopt", scope="attention")
    assert_factors_are_of_their_own_inputs(
        optimizer, lambda: model(**batch).loss.backward(), batch.get("attention_mask")
    )
    optimizer.step()


def test_relative_positions_of_deberta_are_no_tokens():
    """Its query and key projections are called with 1,024 relative positions too."""
    model, batch = build("deberta-v2"), text()
    optimizer = create_optimizer(model, "afopt", scope="attention")
    model(**batch).loss.backward()
    counts = {actual.count.item() for actual in optimizer.statistics.take().values()}
    assert counts == {batch["attention_mask"].sum().item()}


class Memory(nn.Module):
    """Queries, keys and values of three tensors and widths, as DETR's decoder has them."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, kdim=6, vdim=10, batch_first=True)

    def forward(self, query, key, value):
        return self.attend(query, key, value, need_weights=False)[0]


def test_multihead_attention_of_three_tensors():
    torch.manual_seed(0)
    model = Memory().double()
    optimizer = create_optimizer(model, "afopt", scope="attention", momentum=0.0)
    tensors = {r: torch.randn(2, 5, n).double() for r, n in zip("qkv", (16, 6, 10), strict=True)}
    model(*tensors.values()).square().sum().backward()
    optimizer.step()
    for plan in optimizer.plan.matrices:
        if plan.role in tensors:
            actual = plan.right.moment.read(optimizer.state)
            constant = plan.bound.matrix.bias is not None
            torch.testing.assert_close(actual, moment(tensors[plan.role], constant))


class StridedAttention(nn.Module):
    """A class of no table, whose keys and values are of every other token."""

    def __init__(self, value="memory"):
        super().__init__()
        self.num_heads, self.value = 2, value
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.v_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        memory = x[:, ::2]
        value = {"memory": memory, "copy": memory.clone(), "own": memory + 1}[self.value]
        q, k, v = self.q_proj(x), self.k_proj(memory), self.v_proj(value)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SameAttention(StridedAttention):
    def forward(self, x):
        return self.o_proj(self.q_proj(x) * self.k_proj(x.clone()) + self.v_proj(x))


def strided(value="memory", kind=StridedAttention, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), kind(value)).double()
    return model, create_optimizer(model, "afopt", scope="attention", stat_interval=1, **fields)


@pytest.mark.parametrize(("value", "roles"), [("memory", "k"), ("copy", "k"), ("own", "kv")])
def test_separate_inputs_of_an_unknown_class_are_found_in_the_first_pass(value, roles):
    model, optimizer = strided(value)
    x = torch.randn(3, 6, 8).double()
    model(x).square().sum().backward()
    with pytest.warns(UserWarning, match=rf"pass separate_inputs=\[{', '.join(map(repr, roles))}"):
        optimizer.step()
    assert optimizer.structure.attention[0].separate_inputs == set(roles)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = lambda: model(x).square().sum().backward()  # noqa: E731
        assert_factors_are_of_their_own_inputs(optimizer, run)
        optimizer.step()
    assert not model[1].q_proj._forward_pre_hooks


@pytest.mark.parametrize("kind", [StridedAttention, SameAttention])
def test_inputs_that_are_as_declared_or_equal_raise_no_warning(kind):
    declaration = declare_attention(
        StridedAttention, query="q_proj", key="k_proj", value="v_proj", output="o_proj", heads=2,
        separate_inputs=("k",) if kind is StridedAttention else (),
    )  # fmt: skip
    try:
        model, optimizer = strided(kind=kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = lambda: model(torch.randn(3, 6, 8).double()).sum().backward()  # noqa: E731
            assert_factors_are_of_their_own_inputs(optimizer, run)
    finally:
        forget_attention(declaration)


def separate_on_one_rank():
    model, optimizer = strided()
    for step in range(2):
        optimizer.zero_grad()
        # The first pass of the other rank leaves the attention out.
        used = step == 1 or collectives.rank() == 0
        x = torch.randn(3, 6, 8).double()
        (model(x) if used else model[0](x)).square().sum().backward()
        optimizer.step()
    return sorted(optimizer.structure.attention[0].separate_inputs)


def test_every_rank_follows_the_one_that_saw_separate_inputs():
    assert ranks.run(separate_on_one_rank) == [["k"], ["k"]]


class Opaque:
    """Cosines and sines that only the model can read."""

    def __init__(self, pair):
        self.pair = pair

    def __iter__(self):
        return iter(self.pair)


def hide(module, args, kwargs):
    return args, kwargs | {"position_embeddings": Opaque(kwargs["position_embeddings"])}


def test_a_rotation_that_cannot_be_read_is_ignored_with_a_warning():
    """The first step fails no more: from then on the factors are those of rope='ignored'."""
    weights = []
    for rope, hidden in (("averaged", True), ("ignored", False)):
        model = build("llama")
        for layer in model.model.layers if hidden else ():
            layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True)
        optimizer = create_optimizer(
            model, "afopt", rope=rope, stat_interval=1, inverse_interval=1, lr=1e-3
        )
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, FAMILIES["llama"].batch()).backward()
            told = pytest.warns(UserWarning, match="2 attentions .* cannot be read")
            with told if hidden and step == 0 else contextlib.nullcontext():
                optimizer.step()
        weights.append([parameter.detach() for parameter in model.parameters()])
        optimizer.close()
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
