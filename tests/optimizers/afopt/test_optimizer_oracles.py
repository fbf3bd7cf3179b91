"""AFOpt's directions against closed forms in logit space, in float64."""

import pytest
import torch

from hf_precond.linalg.matrix_functions import newton_schulz
from hf_precond.optimizers.afopt import optimizer as optimizer_module
from tests.optimizers.afopt.support import (
    Attention,
    backward,
    cosine,
    directions,
    inputs,
    logit_step,
    optimizer_of,
)


def projector(features):
    """Onto the columns of each matrix of a batch."""
    q, _ = torch.linalg.qr(features)
    return q @ q.mT


def with_ones(x):
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


# One sequence: the step's change of the logits is known in closed form --------


@pytest.mark.parametrize("role", ["q", "k"])
def test_block_step_moves_the_logits_along_the_projected_gradient(role):
    """δS = −η P_X D P_K when only W_q moves, −η P_Q D P_X when only W_k does."""
    torch.manual_seed(0)
    module, x = Attention(d=16, heads=2), inputs(1, 48, 16)
    optimizer = optimizer_of(module, roles=role, damping=1e-13)
    descent = backward(module, x)
    before = getattr(module, role).weight.detach().clone()
    bias = getattr(module, role).bias.detach().clone()
    queries, keys = module.queries.detach(), module.keys.detach()
    optimizer.step()
    layer = getattr(module, role)
    delta = torch.cat([layer.weight - before, (layer.bias - bias)[:, None]], 1).detach()
    change = logit_step(module, x, {role: -delta})
    if role == "k":
        # Evaluated at the old queries, the new keys being the change itself.
        change = queries @ module.split(with_ones(x) @ delta.mT).mT / module.size**0.5
    else:
        change = module.split(with_ones(x) @ delta.mT) @ keys.mT / module.size**0.5
    everything = projector(with_ones(x))[:, None]
    left, right = (everything, projector(keys)) if role == "q" else (projector(queries), everything)
    expected = left @ descent @ right
    # One step length for both heads: the ratio is the same number.
    ratio = change.norm() / expected.norm()
    torch.testing.assert_close(
        change, ratio * expected, rtol=0, atol=1e-10 * change.abs().max().item()
    )


def test_few_tokens_move_exactly_against_the_gradient():
    """With no more tokens than the head is wide the projectors are identities."""
    torch.manual_seed(0)
    module, x = Attention(d=32, heads=2), inputs(1, 16, 32)
    optimizer = optimizer_of(module, roles="q", damping=1e-9)
    descent = backward(module, x)
    change = logit_step(module, x, directions(optimizer))
    assert cosine(change, descent) > 0.99999
    plain = logit_step(
        module, x, {"q": torch.cat([module.q.weight.grad, module.q.bias.grad[:, None]], 1)}
    )
    assert cosine(plain, descent) < 0.9


