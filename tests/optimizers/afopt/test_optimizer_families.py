"""AFOpt trains every attention family that is known, in float32 and in bfloat16."""

import pytest
import torch

from hf_precond.registry import create_optimizer
from tests.architectures.families import FAMILIES, build, loss_of

STEPS = 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_trains(name, dtype):
    model = build(name).to(dtype).train()
    optimizer = create_optimizer(
        model, "afopt", scope="all_linear", lr=1e-3, stat_interval=2, inverse_interval=4
    )
    batch = {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in FAMILIES[name].batch().items()
    }
    before = [bound.weight.detach().clone() for bound in optimizer.bound]
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for bound, old in zip(optimizer.bound, before, strict=True):
        assert bound.weight.dtype == dtype
        assert not torch.equal(bound.weight, old), bound.matrix.name
    counts = optimizer.diagnostics()
    assert counts["identity_factors"] == counts["failed_refreshes"] == 0
    assert counts["statistics_dropped"] == 0
    # Every second step brings every statistic.
    for moment in optimizer.plan.moments:
        assert int(moment.updates(optimizer.state)) == STEPS // 2, moment.request.key
    # Factors and momentum stay float32 under bfloat16 weights.
    for bound in optimizer.bound:
        kept = optimizer.state[bound.weight].values()
        assert all(v.dtype != torch.bfloat16 for v in kept if torch.is_tensor(v))
    optimizer.close()


@pytest.mark.parametrize("max_dim", [1, 2, 5, 16])
def test_a_key_without_bias_has_nothing_of_the_constant_in_its_blocks(max_dim):
    """Whisper's queries have a bias: the moment they share with the keys holds the constant 1."""
    model = build("whisper", torch.float64).train()
    fields = {"max_dim": max_dim, "stat_interval": 1, "direction": "inverse"}
    optimizer = create_optimizer(model, "afopt", scope="query_key", **fields)
    loss_of(model, FAMILIES["whisper"].batch()).backward()
    optimizer.step()
    keys = [plan for plan in optimizer.plan.matrices if plan.role == "k"]
    assert keys and all(k.right.columns == 16 for k in keys)
    for right in (k.right for k in keys):
        held = right.moment.read(optimizer.state)
        plain = torch.block_diag(*held.view(-1, *held.shape[-2:]))[:16, :16]
        actual, mean = optimizer.factors.moment(right)
        whole = torch.block_diag(*actual.view(-1, *actual.shape[-2:]))
        assert torch.equal(whole[:16, :16], plain)
        assert not whole[16:].any() and not whole[:, 16:].any()
        torch.testing.assert_close(mean, (plain.trace() / 16).expand(len(mean)))
