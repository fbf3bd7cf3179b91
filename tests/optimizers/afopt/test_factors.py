"""AFOpt's layouts and limits: fused, padded, grouped, rotated, blocked, crossed, zero."""

import pytest
import torch
from torch import nn

from hf_precond.architectures.attention_block import AttentionBlock, Heads
from hf_precond.architectures.structure import LayerMatrix, ModelStructure
from hf_precond.linalg.matrix_functions import pack
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.optimizer import AFOpt
from hf_precond.registry import create_optimizer
from hf_precond.statistics.collector import MomentCollector
from tests.optimizers.afopt.support import (
    Attention,
    backward,
    changes,
    directions,
    inputs,
    matrices_of,
    optimizer_of,
    spectral,
)
from tests.optimizers.models import batch, make, train_step, weights

DOUBLE = torch.float64


def test_fused_projection_equals_the_split_one():
    torch.manual_seed(0)
    split, x = Attention(d=16, heads=2), inputs(2, 12, 16)
    fused = Attention(d=16, heads=2, fused=True)
    with torch.no_grad():
        fused.qkv.weight.copy_(torch.cat([split.q.weight, split.k.weight, split.v.weight]))
        fused.qkv.bias.copy_(torch.cat([split.q.bias, split.k.bias, split.v.bias]))
        fused.o.load_state_dict(split.o.state_dict())
    for fields in ({}, {"direction": "inverse", "damping": 0.1}, {"scaling": "rms"}):
        for _ in range(2):
            for module in (split, fused):
                optimizer = spectral(module, momentum=0.9, lr=1e-2, **fields)
                backward(module, x)
                optimizer.step()
                optimizer.close()
        together = torch.cat([split.q.weight, split.k.weight, split.v.weight])
        torch.testing.assert_close(fused.qkv.weight, together, rtol=0, atol=1e-12)
        together = torch.cat([split.q.bias, split.k.bias, split.v.bias])
        torch.testing.assert_close(fused.qkv.bias, together, rtol=0, atol=1e-12)
        torch.testing.assert_close(fused.o.weight, split.o.weight, rtol=0, atol=1e-12)


def test_padded_tokens_change_nothing():
    name, steps = "bert", []
    for pad in (0, 4):
        model = make(name, dtype=DOUBLE)
        optimizer = create_optimizer(model, "afopt", lr=1e-2, scope="all_linear")
        data = batch(name, dtype=DOUBLE)
        for key, fill in (("input_ids", 7), ("attention_mask", 0)):
            data[key] = nn.functional.pad(data[key], (0, pad), value=fill)
        train_step(model, optimizer, data)
        steps.append(weights(model))
    for key, value in steps[0].items():
        if "position" not in key:
            torch.testing.assert_close(value, steps[1][key], rtol=0, atol=1e-9)


def test_two_copies_of_a_batch_are_one():
    steps = []
    for copies in (1, 2):
        model = make("llama", dtype=DOUBLE)
        optimizer = create_optimizer(model, "afopt", lr=1e-2, scope="all_linear")
        data = {k: torch.cat([v] * copies) for k, v in batch("llama", dtype=DOUBLE).items()}
        train_step(model, optimizer, data)
        steps.append(weights(model))
    for key, value in steps[0].items():
        torch.testing.assert_close(value, steps[1][key], rtol=0, atol=1e-9)


