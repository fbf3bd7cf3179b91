"""Queries and keys that are sums of content and position, or hold both side by side."""

import pytest
import torch
from torch import nn
from transformers import ConditionalDetrConfig, DabDetrConfig
from transformers.models.conditional_detr import modeling_conditional_detr as conditional
from transformers.models.dab_detr import modeling_dab_detr as dab

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.attention_block import Heads
from hf_precond.optimizers.afopt.variants import logit_change
from hf_precond.registry import create_optimizer
from tests.optimizers.afopt.support import directions, inputs
from tests.optimizers.afopt.test_latent import damped_inverse, second

DOUBLE = torch.float64
D, H, SIZE = 16, 2, 8
FIELDS = {"scope": "attention", "stat_interval": 1, "momentum": 0.0, "nesterov": False}


def eager(module, query, key, value, mask, scaling, **options):
    module.vectors = query, key
    module.logits = query @ key.mT * scaling
    out = module.logits.softmax(-1) @ value
    return out.transpose(1, 2), None


class Layer(nn.Module):
    """A decoder layer's attention; across, of the first or of a later layer."""

    def __init__(self, cross, first=True):
        super().__init__()
        sizes = {"d_model": D, "decoder_attention_heads": H, "encoder_attention_heads": H}
        config = ConditionalDetrConfig(**sizes)
        config._attn_implementation = "eager"
        kind = (
            conditional.ConditionalDetrDecoderCrossAttention
            if cross
            else conditional.ConditionalDetrDecoderSelfAttention
        )
        self.attention = kind(config, D, H)
        if cross and not first:
            self.attention.q_pos_proj = None
        self.cross, self.first = cross, first
        self.double()

    def forward(self, tensors):
        x, position, memory, places, sine = tensors
        if not self.cross:
            return self.attention(x, position)[0]
        given = position if self.first else None
        return self.attention(
            x,
            encoder_hidden_states=memory,
            query_sine_embed=sine,
            encoder_position_embeddings=places,
            query_position_embeddings=given,
        )[0]


KINDS = {"self": (False,), "first across": (True, True), "across": (True, False)}
ROLES = {
    "self": {"q", "k", "v", "o", "q_pos", "k_pos"},
    "first across": {"q", "k", "v", "o", "q_pos", "k_pos", "q_sine"},
    "across": {"q", "k", "v", "o", "k_pos", "q_sine"},
}


@pytest.fixture(autouse=True)
def kept_logits(monkeypatch):
    monkeypatch.setattr(conditional, "eager_attention_forward", eager)


