"""What AFOpt leaves to base rules for matrices: rows interleaved per head, none in scope."""

import copy

import pytest
import torch

from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.rotated_adam import RotatedAdamFallback
from hf_precond.optimizers.base.muon import MuonFallback
from hf_precond.optimizers.base.parameters import ParamView
from hf_precond.optimizers.base.refresh import FailureRecord
from hf_precond.registry import create_optimizer
from tests.architectures.families import FAMILIES, build
from tests.optimizers.models import batch, make, train_step

DOUBLE = torch.float64
HEADS, SIZE = 4, 4


def values(fused):
    """The values' rows of a weight or bias ``[heads · (q, k, v) · size, …]``, a copy."""
    rows = fused.detach().unflatten(0, (HEADS, 3, SIZE))
    return rows[:, 2].flatten(0, 1).clone()


@pytest.mark.parametrize("base", ["adamr", "muon"])
def test_rows_interleaved_per_head_are_one_matrix_to_the_base_rule(base):
    model = build("gpt-neox", DOUBLE).train()
    fields = {"lr": 1e-2, "weight_decay": 0.1, "scope": "query_key", "base": base}
    optimizer = create_optimizer(model, "afopt", **fields)
    layer = next(m for n, m in model.named_modules() if n.endswith("query_key_value"))
    weight, bias = values(layer.weight), values(layer.bias)
    decayed, plain = ({**g, "params": []} for g in optimizer.param_groups)
    state, bias_state = {}, {}
    fallback = MuonFallback(4.0)
    if base == "adamr":
        fallback = RotatedAdamFallback(AdamRConfig(), FailureRecord(), lambda name, by: None)
    for _ in range(4):
        optimizer.zero_grad()
        model(**FAMILIES["gpt-neox"].batch()).loss.backward()
        view = ParamView(weight, values(layer.weight.grad), state, "", decayed, hidden=True)
        fallback.update([view, ParamView(bias, values(layer.bias.grad), bias_state, "", plain)])
        optimizer.step()
        torch.testing.assert_close(values(layer.weight), weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(values(layer.bias), bias, rtol=1e-9, atol=1e-9)


def test_muon_steps_no_matrix_in_scope():
    """``norm_recovery`` hands the matrices in scope to the base rule: all to its AdamW."""
    model = make("bert")
    peer = copy.deepcopy(model)
    fields = {"scope": "all_linear", "scaling": "norm_recovery", "lr": 1e-2}
    muon = create_optimizer(model, "afopt", base="muon", **fields)
    adamw = create_optimizer(peer, "afopt", base="adamw", **fields)
    assert not muon.structure.hidden
    train_step(model, muon, batch("bert"))
    train_step(peer, adamw, batch("bert"))
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        assert torch.equal(p, q)