def test_grouped_queries_share_the_keys_of_tied_heads():
    """The key's direction under groups: its summed gradient between A_X and ΣA_Q."""
    torch.manual_seed(1)
    grouped, x = Attention(d=16, heads=4, kv_heads=2), inputs(2, 12, 16)
    tied = Attention(d=16, heads=4)
    with torch.no_grad():
        tied.q.load_state_dict(grouped.q.state_dict())
        tied.o.load_state_dict(grouped.o.state_dict())
        for name in "kv":
            for kind in ("weight", "bias"):
                source = getattr(getattr(grouped, name), kind)
                repeated = source.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
                getattr(getattr(tied, name), kind).copy_(repeated)
    actual = {}
    for module in (grouped, tied):
        optimizer = optimizer_of(module, damping=0.1)
        backward(module, x)
        actual[module] = (optimizer, directions(optimizer))
    ours, theirs = actual[grouped][1], actual[tied][1]
    torch.testing.assert_close(ours["q"], theirs["q"], rtol=0, atol=1e-9)
    gradient = tied.k.weight.grad.unflatten(0, (2, 2, 4)).sum(1).flatten(0, 1)
    torch.testing.assert_close(grouped.k.weight.grad, gradient, rtol=0, atol=1e-12)
    block = actual[tied][0].structure.attention[0]
    queries = actual[tied][0].factors.vector_moment(block, "q").unflatten(0, (2, 2)).sum(1)
    moment = actual[tied][0].plan.moments[0].read(actual[tied][0].state)
    full = torch.cat([grouped.k.weight.grad, grouped.k.bias.grad[:, None]], 1)
    mean = moment.diagonal().mean()
    right = torch.linalg.inv(moment + 0.1 * mean * torch.eye(17, dtype=DOUBLE))
    for head in range(2):
        shift = 0.1 * queries[head].diagonal().mean() * torch.eye(4, dtype=DOUBLE)
        expected = torch.linalg.inv(queries[head] + shift) @ full[head * 4 : head * 4 + 4] @ right
        torch.testing.assert_close(
            ours["k"][head * 4 : head * 4 + 4], expected, rtol=1e-8, atol=1e-10
        )


def rotation(position, size, theta=10000.0):
    """R_i of a head in the half-split layout, dense."""
    half = size // 2
    matrix = torch.zeros(size, size, dtype=DOUBLE)
    for pair in range(half):
        angle = torch.tensor(position * theta ** (-2 * pair / size), dtype=DOUBLE)
        matrix[pair, pair] = matrix[pair + half, pair + half] = angle.cos()
        matrix[pair, pair + half], matrix[pair + half, pair] = -angle.sin(), angle.sin()
    return matrix


def test_rotated_moments_are_averaged_over_positions():
    """M_K = mean_i R_iᵀ C R_i, C the moment of the rotated keys: by brute force."""
    model = make("llama", dtype=DOUBLE)
    optimizer = create_optimizer(model, "afopt", rope="averaged")
    data = batch("llama", dtype=DOUBLE)
    data["attention_mask"] = torch.ones_like(data["attention_mask"])
    attention = model.model.layers[0].self_attn
    seen = []
    handle = attention.k_proj.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    train_step(model, optimizer, data)
    handle.remove()
    keys = seen[0].unflatten(-1, (2, 4))
    rotations = torch.stack([rotation(i, 4) for i in range(8)])
    rotated = torch.einsum("tde,bthe->bthd", rotations, keys)
    second = torch.einsum("bthd,bthe->hde", rotated, rotated) / (6 * 8)
    expected = torch.einsum("ide,hdf,ifg->heg", rotations, second, rotations) / 8
    (moment,) = [m for m in optimizer.plan.moments if m.request.kind == "key"][:1]
    # The tables of transformers are float32 in a float64 model too.
    torch.testing.assert_close(moment.read(optimizer.state), expected, rtol=1e-6, atol=1e-9)


def test_one_position_makes_rotation_vanish():
    """At position 0 alone R is the identity: the averaged factor is the plain one."""
    actual = []
    for rope in ("averaged", "ignored"):
        model = make("llama", dtype=DOUBLE)
        optimizer = create_optimizer(model, "afopt", rope=rope, momentum=0.0)
        data = {"input_ids": torch.arange(6)[:, None]}
        model(**data).logits.square().sum().backward()
        actual.append(directions(optimizer))
    for role in "qk":
        torch.testing.assert_close(actual[0][role], actual[1][role], rtol=0, atol=1e-9)


