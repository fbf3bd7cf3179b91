"""NKFAC's step against its formulas written out: factors, damping, inverses, norm, fallback."""

import copy

import pytest
import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix, ModelStructure
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.optimizers.nkfac.factors import FLOOR
from hf_precond.optimizers.nkfac.optimizer import NKFAC
from hf_precond.registry import create_optimizer
from hf_precond.statistics.requests import Statistic, StatisticsSource

F64 = torch.float64


class Given(StatisticsSource):
    """A source that hands over the same statistics at every step."""

    def __init__(self, sums):
        self.sums = sums

    def take(self):
        one = torch.ones((), dtype=F64)
        return {key: Statistic(total.clone(), one) for key, total in self.sums.items()}


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def data(step=0, rows=16, outputs=3):
    generator = torch.Generator().manual_seed(100 + step)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    return draw(rows, 4), draw(rows, outputs)


def loss_of(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def step_on(model, optimizer, batch, scale=1.0):
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    (scale * loss).backward()
    optimizer.step()
    return loss.item()


def build(model, **values):
    defaults = {"base": "sgd", "momentum": 0.0, "lr": 0.1, "stat_interval": 1}
    return create_optimizer(model, "nkfac", **defaults | values)


def with_statistics(model, sums, groups=None, **values):
    """An optimizer of the model's linear layers that is given these statistics."""
    matrices = [
        LayerMatrix(name, module, bias=None if module.bias is None else "bias")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    structure = ModelStructure(matrices=matrices, open_statistics=lambda requests: Given(sums))
    config = NKFACConfig(**{"base": "sgd", "lr": 0.1, "stat_interval": 1} | values)
    return NKFAC(groups or model.parameters(), structure, config)


def identities(model, scale=7.0):
    sums = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            out, columns = module.weight.shape
            sums[f"{name}.output"] = scale * torch.eye(out, dtype=F64)
            sums[f"{name}.input"] = 3 * scale * torch.eye(columns + 1, dtype=F64)
    return sums


def seen_rows(layer, model, batch):
    """Inputs of a layer (ones behind them) and output gradients, one row each."""
    seen = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.extend([args[0].detach(), out]))
    loss = loss_of(model, batch)
    handle.remove()
    rows, outputs = seen
    (deltas,) = torch.autograd.grad(loss, outputs)
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], 1), deltas


def joined(layer):
    return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)


