"""What AFOpt leaves to fallback optimizers of matrices: Muon, AdamR."""

import copy

import pytest
import torch

from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.rotated_adam import RotatedAdamFallback
from hf_precond.optimizers.base.parameters import ParamView
from hf_precond.optimizers.base.refresh import FailureRecord
from hf_precond.optimizers.muon.step import MuonFallback
from hf_precond.registry import create_optimizer
from tests.architectures.families import FAMILIES, build
from tests.optimizers.models import batch, make, train_step, weights

DOUBLE = torch.float64
HEADS, SIZE = 4, 4


def values(fused):
    """The values' rows of a weight or bias ``[heads · (q, k, v) · size, …]``, a copy."""
    rows = fused.detach().unflatten(0, (HEADS, 3, SIZE))
    return rows[:, 2].flatten(0, 1).clone()


@pytest.mark.parametrize("base", ["adamr", "muon"])
def test_rows_interleaved_per_head_are_one_matrix_to_the_fallback_optimizer(base):
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
    """``norm_recovery`` hands the matrices in scope to the fallback optimizer: all to its AdamW."""
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


def test_muon_steps_hidden_matrices_outside_the_scope():
    model = make("bert")
    peer = copy.deepcopy(model)
    optimizer = create_optimizer(
        model,
        "afopt",
        scope="attention",
        base="muon",
        lr=1e-2,
        weight_decay=0.1,
        lr_scale=3.0,
        momentum=0.9,
    )
    inside = {m.weight_parameter for m in optimizer.structure.hidden}
    assert len(inside) == 5
    names = {name for name, p in model.named_parameters() if p in inside}
    chosen = [p for name, p in peer.named_parameters() if name in names]
    muon = torch.optim.Muon(
        chosen, lr=3e-2, weight_decay=0.1 / 3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    train_step(model, optimizer, batch("bert"))
    peer(**batch("bert")).loss.backward()
    muon.step()
    theirs = weights(peer)
    for name, value in weights(model).items():
        if name in names:
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)
    assert "exp_avg_sq" not in optimizer.state[next(iter(inside))]
