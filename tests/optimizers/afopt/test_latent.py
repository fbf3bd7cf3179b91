"""Multi-head latent attention: AFOpt's factors and directions against explicit matrices."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_precond.architectures.attention_block import declare_attention, forget_attention
from hf_precond.optimizers.afopt.variants import logit_change
from hf_precond.registry import create_optimizer
from hf_precond.statistics import attention_heads
from tests import ranks
from tests.architectures.families import TEXT, text
from tests.optimizers.afopt.support import cosine, directions, inputs
from tests.optimizers.test_every_architecture import example

DOUBLE = torch.float64
D, H, RANK, PLAIN, SHARED, VALUE = 20, 3, 8, 4, 2, 5
SIZE = PLAIN + SHARED
ROLES = {"q", "k", "v", "o", "k_rot", "q_down", "kv_down"}


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()


class RMSNorm(Norm):
    """Known as a norm by its name."""


def eager(module, query, key, value, mask, scaling, **options):
    module.logits = query @ key.mT * scaling
    if module.logits.requires_grad:
        module.logits.retain_grad()
    return module.logits.softmax(-1) @ value, None


class Latent(nn.Module):
    """Queries, keys and values of latents, without rotation; keys and values fused or apart."""

    def __init__(self, split=False, normed=True):
        super().__init__()
        self.split, self.heads, self.scaling = split, H, SIZE**-0.5
        self.q_a = nn.Linear(D, RANK)
        self.q_norm = RMSNorm(RANK) if normed else nn.Identity()
        self.q_b = nn.Linear(RANK, H * SIZE, bias=False)
        self.kv_a = nn.Linear(D, RANK + SHARED)
        self.kv_norm = RMSNorm(RANK) if normed else nn.Identity()
        if split:
            self.k_b = nn.Linear(RANK, H * PLAIN, bias=False)
            self.v_b = nn.Linear(RANK, H * VALUE, bias=False)
        else:
            self.kv_b = nn.Linear(RANK, H * (PLAIN + VALUE), bias=False)
        self.o = nn.Linear(H * VALUE, D)
        self.double()

    def latents(self, x):
        latent, shared = self.kv_a(x).split([RANK, SHARED], -1)
        return self.q_norm(self.q_a(x)), self.kv_norm(latent), shared

    def vectors(self, x):
        queries, latent, shared = self.latents(x)
        q = self.q_b(queries).unflatten(-1, (H, -1)).transpose(1, 2)
        if self.split:
            k, v = (f(latent).unflatten(-1, (H, -1)) for f in (self.k_b, self.v_b))
        else:
            k, v = self.kv_b(latent).unflatten(-1, (H, -1)).split([PLAIN, VALUE], -1)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return q, torch.cat([k, shared[:, None].expand(-1, H, -1, -1)], -1), v

    def forward(self, x):
        q, k, v = self.vectors(x)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager)
        out, _ = kernel(self, q, k, v, None, scaling=self.scaling)
        return self.o(out.transpose(1, 2).flatten(2))


@contextlib.contextmanager
def declared():
    more = {"latent": "kv_a", "query_down": "q_a", "output": "o", "heads": "heads"}
    split = declare_attention("SplitLatent", query="q_b", key="k_b", value="v_b", **more)
    fused = declare_attention(
        "FusedLatent", query="q_b", fused="kv_b", layout="interleaved", **more
    )
    yield
    forget_attention(split)
    forget_attention(fused)


class SplitLatent(Latent):
    pass


class FusedLatent(Latent):
    pass


OPEN = []


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().close()


def made(split=False, seed=0, normed=True, **fields):
    torch.manual_seed(seed)
    module = (SplitLatent if split else FusedLatent)(split, normed)
    defaults = {"momentum": 0.0, "nesterov": False, "stat_interval": 1, "scope": "attention"}
    with declared():
        optimizer = create_optimizer(module, "afopt", **(defaults | fields))
    OPEN.append(optimizer)
    return module, optimizer


def backward(module, x):
    module.zero_grad()
    output = module(x)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(output.shape, generator=generator, dtype=DOUBLE)
    ((output * target).sum() + output.square().sum() / 2).backward()


def second(rows, bias=False):
    rows = rows.detach().flatten(0, -2)
    if bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows.mT @ rows / len(rows)


def moments_of(module, x):
    """Role to left moments ``[heads, …]`` and right moment, from the vectors themselves."""
    q, k, _ = (part.detach() for part in module.vectors(x))
    queries, keys = (torch.stack([second(part[:, h]) for h in range(H)]) for part in (q, k))
    outputs = module.o.weight.detach().unflatten(1, (H, VALUE)).transpose(0, 1)
    values = outputs.mT @ outputs
    query_latent, latent, _ = module.latents(x)
    right = {"q": second(query_latent), "k": second(latent), "v": second(latent)}
    right |= dict.fromkeys(("k_rot", "q_down", "kv_down"), second(x, True))
    together = module.kv_b.weight.detach().unflatten(0, (H, -1))
    up = together[:, :PLAIN], together[:, PLAIN:]
    plain = queries[:, :PLAIN, :PLAIN]
    images = [(w.mT @ m @ w).sum(0) for w, m in zip(up, (plain, values), strict=True)]
    scales = (torch.diag(n.weight.detach()) for n in (module.q_norm, module.kv_norm))
    query_scale, scale = scales
    shares = sum(image / image.diagonal().mean() for image in images)
    q_up = module.q_b.weight.detach().unflatten(0, (H, -1))
    left = {
        "q": keys,
        "k": plain,
        "v": values,
        "k_rot": queries[:, PLAIN:, PLAIN:].sum(0, keepdim=True),
        "q_down": (query_scale @ (q_up.mT @ keys @ q_up).sum(0) @ query_scale)[None],
        "kv_down": (scale @ shares @ scale)[None],
    }
    return left, right


def damped_inverse(moment, damping):
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.linalg.inv(moment + damping * mean * torch.eye(moment.shape[-1], dtype=DOUBLE))


def test_every_direction_is_the_gradient_between_its_inverses():
    module, optimizer = made(direction="inverse", damping=0.3)
    (block,) = optimizer.structure.attention
    assert set(block.roles()) == ROLES and block.observed and not block.rotary
    x = inputs(3, 9, D, spread=20.0, shift=0.3)
    backward(module, x)
    found = directions(optimizer)
    left, right = moments_of(module, x)
    for role, matrix in block.roles().items():
        if role == "o":
            continue
        bias = matrix.bias_parameter
        gradient = matrix.join(matrix.weight_parameter.grad, None if bias is None else bias.grad)
        parts = gradient.unflatten(0, (len(left[role]), -1))
        expected = damped_inverse(left[role], 0.3) @ parts @ damped_inverse(right[role], 0.3)
        torch.testing.assert_close(found[role], expected.flatten(0, 1), rtol=1e-9, atol=1e-12)


def test_fused_equals_split():
    x, found = inputs(2, 7, D, spread=10.0), []
    fused, optimizer = made()
    split, other = made(split=True, seed=1)
    together = fused.kv_b.weight.detach().unflatten(0, (H, -1))
    weights = {n: w for n, w in fused.state_dict().items() if n != "kv_b.weight"}
    weights["k_b.weight"] = together[:, :PLAIN].flatten(0, 1)
    weights["v_b.weight"] = together[:, PLAIN:].flatten(0, 1)
    split.load_state_dict(weights)
    for module, each in ((fused, optimizer), (split, other)):
        backward(module, x)
        found.append(directions(each))
    assert set(found[0]) == ROLES
    for role in ROLES:
        torch.testing.assert_close(found[0][role], found[1][role], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("role", ["q", "k", "k_rot"])
@pytest.mark.parametrize("batch", [1, 3])
def test_predicted_change_of_the_logits_is_the_one_really_seen(role, batch):
    module, optimizer = made(scaling="cap", rho=1.0)
    x = inputs(batch, 40, D, spread=10.0, shift=0.2)
    backward(module, x)
    step = directions(optimizer)[role]
    (plan,) = [plan for plan in optimizer.plan.matrices if plan.role == role]
    predicted = logit_change(optimizer, [plan], step[None]).item()
    before, size = module.logits.detach().clone(), 1e-6
    matrix = plan.bound.matrix
    weight, bias = matrix.split(step)
    with torch.no_grad():
        matrix.target(matrix.weight_parameter).add_(weight, alpha=size)
        if bias is not None:
            matrix.bias_view(matrix.bias_parameter).add_(bias, alpha=size)
        module(x)
    seen = ((module.logits - before) / size).square().mean().sqrt().item()
    assert predicted == pytest.approx(seen, rel=1e-4 if batch == 1 else 0.1)


def test_keys_of_a_few_tokens_move_the_logits_against_their_gradient():
    """δS = −η P_Q D P_c where W_k moves; with no more tokens than the rank P_c is the identity."""
    module, optimizer = made(direction="inverse", damping=1e-12)
    x = inputs(1, PLAIN, D)
    backward(module, x)
    descent = -module.logits.grad
    step = directions(optimizer)["k"].unflatten(0, (H, -1))
    q, _, _ = module.vectors(x)
    _, latent, _ = module.latents(x)
    change = -q[..., :PLAIN] @ (latent[:, None] @ step.mT).mT
    assert cosine(change, descent) > 1 - 1e-6


def test_unseen_heads_have_the_sum_of_their_parts():
    """Without observation A_K has the blocks of both parts, and nothing between them."""
    module, optimizer = made()
    (block,) = optimizer.structure.attention
    block.observed = False
    other = type(optimizer)(list(module.parameters()), optimizer.structure, optimizer.config)
    x = inputs(2, 9, D)
    backward(module, x)
    directions(other)
    found, (_, k, _) = other.factors.vector_moment(block, "k"), module.vectors(x)
    expected = torch.stack([second(k[:, h]) for h in range(H)])
    expected[:, :PLAIN, PLAIN:] = expected[:, PLAIN:, :PLAIN] = 0
    torch.testing.assert_close(found, expected)


# DeepSeek's own ------------------------------------------------------------------------------


SMALL = {
    **TEXT, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "kv_lora_rank": 6,
    "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5,
    "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip


def deepseek(**fields):
    torch.manual_seed(0)
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**(SMALL | fields))).double().train()


@pytest.mark.parametrize("interleave", [True, False])
def test_predicted_change_of_deepseeks_logits_is_within_a_tenth(interleave):
    """Rotated, causal, of several sequences, in float32 tables of cosines."""
    model = deepseek(rope_interleave=interleave, num_hidden_layers=1)
    optimizer = create_optimizer(model, "afopt", stat_interval=1, scaling="cap", rho=1.0)
    (block,) = optimizer.structure.attention
    assert set(block.roles()) == ROLES and block.rotary and block.plain == 6
    tokens = torch.randint(3, 40, (4, 24), generator=torch.Generator().manual_seed(0))
    logits = []
    see = lambda module, call: logits.append((call.query @ call.key.mT).detach())  # noqa: E731
    attention_heads.observe([block.module], see)
    model(input_ids=tokens, labels=tokens).loss.backward()
    found, size = directions(optimizer), 1e-6
    for plan in [plan for plan in optimizer.plan.matrices if plan.left_moment is not None]:
        predicted = logit_change(optimizer, [plan], found[plan.role][None]).item()
        matrix, (weight, _) = plan.bound.matrix, plan.bound.matrix.split(found[plan.role])
        target = matrix.target(matrix.weight_parameter)
        with torch.no_grad():
            target.add_(weight, alpha=size)
            model(input_ids=tokens)
            target.sub_(weight, alpha=size)
        change = (logits[-1] - logits[0]) * block.logit_scale / size
        assert predicted == pytest.approx(change.square().mean().sqrt().item(), rel=0.1), plan.role
    assert len(logits) == 4
    attention_heads.stop_observing([block.module], see)
    optimizer.close()


def test_keys_that_are_values_have_both_factors():
    """DeepSeek V4: one head of keys and values, rotated as a whole, and grouped outputs."""
    model, batch, _ = example("deepseek_v4")
    model.config.o_groups = 2
    torch.manual_seed(0)
    model = type(model)(model.config)
    model.double().train().set_experts_implementation("eager")
    optimizer = create_optimizer(model, "afopt", stat_interval=1)
    block = optimizer.structure.attention[0]
    assert block.v is block.k and set(block.roles()) == {"q", "k", "o", "q_down"}
    seen = []
    see = lambda module, call: seen.append((call.query.detach(), call.key.detach()))  # noqa: E731
    attention_heads.observe([block.module], see)
    rotations = []
    block.module.register_forward_pre_hook(
        lambda m, args, kwargs: rotations.append(kwargs["position_embeddings"][m.rope_layer_type]),
        with_kwargs=True,
    )
    model(**batch).loss.backward()
    attention_heads.stop_observing([block.module], see)
    optimizer.step()
    (query, _), size, heads = seen[0], block.heads.size, block.heads.query
    rotate = tf.models.deepseek_v4.modeling_deepseek_v4.apply_rotary_pos_emb
    cos, sin = (part.double()[:1] for part in rotations[0])
    count = cos.shape[1]
    columns = torch.eye(size, dtype=DOUBLE)[None, :, None].expand(1, -1, count, -1)
    every = rotate(columns, cos, sin)[0].permute(1, 2, 0)
    mask = batch["attention_mask"].bool()
    kept = torch.cat([every[row] for row in mask])
    rows = query.transpose(0, 1)[:, mask]
    moment = rows.mT @ rows / mask.sum()
    queries = torch.stack([(kept.mT @ m @ kept).mean(0) for m in moment])
    torch.testing.assert_close(
        optimizer.factors.vector_moment(block, "q"), queries, rtol=1e-5, atol=1e-9
    )
    layer = block.module
    groups = layer.o_a_proj.n_groups
    outputs = layer.o_a_proj.weight.detach().unflatten(0, (groups, -1))
    outputs = outputs.unflatten(2, (heads // groups, size)).transpose(1, 2).flatten(0, 1)
    shares = (queries.sum(0), (outputs.mT @ outputs).sum(0))
    scale = layer.kv_norm.weight.detach()
    expected = scale[:, None] * sum(m / m.diagonal().mean() for m in shares) * scale
    torch.testing.assert_close(
        optimizer.factors.output_moment(block, "k")[0], expected, rtol=1e-5, atol=1e-7
    )
    optimizer.close()


def moments_after(model, batch):
    optimizer = create_optimizer(model, "afopt", stat_interval=1)
    model(**batch).loss.backward()
    optimizer.step()
    found = {
        (m.request.key, m.name): m.read(optimizer.state)
        for m in optimizer.plan.moments if m.request.attention is not None
    }  # fmt: skip
    optimizer.close()
    return found


def test_padding_changes_no_moment():
    batch, found = text("tokens"), []
    for more in (0, 3):
        padded = {name: nn.functional.pad(value, (0, more)) for name, value in batch.items()}
        padded["labels"][:, batch["labels"].shape[1] :] = -100
        found.append(moments_after(deepseek(), padded))
    names = {name for _, name in found[0]}
    assert names == {
        "input_moment", "query_latent_moment", "latent_moment", "output_moment", "query_moment",
        "key_moment",
    }  # fmt: skip
    for key, moment in found[0].items():
        torch.testing.assert_close(found[1][key], moment, rtol=1e-6, atol=1e-9)


def steps(share):
    model = deepseek()
    optimizer = create_optimizer(model, "afopt", stat_interval=1, inverse_interval=1, lr=1e-3)
    tokens = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    if share:
        tokens = tokens[2 * dist.get_rank() :][:2]
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        for parameter in model.parameters():
            if share and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_two_ranks_equal_one():
    single = steps(share=False)
    first, second_rank = ranks.run(steps, True)
    for name, weight in single.items():
        assert torch.equal(first[name], second_rank[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-7, atol=1e-9)