def unit(matrix):
    return matrix / matrix.norm()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(left, right, rtol=1e-11):
    for p, q in zip(left, right, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


# Factors and the block -----------------------------------------------------------


def test_factors_are_averages_of_unit_moments_without_start_up_bias():
    model = network()
    optimizer = build(model, stat_decay=0.7, lr=0.0, weight_decay=0.1)
    expected = None
    for step in range(6):
        rows, deltas = seen_rows(model[3], model, data(step))
        moments = [unit(deltas.T @ deltas), unit(rows.T @ rows)]
        keep = min(0.7, 1 - 1 / (step + 1))
        if expected is None:
            expected = moments
        expected = [keep * e + (1 - keep) * m for e, m in zip(expected, moments, strict=True)]
        step_on(model, optimizer, data(step))
        block = optimizer.curvature(optimizer.bound[1])
        torch.testing.assert_close(block.output, expected[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(block.input, expected[1], rtol=1e-12, atol=1e-14)
    optimizer.close()


def test_the_dense_block_is_the_kronecker_product_that_acts_on_the_gradient():
    model = network()
    optimizer = build(model, inverse_interval=2)
    for step in range(3):
        step_on(model, optimizer, data(step))
    for bound in optimizer.bound:
        layer = bound.matrix.module
        gradient = joined(layer)
        for block in (optimizer.curvature(bound), optimizer.preconditioner(bound)):
            dense = torch.einsum("ij,kl->ikjl", block.output, block.input)
            dense = dense.reshape(gradient.numel(), gradient.numel())
            applied = (dense @ gradient.flatten()).view_as(gradient)
            torch.testing.assert_close(block.apply(gradient), applied, rtol=1e-11, atol=1e-14)
    optimizer.close()


def damping_of(matrix, damping):
    return max(FLOOR, damping * torch.linalg.eigvalsh(matrix)[-1].item())


@pytest.mark.parametrize("solver", ["newton", "exact"])
def test_one_step_is_the_damped_kronecker_solve_at_the_gradients_norm(solver):
    model = network()
    optimizer = build(model, damping=0.1, solver=solver)
    before = [
        torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
        for layer in (model[0], model[3])
    ]
    blocks = []
    for layer in (model[0], model[3]):
        rows, deltas = seen_rows(layer, model, data())
        blocks.append((unit(deltas.T @ deltas), unit(rows.T @ rows)))
    step_on(model, optimizer, data())
    for (left, right), layer, old in zip(blocks, (model[0], model[3]), before, strict=True):
        gradient = joined(layer)
        left = left + damping_of(left, 0.1) * torch.eye(len(left), dtype=F64)
        right = right + damping_of(right, 0.1) * torch.eye(len(right), dtype=F64)
        dense = torch.kron(left, right)
        solved = torch.linalg.solve(dense, gradient.flatten()).view_as(gradient)
        values_l, vectors_l = torch.linalg.eigh(left)
        values_r, vectors_r = torch.linalg.eigh(right)
        rotated = (vectors_l.T @ gradient @ vectors_r) / values_l[:, None] / values_r
        torch.testing.assert_close(vectors_l @ rotated @ vectors_r.T, solved)
        expected = solved * gradient.norm() / solved.norm()
        moved = (old - torch.cat([layer.weight, layer.bias[:, None]], 1).detach()) / 0.1
        # The damping's eigenvalue comes from power iteration.
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)
    optimizer.close()


def test_the_norm_is_the_gradients_over_weight_and_bias_together():
    model = network()
    before = weights(model)
    optimizer = build(model, damping=0.01)
    step_on(model, optimizer, data())
    for index, layer in ((0, model[0]), (4, model[3])):
        weight, bias = before[index], before[index + 1]
        change = torch.cat([weight - layer.weight, (bias - layer.bias)[:, None]], 1).detach() / 0.1
        gradient = joined(layer)
        assert change.norm().item() == pytest.approx(gradient.norm().item(), rel=1e-12)
        assert abs(change[:, :-1].norm() / gradient[:, :-1].norm() - 1) > 1e-3
        assert (change - gradient).norm() > 0.01 * gradient.norm()
    optimizer.close()


def test_factors_of_a_deep_linear_network_are_its_gauss_newton_blocks():
    # Squared error, residuals white: then the covariance of output gradients is the curvature
    # seen from the layer, and input and curvature do not depend on each other.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    inputs = torch.randn(12, 4, dtype=F64)
    white = torch.linalg.qr(torch.randn(12, 2, dtype=F64))[0]
    targets = (model(inputs) + white).detach()
    optimizer = build(model, lr=0.0, weight_decay=0.1)
    nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
    names = dict(model.named_parameters())
    for index, bound in enumerate(optimizer.bound):
        keys = [f"{index}.weight", f"{index}.bias"]
        out, columns = bound.matrix.shape[0], bound.matrix.columns

        def outputs(joint, keys=keys, columns=columns):
            values = dict(names) | {keys[0]: joint[:, : columns - 1], keys[1]: joint[:, -1]}
            return torch.func.functional_call(model, values, (inputs,))

        joint = torch.cat([names[keys[0]], names[keys[1]][:, None]], 1).detach()
        jacobian = torch.func.jacrev(outputs)(joint).reshape(-1, out * columns)
        exact = jacobian.T @ jacobian
        block = optimizer.curvature(bound)
        found = torch.kron(block.output, block.input)
        torch.testing.assert_close(unit(found), unit(exact), rtol=1e-9, atol=1e-12)
    optimizer.close()


# Fallback optimizers -------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_identity_factors_are_the_plain_optimizer(base):
    model, plain = network(), network()
    values = {"lr": 0.05, "weight_decay": 0.1, "base": base, "inverse_interval": 3}
    optimizer = with_statistics(model, identities(model), **values)
    if base == "adamw":
        theirs = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    else:
        theirs = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for step in range(10):
        step_on(model, optimizer, data(step))
        theirs.zero_grad()
        loss_of(plain, data(step)).backward()
        if base == "sgd":  # torch's decay is coupled, ours decoupled
            with torch.no_grad():
                torch._foreach_mul_(list(plain.parameters()), 1 - 0.05 * 0.1)
        theirs.step()
    assert optimizer.diagnostics()["exact_inverses"] == 4 * 4
    assert_same(weights(model), weights(plain))


def test_identity_factors_in_reference_mode_are_torchs_sgd_with_coupled_decay():
    model, plain = network(), network()
    values = {"lr": 0.05, "weight_decay": 0.1, "inverse_interval": 3, "reference": True}
    optimizer = with_statistics(model, identities(model), **values)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for step in range(10):
        step_on(model, optimizer, data(step))
        theirs.zero_grad()
        loss_of(plain, data(step)).backward()
        theirs.step()
    assert_same(weights(model), weights(plain))


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_what_is_no_matrix_goes_by_the_fallback(base):
    model = network()
    optimizer = build(model, base=base, lr=0.01, momentum=0.9)
    norm = model[2]
    twins = [nn.Parameter(p.detach().clone()) for p in norm.parameters()]
    if base == "sgd":
        theirs = torch.optim.SGD(twins, lr=0.01, momentum=0.9)
    else:
        theirs = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.0)
    for step in range(5):
        step_on(model, optimizer, data(step))
        for twin, parameter in zip(twins, norm.parameters(), strict=True):
            twin.grad = parameter.grad.clone()
        theirs.step()
    assert_same([p.detach() for p in norm.parameters()], [p.detach() for p in twins])
    optimizer.close()


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_decay_is_decoupled_and_not_preconditioned(base):
    model, twin = network(), network()
    for m, decay in ((model, 0.0), (twin, 0.3)):
        optimizer = build(m, base=base, weight_decay=decay)
        before = weights(m)
        step_on(m, optimizer, data())
        optimizer.close()
    for p, q, old in zip(model.parameters(), twin.parameters(), before, strict=True):
        kept = 1 - 0.1 * 0.3 if old.dim() == 2 else 1.0
        torch.testing.assert_close(q - p, (kept - 1) * old, rtol=1e-9, atol=1e-13)


def test_adamr_under_the_preconditioned_gradient():
    model, other = network(), network()
    losses = []
    for m, base in ((model, "adamr"), (other, "adamw")):
        optimizer = build(m, base=base, lr=1e-2)
        losses.append([step_on(m, optimizer, data()) for _ in range(30)])
        optimizer.close()
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert (model[0].weight - other[0].weight).norm() > 1e-3


@pytest.mark.parametrize("scale", [1024.0, 1e-12])
def test_the_losss_scale_over_lr_changes_nothing(scale):
    model, twin = network(), network()
    ours = build(model, lr=0.05, momentum=0.9, inverse_interval=2)
    theirs = build(twin, lr=0.05 / scale, momentum=0.9, inverse_interval=2)
    for step in range(8):
        step_on(model, ours, data(step))
        step_on(twin, theirs, data(step), scale=scale)
    assert_same(weights(model), weights(twin), rtol=1e-9)
    ours.close()
    theirs.close()


def test_a_doubled_batch_has_the_same_factors():
    model, twin = network(), network()
    ours, theirs = build(model), build(twin)
    x, y = data()
    step_on(model, ours, (x, y))
    step_on(twin, theirs, (torch.cat([x, x]), torch.cat([y, y])))
    for left, right in zip(ours.bound, theirs.bound, strict=True):
        for name in ("output", "input"):
            torch.testing.assert_close(
                getattr(ours.curvature(left), name), getattr(theirs.curvature(right), name)
            )
    assert_same(weights(model), weights(twin))


@pytest.mark.parametrize("values", [{}, {"reference": True}], ids=["default", "reference"])
def test_a_layer_without_gradient_only_decays(values):
    model = network()
    before = model[0].weight.detach().clone()
    optimizer = build(model, weight_decay=0.2, inverse_interval=2, **values)
    with torch.no_grad():
        model[3].weight.zero_()
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, data(step)).backward()
        model[3].weight.grad.zero_()  # stays zero, so nothing reaches model[0]
        optimizer.step()
        model[3].weight.data.zero_()
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 0.1 * 0.2) ** 5)
    for p in model.parameters():
        assert torch.isfinite(p).all()
    for state in optimizer.state.values():
        assert all(torch.isfinite(v).all() for v in state.values() if isinstance(v, torch.Tensor))
    assert optimizer.diagnostics()["statistics_dropped"] == 0
    optimizer.close()


