"""AFOpt on real models: what is stepped, from which statistics, in which direction."""

import copy

import pytest
import torch
from torch import nn

from hf_precond.registry import create_optimizer
from tests.optimizers.afopt.support import (
    cosine,
    directions,
)
from tests.optimizers.models import MODELS, batch, make, train, train_step, weights

DOUBLE = torch.float64


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("direction", ["spectral", "inverse"])
def test_every_matrix_in_scope_is_stepped_unlike_the_fallback_optimizer(name, direction):
    model = make(name)
    peer = copy.deepcopy(model)
    optimizer = create_optimizer(
        model, "afopt", lr=1e-2, scope="all_linear", direction=direction, lr_scale=1.0
    )
    base = torch.optim.AdamW(peer.parameters(), lr=1e-2, weight_decay=0.0)
    train_step(model, optimizer, batch(name))
    peer(**batch(name)).loss.backward()
    base.step()
    stepped = {route.name for route in optimizer.routing if route.treatment == "preconditioned"}
    theirs = weights(peer)
    matrices = 0
    for key, value in weights(model).items():
        if key in stepped:
            assert (value - theirs[key]).abs().max() > 1e-4, key
            matrices += value.dim() == 2
        else:
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-6)
    assert matrices >= 8
    # No matrix in scope holds AdamW's second moment, nor twice its size.
    held = {p: set(state) for p, state in optimizer.state.items()}
    for bound in optimizer.bound:
        assert "exp_avg_sq" not in {key.split(".")[-1] for key in held[bound.weight]}


@pytest.mark.parametrize("scope, count", [("query_key", 4), ("attention", 8), ("all_linear", 13)])
def test_scopes(scope, count):
    optimizer = create_optimizer(make("bert"), "afopt", scope=scope)
    assert len(optimizer.bound) == count
    kinds = [request.kind for request in optimizer.requests()]
    # One input moment serves q, k and v: A_K and A_Q follow from it.
    layers = {"query_key": 2, "attention": 4, "all_linear": 9}[scope]
    assert kinds == ["input"] * layers


def test_rotated_keys_are_collected_unless_ignored():
    averaged = create_optimizer(make("llama"), "afopt", rope="averaged")
    assert sorted({request.kind for request in averaged.requests()}) == ["input", "key", "query"]
    assert all(r.average_rotation for r in averaged.requests() if r.kind != "input")
    averaged.close()
    ignored = create_optimizer(make("llama"), "afopt", rope="ignored")
    assert {request.kind for request in ignored.requests()} == {"input"}


def test_eager_and_sdpa_give_the_same_statistics_and_step():
    steps = []
    for implementation in ("eager", "sdpa"):
        model = make("bert", dtype=DOUBLE)
        model.set_attn_implementation(implementation)
        optimizer = create_optimizer(model, "afopt", lr=1e-2)
        train("bert", model, optimizer, 2)
        steps.append(weights(model))
    for key, value in steps[0].items():
        torch.testing.assert_close(value, steps[1][key], rtol=0, atol=1e-9)


def test_attention_dropout_does_not_enter_the_statistics():
    moments, momenta = [], []
    for dropout in (0.0, 0.5):
        model = make("bert", dtype=DOUBLE)
        for layer in model.bert.encoder.layer:
            layer.attention.self.dropout.p = dropout
        optimizer = create_optimizer(model, "afopt")
        train("bert", model, optimizer, 1)
        first = optimizer.plan.moments[0]
        moments.append(first.stored(optimizer.state))
        momenta.append(optimizer.state[optimizer.bound[0].weight]["momentum"])
    assert torch.equal(*moments)
    assert (momenta[0] - momenta[1]).abs().max() > 1e-8


def bert_logits(seed):
    """A BERT layer's logits, −∂L/∂S and AFOpt's and the plain step of q and k on it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = BertModel(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    optimizer = create_optimizer(
        model, "afopt", scope="query_key", direction="inverse", damping=1e-6, momentum=0.0
    )
    tokens = torch.randint(50, (1, 24))
    attention = model.encoder.layer[0].attention.self
    seen = {}

    def keep(module, args, output):
        seen["x"] = args[0].detach()

    handle = attention.register_forward_hook(keep)
    target = torch.randn(1, 24, 32, dtype=DOUBLE)
    (model(input_ids=tokens).last_hidden_state * target).sum().backward()
    handle.remove()
    return model, optimizer, attention, seen["x"], tokens, target


def test_logits_of_a_real_bert_layer_move_along_their_gradient():
    """The cosine with −∂L/∂S is larger than the plain gradient's by 0.2 on average."""
    gains = []
    for seed in range(5):
        _, optimizer, attention, x, _, _ = bert_logits(seed)
        features = torch.cat([x, x.new_ones(1, 24, 1)], -1)
        layers = {"q": attention.query, "k": attention.key}
        full = {r: torch.cat([m.weight, m.bias[:, None]], 1).detach() for r, m in layers.items()}
        plain = {r: torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for r, m in layers.items()}

        def split(t):
            return t.unflatten(-1, (2, 16)).transpose(1, 2)

        heads = {r: split(features @ w.mT) for r, w in full.items()}
        descent = logit_gradient(seed)
        cosines = []
        for steps in (directions(optimizer), plain):
            moved = {r: split(features @ w.mT) for r, w in steps.items()}
            change = -(moved["q"] @ heads["k"].mT + heads["q"] @ moved["k"].mT) / 4
            cosines.append(cosine(change, descent))
        gains.append(cosines[0] - cosines[1])
    assert sum(gains) / 5 > 0.2, gains


def logit_gradient(seed):
    """−∂L/∂S of the layer of :func:`bert_logits`, by a hook on the softmax's input."""
    model, _, _, _, tokens, target = bert_logits(seed)
    kept = []
    original = nn.functional.softmax

    def softmax(logits, *args, **kwargs):
        logits = logits.detach().requires_grad_() if not logits.requires_grad else logits
        logits.retain_grad()
        kept.append(logits)
        return original(logits, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", softmax)
        model.zero_grad()
        (model(input_ids=tokens).last_hidden_state * target).sum().backward()
    return -kept[0].grad


@pytest.mark.parametrize("frozen", ["q_proj", "k_proj"])
def test_freezing_queries_or_keys_leaves_the_others_step_as_it_is(frozen):
    """Under RoPE too, where keys have a moment of their own."""
    moved = []
    for freeze in (False, True):
        model = make("llama", dtype=DOUBLE)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (freeze and frozen in name))
        optimizer = create_optimizer(model, "afopt", lr=1e-2, damping=0.1, scope="query_key")
        train_step(model, optimizer, batch("llama", dtype=DOUBLE))
        kept = "k_proj" if frozen == "q_proj" else "q_proj"
        moved.append({name: p for name, p in weights(model).items() if kept in name})
    for name, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][name], rtol=1e-10, atol=1e-12)
