"""Attentions that use another's keys and values, and keys that are values, of several heads."""

import pytest
import torch
import transformers as tf
from torch import nn

from hf_precond.architectures.attention import find_attention
from hf_precond.optimizers.afopt.variants import logit_change
from hf_precond.registry import create_optimizer
from hf_precond.statistics import attention_heads
from tests.architectures.families import TEXT
from tests.optimizers.afopt.support import directions

DOUBLE = torch.float64
SIZES = {
    **TEXT, "num_hidden_layers": 6, "num_kv_shared_layers": 3, "num_key_value_heads": 2,
    "head_dim": 8, "sliding_window": 64, "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 40,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip


def gemma3n(**fields):
    torch.manual_seed(0)
    more = {"activation_sparsity_pattern": None, "laurel_rank": 4, "altup_num_inputs": 2}
    config = tf.Gemma3nTextConfig(**(SIZES | more | fields))
    return tf.Gemma3nForCausalLM(config).double().train()


def gemma4(**fields):
    torch.manual_seed(0)
    config = tf.Gemma4TextConfig(**(SIZES | {"global_head_dim": 8} | fields))
    return tf.Gemma4ForCausalLM(config).double().train()


MODELS = {"gemma3n": gemma3n, "gemma4": gemma4}


def batch():
    tokens = torch.randint(3, 40, (3, 20), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens, "use_cache": False}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_who_lends_and_who_borrows(make):
    blocks = find_attention(make())
    assert len(blocks) == 6
    lenders = [None if b.lender is None else blocks.index(b.lender) for b in blocks]
    assert lenders == [None, None, None, 1, 1, 2]
    assert [len(block.borrowers) for block in blocks] == [0, 2, 1, 0, 0, 0]
    for block in blocks:
        roles = {"q", "o"} if block.lender else {"q", "k", "v", "o"}
        assert set(block.roles()) == block.trainable == roles


def without_norms(model):
    """The same, its queries and keys not normed: the norm's own derivative is in no factor."""
    for block in find_attention(model):
        for name in ("q_norm", "k_norm"):
            if hasattr(block.module, name):
                setattr(block.module, name, nn.Identity())
    return model


def seen_by(blocks, run):
    found, modules = {}, [block.module for block in blocks]
    see = lambda module, call: found.update(  # noqa: E731
        {module: (call.query.detach(), call.key.detach())}
    )
    attention_heads.observe(modules, see)
    run()
    attention_heads.stop_observing(modules, see)
    return [found[module] for module in modules]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_keys_are_weighed_by_the_queries_of_all_that_use_them(make):
    """The change of the logits of all three that a step of the lender's keys makes, predicted."""
    model = without_norms(make())
    optimizer = create_optimizer(model, "afopt", stat_interval=1, scaling="cap", rho=1.0)
    lender = optimizer.structure.attention[1]
    blocks = [lender, *lender.borrowers]
    for block in lender.borrowers:
        nn.init.normal_(block.q.weight_parameter, std=0.05)
    inputs = []
    lender.module.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    vectors = seen_by(blocks, lambda: model(**batch()).loss.backward())
    (plan,) = [p for p in optimizer.plan.matrices if p.block is lender and p.role == "k"]
    with torch.no_grad():
        for bound in optimizer.bound:
            optimizer.allocate(bound)
        optimizer._update_statistics()
        optimizer.refresh()
        step = optimizer.directions([plan], plan.bound.gradient()[None])
        predicted = logit_change(optimizer, [plan], step).item()
        plan.bound.weight.add_(step[0])
    args, kwargs = inputs[0]
    ((_, moved),) = seen_by([lender], lambda: lender.module(*args, **kwargs))
    change = (moved - vectors[0][1]).repeat_interleave(lender.heads.group, 1)
    seen = [query @ change.mT * lender.logit_scale for query, _ in vectors]
    seen = torch.stack(seen).square().mean().sqrt().item()
    assert predicted == pytest.approx(seen, rel=0.1)
    alone = (vectors[0][0] @ change.mT * lender.logit_scale).square().mean().sqrt().item()
    assert abs(alone / predicted - 1) > 0.1  # which its own queries alone would not predict
    optimizer.close()


def test_values_are_weighed_by_the_outputs_of_all_that_use_them():
    optimizer = create_optimizer(gemma3n(), "afopt")
    lender = optimizer.structure.attention[1]
    expected = torch.zeros(2, 8, 8, dtype=DOUBLE)
    for block in (lender, *lender.borrowers):
        outputs = block.o.weight_parameter.detach().unflatten(1, (4, 8)).transpose(0, 1)
        expected += (outputs.mT @ outputs).unflatten(0, (2, 2)).sum(1)
    torch.testing.assert_close(optimizer.factors.output_moment(lender, "v"), expected)
    optimizer.close()


@pytest.mark.parametrize("frozen", ["lender", "borrowers"])
def test_either_may_be_frozen(frozen):
    model = gemma3n()
    blocks = find_attention(model)
    for block in [blocks[1]] if frozen == "lender" else blocks[1].borrowers:
        block.module.requires_grad_(False)
    optimizer = create_optimizer(model, "afopt", lr=1e-3, stat_interval=1, inverse_interval=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    left = blocks[1].borrowers if frozen == "lender" else [blocks[1]]
    for block in left:
        for role, matrix in block.roles().items():
            assert (matrix.weight_parameter != before[f"{matrix.name}.weight"]).any(), role
    assert optimizer.diagnostics()["failed_refreshes"] == 0
    other = create_optimizer(model, "afopt", lr=1e-3, stat_interval=1, inverse_interval=1)
    other.load_state_dict(optimizer.state_dict())
    optimizer.close()
    other.close()


def test_keys_that_are_values_have_both_factors_a_head():
    """Gemma 4's global layers: one projection makes keys, which are rotated, and values."""
    model = without_norms(gemma4(attention_k_eq_v=True, num_kv_shared_layers=0))
    optimizer = create_optimizer(model, "afopt", stat_interval=1)
    block = optimizer.structure.attention[2]
    assert block.v is block.k and set(block.roles()) == {"q", "k", "o"} and block.observed
    heads = block.heads
    model(**batch()).loss.backward()
    directions(optimizer)
    queries = optimizer.factors.vector_moment(block, "q")
    size = heads.size
    outputs = block.o.weight_parameter.detach().unflatten(1, (heads.query, size)).transpose(0, 1)
    terms = [m.unflatten(0, (heads.key_value, -1)).sum(1) for m in (queries, outputs.mT @ outputs)]
    expected = sum(m / m.diagonal(dim1=-2, dim2=-1).mean() for m in terms)
    found = optimizer.factors.output_moment(block, "k")
    assert found.shape == (heads.key_value, size, size) and heads.key_value > 1
    torch.testing.assert_close(found, expected)
    optimizer.close()