def test_centred_output_gradients_of_a_classifier_are_damped_by_their_true_eigenvalue():
    model = network()
    optimizer = build(model, damping=0.1, solver="exact")
    x, y = data()
    nn.functional.cross_entropy(model(x), y.argmax(1)).backward()
    optimizer.step()
    bound = optimizer.bound[1]
    factor = optimizer.curvature(bound).output
    assert (factor @ torch.ones(3, dtype=F64)).norm() < 1e-12
    shift = damping_of(factor, 0.1)
    expected = torch.linalg.inv(factor + shift * torch.eye(3, dtype=F64))
    torch.testing.assert_close(
        optimizer.preconditioner(bound).output, expected, rtol=1e-4, atol=1e-6
    )
    optimizer.close()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("values", [{}, {"reference": True}], ids=["default", "reference"])
def test_a_statistic_that_is_not_finite_is_dropped_and_counted(bad, values):
    model, twin = network(), network()
    sums = identities(model)
    sums["0.input"][0, 0] = 9.0
    ours = with_statistics(model, copy.deepcopy(sums), **values)
    theirs = with_statistics(twin, copy.deepcopy(sums), **values)
    for step in range(6):
        if step == 2:
            ours.statistics.sums["0.input"][1, 2] = bad
            ours.statistics.sums["3.output"][1, 1] = bad
        if step == 3:
            ours.statistics.sums = copy.deepcopy(sums)
        step_on(model, ours, data(step))
        step_on(twin, theirs, data(step))
    assert ours.diagnostics()["statistics_dropped"] == 2
    assert theirs.diagnostics()["statistics_dropped"] == 0
    state = ours.state[model[0].weight]
    assert state["input_updates"] == 5 and state["output_updates"] == 6
    assert torch.isfinite(state["input_factor"]).all()
    if not values:  # the statistics are all alike, so one less changes nothing
        assert_same(weights(model), weights(twin))