def made(kind, **fields):
    torch.manual_seed(0)
    layer = Layer(*KINDS[kind]).train()
    optimizer = create_optimizer(layer, "afopt", **(FIELDS | fields))
    lengths = 9, 9, 7, 7, 9
    tensors = [inputs(1, n, D, spread=10.0, shift=0.2, seed=seed) for seed, n in enumerate(lengths)]
    output = layer(tensors)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    (output * target).sum().backward()
    return layer, optimizer, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found(kind):
    (block,) = find_attention(Layer(*KINDS[kind]))
    assert set(block.roles()) == block.trainable == ROLES[kind]
    assert block.heads == Heads(H, H, SIZE * (1 if kind == "self" else 2), SIZE)
    assert block.observed and block.cross == (kind != "self")
    assert block.logit_scale == block.module.scaling
    spans = {role: block.span(role) for role in ROLES[kind] - {"v", "o"}}
    front, behind, both = (0, SIZE), (SIZE, 2 * SIZE), (0, 2 * SIZE)
    expected = {"q": front, "k": front, "q_pos": front, "k_pos": front}
    if kind != "self":
        expected |= {"q_sine": behind, "k_pos": both if kind == "first across" else behind}
    assert spans == {role: expected[role] for role in spans}


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_change_of_the_logits_is_the_one_really_seen(kind):
    layer, optimizer, tensors = made(kind, scaling="cap", rho=1.0)
    before, size = layer.attention.logits.detach().clone(), 1e-6
    steps = directions(optimizer)
    assert set(steps) == ROLES[kind]
    for plan in [plan for plan in optimizer.plan.matrices if plan.role not in "vo"]:
        predicted = logit_change(optimizer, [plan], steps[plan.role][None]).item()
        matrix = plan.bound.matrix
        weight, bias = matrix.split(steps[plan.role])
        with torch.no_grad():
            matrix.weight_parameter.add_(weight, alpha=size)
            matrix.bias_parameter.add_(bias, alpha=size)
            layer(tensors)
            matrix.weight_parameter.sub_(weight, alpha=size)
            matrix.bias_parameter.sub_(bias, alpha=size)
        change = (layer.attention.logits - before) / size
        assert predicted == pytest.approx(change.square().mean().sqrt().item(), rel=1e-4), plan.role
    optimizer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_direction_is_the_gradient_between_its_inverses(kind):
    layer, optimizer, tensors = made(kind, direction="inverse", damping=0.3)
    (block,) = optimizer.structure.attention
    found = directions(optimizer)
    x, position, memory, places, sine = (second(tensor, bias=True) for tensor in tensors)
    queries, keys = (
        torch.stack([second(part[:, h]) for h in range(H)]) for part in layer.attention.vectors
    )
    outputs = layer.attention.o_proj.weight.detach().unflatten(1, (H, SIZE)).transpose(0, 1)
    right = {"q": x, "k": x, "v": x, "q_pos": position, "k_pos": position}
    if block.cross:
        right |= {"k": memory, "v": memory, "k_pos": places, "q_sine": sine}
    both = torch.cat([torch.eye(SIZE, dtype=DOUBLE)] * 2)
    for role, moment in right.items():
        if role not in found:
            continue
        met = keys if role[0] == "q" else queries
        start, stop = (0, 0) if role == "v" else block.span(role)
        left = outputs.mT @ outputs if role == "v" else met[:, start:stop, start:stop]
        if role == "k_pos" and kind == "first across":
            left = both.mT @ met @ both
        matrix = block.roles()[role]
        gradient = matrix.join(matrix.weight_parameter.grad, matrix.bias_parameter.grad)
        parts = gradient.unflatten(0, (H, -1))
        expected = damped_inverse(left, 0.3) @ parts @ damped_inverse(moment, 0.3)
        torch.testing.assert_close(found[role], expected.flatten(0, 1), rtol=1e-8, atol=1e-12)
    optimizer.close()


def test_where_nothing_is_seen_keys_have_the_sum_of_their_parts():
    """DAB-DETR's, which does not call transformers' kernels: positions stand twice in the keys."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "decoder_attention_heads": H, "encoder_attention_heads": 4}
    layer = dab.DabDetrDecoderLayerCrossAttention(DabDetrConfig(**sizes), is_first=True).double()
    optimizer = create_optimizer(layer.train(), "afopt", **FIELDS)
    (block,) = optimizer.structure.attention
    assert set(block.roles()) == ROLES["first across"] and not block.observed
    assert block.heads == Heads(H, H, 2 * SIZE, SIZE)
    assert block.logit_scale == layer.cross_attn.scaling
    x, memory, position, places, sine = (
        inputs(2, n, D, spread=10.0, seed=seed) for seed, n in enumerate((9, 7, 9, 7, 9))
    )
    layer(x, memory, position, places, query_sine_embed=sine)[0].square().sum().backward()
    directions(optimizer)

    def images(projection, tensor):
        return torch.stack(
            [second(part) for part in projection(tensor).unflatten(-1, (H, -1)).unbind(-2)]
        )

    content = images(layer.cross_attn_key_content_proj, memory)
    behind = images(layer.cross_attn_key_pos_proj, places)
    expected = torch.cat([torch.cat([behind, behind], 1)] * 2, 2)
    expected[:, :SIZE, :SIZE] += content
    torch.testing.assert_close(optimizer.factors.vector_moment(block, "k"), expected)
    optimizer.close()
