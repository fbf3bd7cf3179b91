"""AFOpt's schedule, momentum, fallback optimizers and refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_precond.linalg.matrix_functions import newton_schulz
from hf_precond.registry import create_optimizer
from tests.optimizers.afopt.support import (
    Attention,
    backward,
    changes,
    inputs,
    optimizer_of,
)
from tests.optimizers.models import batch, make, train, train_step, weights

DOUBLE = torch.float64


def test_refreshes_at_the_first_statistics_then_staggered():
    model = make("bert")
    optimizer = create_optimizer(
        model, "afopt", scope="attention", stat_interval=2, inverse_interval=6
    )
    changed = {t: [] for t in optimizer.plan.matrices if t.role == "q"}
    for step in range(16):
        before = {t: copy.deepcopy(optimizer.state[t.bound.weight].get("left")) for t in changed}
        train_step(model, optimizer, batch("bert", step))
        for plan, actual in changed.items():
            now = plan.left.stored(optimizer.state)
            if before[plan] is None or not torch.equal(before[plan], now):
                actual.append(step)
    assert list(changed.values()) == [[0, 2, 4, 6, 12], [0, 2, 4, 8, 14]]


def test_statistics_are_collected_when_due_only():
    model = make("vit")
    optimizer = create_optimizer(model, "afopt", stat_interval=3)
    for step in range(7):
        assert optimizer.statistics.enabled == (step % 3 == 0)
        train_step(model, optimizer, batch("vit", step))
    updates = {int(m.updates(optimizer.state)) for m in optimizer.plan.moments}
    assert updates == {3}


class Reads(TorchDispatchMode):
    """Counts what would stall a GPU: values read by the host, shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.actual = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero")):
            self.actual.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "fields",
    [{}, {"scaling": "cap"}, {"direction": "inverse", "scaling": "rms"}, {"base": "sgd"}],
)
def test_the_host_reads_nothing_from_the_device(fields):
    model = make("bert")
    optimizer = create_optimizer(model, "afopt", scope="all_linear", **fields)
    for step in range(7):
        model(**batch("bert", step)).loss.backward()
        with Reads() as reads:
            optimizer.step()
        # A refresh on a CPU asks whether a factorisation failed; on a GPU it does not.
        if step % 5:
            assert reads.actual == []
        optimizer.zero_grad()


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_of_the_spectral_direction(nesterov):
    """By its formulas, over three steps, with factors that are the identity."""
    torch.manual_seed(14)
    module, x = Attention(d=16, heads=1), inputs(2, 12, 16)
    optimizer = optimizer_of(
        module, roles="o", direction="spectral", damping=1e12, momentum=0.8, nesterov=nesterov,
        lr=1e-3, lr_scale=2.0, scaling="rms",
    )  # fmt: skip
    momentum = torch.zeros(16, 17, dtype=DOUBLE)
    for seed in range(3):
        backward(module, x, seed=seed)
        gradient = torch.cat([module.o.weight.grad, module.o.bias.grad[:, None]], 1)
        momentum = 0.8 * momentum + 0.2 * gradient
        direction = 0.8 * momentum + 0.2 * gradient if nesterov else momentum
        sign = newton_schulz(direction)
        expected = -2e-3 * 0.2 * sign * (16 * 17) ** 0.5 / sign.norm()
        step = changes(module, optimizer)
        actual = torch.cat([step["o.weight"], step["o.bias"][:, None]], 1)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("base", ["sgd", "adamr", "muon"])
def test_other_fallback_optimizers_train(base):
    model = make("vit")
    optimizer = create_optimizer(model, "afopt", base=base, lr=1e-3, scope="query_key")
    losses = train("vit", model, optimizer, 8)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert weights(model).keys() == weights(make("vit")).keys()


class Branches(nn.Module):
    """A layer that some passes leave out."""

    def __init__(self):
        super().__init__()
        self.body, self.late = nn.Linear(4, 6), nn.Linear(6, 6)
        self.used = False

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return x + self.late(x) if self.used else x


@pytest.mark.filterwarnings("ignore:afopt. no attention")
def test_a_layer_first_used_late_has_its_factor_with_its_first_three_statistics():
    torch.manual_seed(0)
    model = Branches().double()
    fields = {"stat_interval": 2, "inverse_interval": 100, "direction": "inverse"}
    optimizer = create_optimizer(model, "afopt", lr=0.01, **fields)
    inputs = []
    hook = model.late.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    moment, changed = torch.zeros(7, 7, dtype=torch.float64), []
    (plan,) = [p for p in optimizer.plan.matrices if p.bound.matrix.module is model.late]
    before = None
    for step in range(17):
        model.used = step >= 7
        optimizer.zero_grad()
        model(torch.randn(9, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        factor = plan.right.read(optimizer.state).clone()
        if before is not None and not torch.equal(factor, before):
            changed.append(step)
            rows = torch.cat([inputs[-1], torch.ones(9, 1, dtype=torch.float64)], 1)
            moment += (rows.mT @ rows / 9 - moment) / len(changed)
            shift = optimizer.config.damping * moment.trace() / 7 * torch.eye(7).double()
            torch.testing.assert_close(factor, torch.linalg.inv(moment + shift))
        before = factor
    hook.remove()
    assert changed == [8, 10, 12]
    optimizer.close()
