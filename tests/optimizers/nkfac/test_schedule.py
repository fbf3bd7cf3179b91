"""When NKFAC's statistics count and its inverses are refreshed, by which solver; resume."""

import copy
import io

import pytest
import torch
from torch import nn

from hf_precond.linalg.matrix_functions import unpack
from hf_precond.optimizers.nkfac import factors
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.registry import create_optimizer

F64 = torch.float64


def network(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.0), nn.Linear(width, 3))


def data(step=0, rows=16, dtype=F64):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(rows, 4, generator=generator, dtype=F64).to(dtype)
    return x, torch.randn(rows, 3, generator=generator, dtype=F64).to(dtype)


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def step_on(model, optimizer, batch):
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss.item()


def build(model, **values):
    defaults = {"base": "sgd", "momentum": 0.0, "lr": 0.05, "stat_interval": 1}
    return create_optimizer(model, "nkfac", **defaults | values)


def same(left, right):
    for p, q in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(p, q)


# Refreshes ------------------------------------------------------------------------


def counts(optimizer):
    values = optimizer.diagnostics()
    return values.get("exact_inverses", 0), values.get("newton_inverses", 0)


@pytest.mark.parametrize("values", [{"solver": "newton"}, {"reference": True}])
def test_exact_at_0_T_2T_and_every_CT_newton_elsewhere(values):
    model = network().double()
    optimizer = build(model, inverse_interval=3, exact_interval=5, **values)
    exact, other = [], []
    for step in range(33):
        before = counts(optimizer)
        step_on(model, optimizer, data(step))
        after = counts(optimizer)
        exact += [step] if after[0] - before[0] == 4 else []
        other += [step] if after[1] - before[1] == 4 else []
    assert exact == [0, 3, 6, 15, 30]
    assert other == [9, 12, 18, 21, 24, 27]
    assert not any("restart" in name or "kept" in name for name in optimizer.diagnostics())
    optimizer.close()


def test_cholesky_is_exact_at_every_refresh():
    model = network().double()
    optimizer = build(model, inverse_interval=2, solver="exact")
    for step in range(12):
        step_on(model, optimizer, data(step))
    assert counts(optimizer) == (24, 0)
    optimizer.close()


def test_newton_follows_the_exact_inverse():
    models = [network(40).double() for _ in range(2)]
    optimizers = [
        build(model, inverse_interval=2, damping=0.1, solver=solver)
        for model, solver in zip(models, ("newton", "exact"), strict=True)
    ]
    for step in range(40):
        for model, optimizer in zip(models, optimizers, strict=True):
            step_on(model, optimizer, data(step, rows=200))
    for left, right in zip(*(optimizer.bound for optimizer in optimizers), strict=True):
        ours, exact = optimizers[0].preconditioner(left), optimizers[1].preconditioner(right)
        for name in ("input", "output"):
            found, wanted = getattr(ours, name), getattr(exact, name)
            assert (found - wanted).norm() / wanted.norm() < 0.02, name
    for optimizer in optimizers:
        optimizer.close()


def test_the_solver_goes_by_size_and_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert factors.cheaper_solver(10**6, cpu) == "exact"
    smallest = factors.NEWTON_SIZES["cuda"]
    assert factors.cheaper_solver(smallest - 1, gpu) == "exact"
    assert factors.cheaper_solver(smallest, gpu) == "newton"


def test_auto_is_the_chosen_solver():
    models = [network().double() for _ in range(2)]
    optimizers = [
        build(model, inverse_interval=2, solver=solver)
        for model, solver in zip(models, ("auto", "exact"), strict=True)
    ]
    for step in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            step_on(model, optimizer, data(step))
    same(*models)
    assert counts(optimizers[0]) == (20, 0)


def test_a_previous_inverse_that_is_no_start_is_replaced_by_the_exact_one():
    torch.manual_seed(0)
    roots = torch.randn(3, 20, 40, dtype=F64)
    matrices = roots @ roots.mT / 40 + 0.1 * torch.eye(20, dtype=F64)
    exact = torch.linalg.inv(matrices)
    previous = exact.clone()
    previous[0] = torch.linalg.inv(torch.diag(torch.logspace(0, 6, 20, dtype=F64)))
    previous[1, 0, 0] = float("nan")
    counted = {}
    found, failed = factors.invert(
        matrices, previous, 1, 0.0, lambda n, by: counted.update({n: by})
    )
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    assert counted == {"newton_restarts": 2} and failed == []


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_factor_that_cannot_be_inverted_keeps_its_inverse_and_is_counted(dtype):
    matrices = torch.eye(4, dtype=dtype).expand(2, 4, 4).clone()
    matrices[1, 2, 2] = float("nan")
    previous = 3 * torch.eye(4, dtype=dtype).expand(2, 4, 4).clone()
    counted = {}
    found, failed = factors.invert(
        matrices, previous, 0, 0.0, lambda n, by: counted.update({n: by})
    )
    torch.testing.assert_close(found[0], matrices[0])
    assert torch.equal(found[1], previous[1])
    assert failed == [1] and counted == {"inverse_kept": 1}