def test_wide_inputs_in_diagonal_blocks():
    torch.manual_seed(2)
    module, x = Attention(d=16, heads=2), inputs(2, 20, 16, spread=10.0)
    dense = optimizer_of(module, roles="vo", direction="inverse", damping=0.3)
    backward(module, x)
    directions(dense)
    moments = [moment.read(dense.state) for moment in dense.plan.moments]
    dense.close()
    blocked = optimizer_of(module, roles="vo", direction="inverse", damping=0.3, max_dim=6)
    backward(module, x)
    actual = directions(blocked)
    for moment, role in zip(moments, "vo", strict=True):
        keep = torch.block_diag(*[torch.ones(6, 6)] * 3)[:17, :17].double()
        masked = moment * keep
        shift = 0.3 * moment.diagonal().mean() * torch.eye(17, dtype=DOUBLE)
        layer = getattr(module, role)
        gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        expected = gradient @ torch.linalg.inv(masked + shift)
        if role == "v":
            left = torch.stack([w.mT @ w for w in module.o.weight.detach().split(8, 1)])
            mean = left.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            left = torch.linalg.inv(left + 0.3 * mean * torch.eye(8, dtype=DOUBLE))
            expected = (left @ expected.unflatten(0, (2, 8))).flatten(0, 1)
        torch.testing.assert_close(actual[role], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("direction", ["spectral", "inverse"])
def test_blocks_of_one_are_the_dense_factor(direction):
    torch.manual_seed(3)
    module, x = Attention(d=16, heads=4), inputs(2, 20, 16)
    steps = []
    for max_dim in (16, 1024):
        optimizer = optimizer_of(module, direction=direction, damping=1.0, max_dim=max_dim)
        backward(module, x)
        steps.append(directions(optimizer))
        optimizer.close()
    for role in "qkvo":
        assert torch.equal(steps[0][role], steps[1][role])


def test_key_without_bias_uses_the_leading_block():
    """Whisper's k has no bias beside a q with one: its own root of A_X without the ones."""
    torch.manual_seed(4)
    module, x = Attention(d=16, heads=2), inputs(2, 20, 16, shift=1.0)
    module.k.bias = None
    parts = matrices_of(module)
    parts[1] = LayerMatrix("k", module.k)
    heads = Heads(2, 2, 8, 8)
    block = AttentionBlock("", module, *parts, heads=heads, trainable=frozenset("qkvo"))
    structure = ModelStructure(
        parts, [block], open_statistics=lambda requests: MomentCollector(module, requests)
    )
    config = AFOptConfig.create(direction="inverse", damping=0.1, momentum=0.0)
    optimizer = AFOpt(list(module.parameters()), structure, config)
    assert len(optimizer.requests()) == 2
    backward(module, x)
    actual = directions(optimizer)
    features = torch.cat([x, x.new_ones(2, 20, 1)], -1).flatten(0, 1)
    moment = (features.mT @ features / 40)[:16, :16]
    keys = torch.einsum("bhtd,bhte->hde", module.keys, module.keys).detach() / 40
    torch.testing.assert_close(optimizer.factors.vector_moment(block, "k"), keys)
    queries = torch.einsum("bhtd,bhte->hde", module.queries, module.queries).detach() / 40

    def damped(a):
        mean = a.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return torch.linalg.inv(a + 0.1 * mean * torch.eye(a.shape[-1], dtype=DOUBLE))

    parts = (module.k.weight.grad @ damped(moment)).unflatten(0, (2, 8))
    expected = (damped(queries) @ parts).flatten(0, 1)
    torch.testing.assert_close(actual["k"], expected, rtol=1e-8, atol=1e-10)


class Cross(Attention):
    """Queries from one sequence, keys and values from another."""

    def forward(self, pair):
        x, memory = pair
        q = self.split(self.q(x))
        k, v = self.split(self.k(memory)), self.split(self.v(memory))
        self.queries, self.keys = q, k
        values = (q @ k.mT / self.size**0.5).softmax(-1) @ v
        return self.o(values.transpose(-3, -2).flatten(-2))


def test_cross_attention_takes_each_side_from_its_own_sequence():
    torch.manual_seed(5)
    module = Cross(d=16, heads=2)
    x, memory = inputs(2, 6, 16, seed=1), inputs(2, 11, 16, seed=2, shift=0.5)
    parts = matrices_of(module)
    block = AttentionBlock(
        "", module, *parts, heads=Heads(2, 2, 8, 8), trainable=frozenset("qkvo"), cross=True
    )
    structure = ModelStructure(
        parts, [block], open_statistics=lambda requests: MomentCollector(module, requests)
    )
    optimizer = AFOpt(
        list(module.parameters()), structure, AFOptConfig.create(direction="inverse", momentum=0.0)
    )
    module((x, memory)).square().sum().backward()
    directions(optimizer)

    def second(t):
        full = torch.cat([t, t.new_ones(*t.shape[:-1], 1)], -1).flatten(0, 1)
        return full.mT @ full / len(full)

    rights = {t.role: t.right.moment for t in optimizer.plan.matrices}
    state = optimizer.state
    torch.testing.assert_close(rights["q"].read(state), second(x))
    torch.testing.assert_close(rights["k"].read(state), second(memory))
    assert rights["k"] is rights["v"]
    keys = torch.einsum("bhtd,bhte->hde", module.keys, module.keys).detach() / 22
    queries = torch.einsum("bhtd,bhte->hde", module.queries, module.queries).detach() / 12
    torch.testing.assert_close(optimizer.factors.vector_moment(block, "k"), keys)
    torch.testing.assert_close(optimizer.factors.vector_moment(block, "q"), queries)
    optimizer.close()  # the module holds the graph of its keys, and so itself


def test_zero_weights_have_identity_factors_and_are_counted():
    torch.manual_seed(6)
    module, x = Attention(d=16, heads=2), inputs(2, 12, 16)
    with torch.no_grad():
        module.k.weight.zero_()
        module.k.bias.zero_()
        module.o.weight.zero_()
    optimizer = spectral(module, lr=1e-2)
    for _ in range(3):
        backward(module, x)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert optimizer.diagnostics()["identity_factors"] >= 4


@pytest.mark.parametrize("scaling", ["adaptive", "rms", "cap"])
@pytest.mark.parametrize("direction", ["spectral", "inverse"])
def test_gradients_too_small_or_large_to_square_in_float32_make_no_other_step(direction, scaling):
    """As of a branch without gradient, whose momentum has decayed for some hundred steps."""
    steps = []
    for size in (1.0, 1e-30, 1e-25, 1e25):
        torch.manual_seed(0)
        module = Attention(d=16, heads=2).float()
        optimizer = spectral(module, direction=direction, scaling=scaling, lr=1e-2)
        backward(module, inputs(2, 12, 16).float())
        for parameter in module.parameters():
            parameter.grad *= size / parameter.grad.abs().max()
        steps.append(changes(module, optimizer))
    for name, expected in steps[0].items():
        for actual in steps[1:]:
            torch.testing.assert_close(actual[name], expected, rtol=2e-3, atol=1e-6)


def test_factors_of_bfloat16_weights_are_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    module, same = Attention(d=16, heads=2).bfloat16(), Attention(d=16, heads=2)
    same.load_state_dict(module.state_dict())
    actual = []
    for each in (module, same):
        optimizer = spectral(each)
        block, factors = optimizer.structure.attention[0], optimizer.factors
        for bound in optimizer.bound:
            optimizer.allocate(bound)
        (moment,) = [m for m in optimizer.plan.moments if m.name == "input_moment"]
        stored = moment.stored(optimizer.state)
        stored.copy_(pack(torch.eye(17, dtype=stored.dtype)))
        actual.append([factors.output_moment(block, role).double() for role in "qkv"])
    for ours, exact in zip(*actual, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


class Patches(nn.Module):
    """A convolution, or the same as a linear layer of its patches."""

    def __init__(self, linear, bias):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 5, 3, padding=1, bias=bias)
        self.linear = nn.Linear(18, 5, bias=bias) if linear else None
        self.double()
        if linear:
            self.linear.weight.data = self.conv.weight.detach().flatten(1)
            self.linear.bias = self.conv.bias
            self.conv = None

    def forward(self, x):
        if self.linear is None:
            return self.conv(x)
        rows = nn.functional.unfold(x, 3, padding=1).mT
        return self.linear(rows).mT.unflatten(-1, x.shape[-2:])


@pytest.mark.filterwarnings("ignore:afopt. no attention was found")
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_without_attention_is_a_linear_layer_of_its_patches(bias):
    steps = []
    for linear in (False, True):
        model = Patches(linear, bias)
        optimizer = create_optimizer(model, "afopt", lr=1e-2, stat_interval=1)
        assert len(optimizer.bound) == 1
        x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
        for _ in range(2):
            optimizer.zero_grad()
            (model(x).sin() ** 2).sum().backward()
            optimizer.step()
        steps.append([p.detach().flatten(1) for p in model.parameters() if p.dim() > 1])
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-11)