# What the factors are --------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_key_and_query_moments_follow_from_the_input_moment(kv_heads):
    torch.manual_seed(2)
    module, x = Attention(d=16, heads=4, kv_heads=kv_heads), inputs(3, 10, 16, shift=0.5)
    optimizer = optimizer_of(module)
    backward(module, x)
    directions(optimizer)
    (block,) = optimizer.structure.attention
    keys = torch.einsum("bhtd,bhte->hde", module.keys, module.keys) / 30
    queries = torch.einsum("bhtd,bhte->hde", module.queries, module.queries) / 30
    factors = optimizer.factors
    torch.testing.assert_close(factors.vector_moment(block, "k"), keys[:: 4 // kv_heads].detach())
    torch.testing.assert_close(factors.vector_moment(block, "q"), queries.detach())
    outputs = torch.stack([w.mT @ w for w in module.o.weight.detach().split(4, 1)])
    grouped = outputs.unflatten(0, (kv_heads, -1)).sum(1)
    torch.testing.assert_close(factors.output_moment(block, "v"), grouped)
    shared = queries.unflatten(0, (kv_heads, -1)).sum(1)
    torch.testing.assert_close(factors.output_moment(block, "k"), shared.detach())


def test_key_bias_has_no_gradient_and_rows_of_the_logit_gradient_sum_to_zero():
    torch.manual_seed(3)
    module, x = Attention(), inputs(2, 9, 16)
    descent = backward(module, x)
    assert module.k.bias.grad.abs().max() < 1e-14
    assert descent.sum(-1).abs().max() < 1e-14
    assert module.q.bias.grad.abs().max() > 1e-3


def test_white_features_and_large_damping_leave_the_plain_gradient():
    torch.manual_seed(4)
    module, x = Attention(d=12, heads=2, bias=False), inputs(1, 40, 12)
    q, _ = torch.linalg.qr(x[0])
    x = q[None] * 40**0.5
    with torch.no_grad():
        for weight in (module.q.weight, module.k.weight):
            for head in weight.split(6):
                head.copy_(torch.linalg.qr(head.mT)[0].mT)
    optimizer = optimizer_of(module, roles="qk")
    backward(module, x)
    actual = directions(optimizer)
    assert cosine(actual["q"], module.q.weight.grad) > 1 - 1e-12
    assert cosine(actual["k"], module.k.weight.grad) > 1 - 1e-12
    x = inputs(1, 40, 12, spread=1e4)
    for damping, low, high in [(1e-2, -1, 0.9), (1e9, 1 - 1e-12, 1.1)]:
        optimizer = optimizer_of(module, roles="qk", damping=damping)
        backward(module, x)
        actual = directions(optimizer)["q"]
        for head in (slice(0, 6), slice(6, 12)):
            assert low < cosine(actual[head], module.q.weight.grad[head]) < high


def test_direction_is_linear_in_the_loss_scale():
    torch.manual_seed(5)
    module, x = Attention(), inputs(2, 9, 16)
    optimizer = optimizer_of(module, damping=0.1)
    backward(module, x)
    first = directions(optimizer)
    for parameter in module.parameters():
        parameter.grad *= 7.0
    again = directions(optimizer)
    for role in "qkvo":
        torch.testing.assert_close(again[role], 7.0 * first[role])


# Invariance to W_q -> W_q M, W_k -> W_k M^-T ------------------------------------


def reparametrised(module, mixes):
    """The same function: queries times M, keys times M^-T, per head."""
    twin = Attention(d=16, heads=2)
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        for number, mix in enumerate(mixes):
            rows = slice(number * 8, (number + 1) * 8)
            for parameter in (twin.q.weight, twin.q.bias):
                parameter[rows] = mix.mT @ parameter[rows]
            for parameter in (twin.k.weight, twin.k.bias):
                parameter[rows] = torch.linalg.inv(mix) @ parameter[rows]
    return twin


def relative_difference(orthogonal=False, steps=None, **fields):
    """How much the logits' change depends on the parametrisation."""
    torch.manual_seed(6)
    module, x = Attention(d=16, heads=2), inputs(2, 24, 16, spread=100.0)
    mixes = torch.randn(2, 8, 8, dtype=torch.float64) + 2 * torch.eye(8)
    if orthogonal:
        mixes = torch.linalg.qr(mixes)[0]
    changes = []
    for model in (module, reparametrised(module, mixes)):
        optimizer = optimizer_of(model, roles="qk", **fields)
        backward(model, x)
        actual = directions(optimizer) if steps is None else steps(optimizer)
        changes.append(logit_step(model, x, actual))
    return ((changes[0] - changes[1]).norm() / changes[0].norm()).item()


def whole_step(optimizer):
    """The change that ``step()`` really makes, per unit of lr and negated."""
    before = {t.role: t.bound.matrix.read().clone() for t in optimizer.plan.matrices}
    optimizer.step()
    return {
        t.role: (before[t.role] - t.bound.matrix.read()) / optimizer.config.lr
        for t in optimizer.plan.matrices
    }


def sign(optimizer):
    return {t.role: t.bound.gradient().sign() for t in optimizer.plan.matrices}


def plain(optimizer):
    return {t.role: t.bound.gradient() for t in optimizer.plan.matrices}


def test_directions_are_invariant():
    assert relative_difference(damping=1e-12) < 1e-7
    assert relative_difference(damping=1e-12, direction="spectral") < 1e-7
    assert relative_difference(steps=whole_step, damping=1e-12, scaling="cap", lr_scale=1e9) < 1e-7


def test_the_invariance_fails_where_it_must():
    assert relative_difference(damping=0.1) > 0.02
    assert (
        relative_difference(steps=whole_step, damping=1e-12, scaling="norm_recovery", base="sgd")
        > 0.1
    )
    assert relative_difference(steps=sign) > 0.1
    assert relative_difference(steps=plain) > 0.1


def test_orthogonal_changes_of_basis_keep_every_matrix_direction():
    for fields in (
        {"damping": 0.1},
        {"damping": 1.0, "direction": "spectral"},
        {"damping": 0.1, "steps": whole_step, "scaling": "norm_recovery", "base": "sgd"},
    ):
        assert relative_difference(orthogonal=True, **fields) < 1e-9
    assert relative_difference(orthogonal=True, steps=sign) > 0.1


def test_value_path_is_invariant_too():
    """W_v → N W_v per head, W_o → W_o N⁻¹: the change of the output stays."""
    torch.manual_seed(7)
    module, x = Attention(d=16, heads=2, bias=False), inputs(2, 20, 16)
    mixes = torch.randn(2, 8, 8, dtype=torch.float64) + 2 * torch.eye(8)
    twin = Attention(d=16, heads=2, bias=False)
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        for number, mix in enumerate(mixes):
            rows = slice(number * 8, (number + 1) * 8)
            twin.v.weight[rows] = mix @ twin.v.weight[rows]
            twin.o.weight[:, rows] = twin.o.weight[:, rows] @ torch.linalg.inv(mix)
    changes = []
    for model in (module, twin):
        optimizer = optimizer_of(model, roles="v")
        backward(model, x)
        step = directions(optimizer)["v"]
        values = model.probabilities @ model.split(x @ step.mT)
        changes.append((values.transpose(1, 2).flatten(2) @ model.o.weight.mT).detach())
    torch.testing.assert_close(
        changes[0], changes[1], rtol=0, atol=1e-7 * changes[0].abs().max().item()
    )


# The spectral direction ------------------------------------------------------------


def svd_sign(matrix, steps=5):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def eigh_gram_sign(gram, steps=5):
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT


def power(moment, damping, exponent):
    values, vectors = torch.linalg.eigh(moment)
    values = values + damping * values.mean(-1, keepdim=True)
    return vectors @ torch.diag_embed(values**exponent) @ vectors.mT


def dense_factors(optimizer, module, x, damping):
    """A_L per head and A_R of each role, explicitly from features."""
    features = with_ones(x).flatten(0, 1)
    values = (module.probabilities @ module.split(module.project(x)[2])).transpose(1, 2)
    middle = with_ones(values.flatten(2)).flatten(0, 1)
    count = len(features)
    keys = torch.einsum("bhtd,bhte->hde", module.keys, module.keys) / count
    queries = torch.einsum("bhtd,bhte->hde", module.queries, module.queries) / count
    outputs = torch.stack([w.mT @ w for w in module.o.weight.split(module.size, 1)])
    entering = features.mT @ features / count
    leaving = middle.mT @ middle / count
    return {
        "q": (keys, entering),
        "k": (queries, entering),
        "v": (outputs, entering),
        "o": (None, leaving),
    }


@pytest.mark.parametrize("heads", [1, 4])
def test_spectral_step_is_the_constrained_optimum(heads, monkeypatch):
    """max <G, U> under ‖A_L^½ U A_R^½‖₂ ≤ 1, its value the nuclear norm of A_L^-½ G A_R^-½."""
    monkeypatch.setattr(optimizer_module, "newton_schulz", svd_sign)
    monkeypatch.setattr(optimizer_module, "gram_newton_schulz", eigh_gram_sign)
    torch.manual_seed(8)
    module, x = Attention(d=16, heads=heads), inputs(3, 20, 16, spread=100.0)
    optimizer = optimizer_of(module, direction="spectral", damping=1.0)
    backward(module, x)
    actual = directions(optimizer)
    dense = dense_factors(optimizer, module, x, 1.0)
    for role, (left, right) in dense.items():
        gradient = torch.cat(
            [getattr(module, role).weight.grad, getattr(module, role).bias.grad[:, None]], 1
        )
        count = 1 if left is None else heads
        left = torch.eye(16, dtype=torch.float64)[None] if left is None else left.detach()
        here = 0.0 if role == "o" else 1.0
        root, inverse = power(left, here, 0.5), power(left, here, -0.5)
        whole, whole_inverse = power(right.detach(), 1.0, 0.5), power(right.detach(), 1.0, -0.5)
        step = actual[role].unflatten(0, (count, -1))
        parts = gradient.unflatten(0, (count, -1))
        constraint = torch.linalg.matrix_norm(root @ step @ whole, 2)
        torch.testing.assert_close(constraint, torch.ones_like(constraint), rtol=0, atol=1e-9)
        gain = (parts * step).sum((-2, -1))
        best = torch.linalg.matrix_norm(inverse @ parts @ whole_inverse, "nuc")
        torch.testing.assert_close(gain, best, rtol=1e-9, atol=0)
        other = torch.randn_like(step)
        other = other / torch.linalg.matrix_norm(root @ other @ whole, 2)[:, None, None]
        assert ((parts * other).sum((-2, -1)) < gain).all()


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("d", [8, 16])
def test_newton_schulz_step_between_symmetric_roots(heads, d):
    """Cholesky factors and Gram forms give what symmetric roots and the direct steps do."""
    torch.manual_seed(9)
    module, x = Attention(d=d, heads=heads), inputs(3, 20, d, spread=100.0)
    optimizer = optimizer_of(module, direction="spectral", damping=1.0)
    backward(module, x)
    actual = directions(optimizer)
    for role, (left, right) in dense_factors(optimizer, module, x, 1.0).items():
        layer = getattr(module, role)
        gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        count = 1 if left is None else heads
        eye = torch.eye(d // count, dtype=torch.float64)
        root = eye if left is None else power(left.detach(), 1.0, -0.5)
        side = power(right.detach(), 1.0, -0.5)
        z = root @ gradient.unflatten(0, (count, -1)) @ side
        expected = (root @ newton_schulz(z) @ side).flatten(0, 1)
        torch.testing.assert_close(
            actual[role], expected, rtol=0, atol=1e-9 * expected.abs().max().item()
        )


def test_inverses_against_eigh():
    torch.manual_seed(10)
    module, x = Attention(d=16, heads=4), inputs(3, 20, 16, spread=100.0)
    optimizer = optimizer_of(module, damping=0.1)
    backward(module, x)
    actual = directions(optimizer)
    for role, (left, right) in dense_factors(optimizer, module, x, 0.1).items():
        layer = getattr(module, role)
        gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        expected = gradient @ power(right.detach(), 0.1, -1.0)
        if left is not None:
            parts = expected.unflatten(0, (4, -1))
            expected = (power(left.detach(), 0.1, -1.0) @ parts).flatten(0, 1)
        torch.testing.assert_close(
            actual[role], expected, rtol=0, atol=1e-8 * expected.abs().max().item()
        )


# The cosines of the specification -------------------------------------------------


def mean_cosines(spread=1e3, shift=0.0, causal=False, seeds=5):
    """Mean cosine of the logits' change with −∂L/∂S, rows centred, by kind of step."""
    sums = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        module = Attention(d=32, heads=4, bias=False, causal=causal)
        x = inputs(8, 24, 32, spread=spread, shift=shift, seed=seed)
        descent = backward(module, x, seed=seed)
        for name, fields in {
            "plain": None,
            "spectral": {"direction": "spectral", "damping": 1.0},
            "inverse": {"direction": "inverse", "damping": 1e-8},
        }.items():
            optimizer = optimizer_of(module, roles="qk", **(fields or {}))
            backward(module, x, seed=seed)
            actual = plain(optimizer) if fields is None else directions(optimizer)
            change = logit_step(module, x, actual)
            sums[name] = sums.get(name, 0) + cosine(change - change.mean(-1, keepdim=True), descent)
            optimizer.close()
    return {name: value / seeds for name, value in sums.items()}


@pytest.mark.parametrize("causal", [False, True])
def test_ordering_of_the_cosines(causal):
    actual = mean_cosines(causal=causal)
    assert actual["inverse"] > actual["spectral"] > actual["plain"], actual
    assert actual["inverse"] > actual["plain"] + 0.05