@pytest.mark.parametrize(("damping", "bound"), [(1e-4, 1e-3), (1e-3, 1e-4), (1e-2, 1e-4)])
def test_exact_inverses_in_float32_are_as_exact_as_the_damping_allows(damping, bound):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 100, 300, generator=generator, dtype=F64)
    moments = rows.mT @ rows / 100
    matrices = factors.damp(moments, damping).float()
    previous = torch.zeros_like(matrices)
    found, failed = factors.invert(matrices, previous, 0, damping, lambda name, by: None)
    exact = torch.linalg.inv(matrices.double())
    assert not failed
    assert ((found - exact).norm() / exact.norm()) < bound


def test_three_failures_in_a_row_stop_with_advice():
    model = network().double()
    optimizer = build(model, inverse_interval=1)
    step_on(model, optimizer, data())
    optimizer.state[model[0].weight]["input_factor"].fill_(float("nan"))
    for step in range(2):
        step_on(model, optimizer, data(step))
    assert optimizer.diagnostics()["inverse_kept"] == 2
    with pytest.raises(RuntimeError, match=r"0\.input"):
        step_on(model, optimizer, data())
    optimizer.close()


# Which passes count ----------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"reference": True}], ids=["default", "reference"])
def test_micro_batches_count_once_from_step_0_on(values):
    model, twin = network().double(), network().double()
    ours, theirs = (build(m, inverse_interval=2, **values) for m in (model, twin))
    for step in range(7):
        x, y = data(step, rows=64)
        step_on(model, ours, (x, y))
        theirs.zero_grad()
        for half in (slice(0, 32), slice(32, 64)):
            (loss_of(twin, (x[half], y[half])) / 2).backward()
        theirs.step()
        if step == 0:
            assert theirs.state[twin[0].weight]["input_updates"] == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    for left, right in zip(ours.bound, theirs.bound, strict=True):
        torch.testing.assert_close(ours.curvature(left).input, theirs.curvature(right).input)
        torch.testing.assert_close(ours.curvature(left).output, theirs.curvature(right).output)


def test_eval_forwards_leave_no_trace():
    model, twin = network().double(), network().double()
    ours, theirs = build(model), build(twin)
    for step in range(4):
        step_on(model, ours, data(step))
        theirs.zero_grad()
        twin.eval()
        loss_of(twin, data(50 + step)).backward()
        with torch.no_grad():
            twin(data(70 + step)[0])
        twin.train()
        for p in twin.parameters():
            p.grad = None
        loss_of(twin, data(step)).backward()
        theirs.step()
    same(model, twin)


class Branches(nn.Module):
    """A layer that some passes leave out."""

    def __init__(self):
        super().__init__()
        self.body, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.used = False

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.head(x + self.expert(x) if self.used else x)


@pytest.mark.parametrize("solver", ["newton", "exact"])
def test_a_layer_first_used_late_gets_three_exact_inverses_and_one_never_used_stays(solver):
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = build(model, inverse_interval=4, solver=solver)
    before = model.expert.weight.detach().clone()
    refreshed = []
    for step in range(30):
        if step == 10:
            assert torch.equal(model.expert.weight, before)
        model.used = step >= 10
        before_step = optimizer.state[model.expert.weight].get("input_refreshes", 0)
        step_on(model, optimizer, data(step))
        if optimizer.state[model.expert.weight]["input_refreshes"] > before_step:
            refreshed.append(step)
        if step == 10:  # the first inverse comes with the first statistics, and is exact
            state = optimizer.state[model.expert.weight]
            product = state["input_inverse"] @ unpack(state["input_factor"])
            eigenvalues = torch.linalg.eigvals(product).real
            assert (eigenvalues < 1).all() and (eigenvalues > 0.3).any()
    assert refreshed == [10, 12, 16, 20, 24, 28]
    if solver == "newton":  # of the body and the head at 12 … 28, of the expert at 20, 24 and 28
        assert counts(optimizer)[1] == 2 * 2 * 5 + 2 * 3
    optimizer.close()


class Gated(nn.Module):
    """A layer behind a gate that is zero at first, as of adapters and of LoRA's A."""

    def __init__(self):
        super().__init__()
        self.body, self.gated, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.head(x + self.gate * self.gated(x))


def test_behind_a_gate_that_was_zero_the_first_inverse_comes_with_the_next_statistics():
    torch.manual_seed(0)
    model = Gated().double()
    optimizer = build(model, stat_interval=2, inverse_interval=100)
    for step in range(3):
        step_on(model, optimizer, data(step))
        state = optimizer.state[model.gated.weight]
        assert state["output_refreshes"] == (step == 2)
    factor, damping = unpack(state["output_factor"]), optimizer.config.damping
    damped = factor + damping * torch.linalg.eigvalsh(factor).amax() * torch.eye(4).double()
    inverse = torch.linalg.inv(damped)  # λmax is an estimate
    torch.testing.assert_close(state["output_inverse"], inverse, rtol=1e-2, atol=1e-2)
    assert state["input_refreshes"] == 1
    optimizer.close()


@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-22])
def test_output_gradients_whose_squares_are_subnormal_have_a_factor(size):
    factors = []
    for scale in (1.0, size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = build(model, lr=0.0, state_dtype="float32")
        for step in range(12):  # ten statistics in a row that are not finite stop training
            optimizer.zero_grad()
            (loss_of(model, [part.float() for part in data(step)]) * scale).backward()
            optimizer.step()
        factors.append([optimizer.state[model[0].weight]["output_factor"]])
        assert optimizer.diagnostics()["statistics_dropped"] == 0
        optimizer.close()
    torch.testing.assert_close(*factors, rtol=1e-4, atol=1e-5)


def test_a_layer_never_used_is_no_error():
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = build(model, inverse_interval=2)
    before = model.expert.weight.detach().clone()
    for step in range(9):
        step_on(model, optimizer, data(step))
    assert torch.equal(model.expert.weight, before)
    assert optimizer.state[model.expert.weight]["input_refreshes"] == 0
    optimizer.close()


# State -----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["newton", "exact"])
@pytest.mark.parametrize("base", ["sgd", "adamw", "adamr"])
def test_a_run_resumed_between_refreshes_is_bit_equal(base, solver):
    values = {"inverse_interval": 5, "stat_interval": 2, "base": base, "lr": 1e-2}
    values |= {"momentum": 0.9, "solver": solver}
    model = network().float()
    optimizer = build(model, **values)
    for step in range(18):
        step_on(model, optimizer, data(step, dtype=torch.float32))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    resumed = build(other, **values)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(18, 30):
        step_on(model, optimizer, data(step, dtype=torch.float32))
        step_on(other, resumed, data(step, dtype=torch.float32))
    same(model, other)
    for kind in ("factor", "inverse", "updates", "refreshes"):
        for side in ("input", "output"):
            key = f"{side}_{kind}"
            left, right = optimizer.state[model[0].weight][key], resumed.state[other[0].weight][key]
            assert torch.equal(torch.as_tensor(left), torch.as_tensor(right)), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_factors_are_kept_in_state_dtype_and_inverses_in_that_of_the_mathematics(dtype):
    model, plain = network().float(), network().float()
    ours, theirs = build(model, state_dtype=dtype, lr=1e-2), build(plain, lr=1e-2)
    for step in range(6):
        step_on(model, ours, data(step, dtype=torch.float32))
        step_on(plain, theirs, data(step, dtype=torch.float32))
    state = ours.state[model[0].weight]
    assert state["input_factor"].dtype == getattr(torch, dtype)
    assert state["input_inverse"].dtype == torch.float32
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.05, atol=2e-3)


def test_work_that_is_not_due_is_skipped():
    model = network().double()
    optimizer = build(model, inverse_interval=6, stat_interval=4)
    updates, refreshes = [], []
    for step in range(13):
        step_on(model, optimizer, data(step))
        state = optimizer.state[model[0].weight]
        updates.append(int(state["input_updates"]))
        refreshes.append(state["input_refreshes"])
    assert updates == [1] * 4 + [2] * 4 + [3] * 4 + [4]
    assert refreshes == [1] * 6 + [2] * 6 + [3]
    optimizer.close()


def test_defaults():
    config = NKFACConfig()
    assert (config.stat_interval, config.inverse_interval, config.damping) == (10, 100, 0.01)
    assert (config.stat_decay, config.newton_steps, config.exact_interval) == (0.95, 1, 500)


def test_momentum_zero_keeps_no_buffer():
    model = network().double()
    optimizer = build(model, momentum=0.0, reference=True)
    losses = [step_on(model, optimizer, data()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not any("momentum_buffer" in state for state in optimizer.state.values())
    optimizer.close()
