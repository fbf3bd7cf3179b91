"""The shared step, with preconditioners simple enough to check by hand."""

import copy

import pytest
import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix, ModelStructure, RowSelection
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.base.optimizer import Preconditioned, PrecondOptimizer
from hf_precond.optimizers.nkfac.config import NKFACConfig


class Doubling(PrecondOptimizer):
    """Doubles the gradients of its matrices and hands them to the base rule."""

    def precondition(self, bound):
        return [Preconditioned(item, 2 * item.gradient()) for item in bound]


class Finishing(PrecondOptimizer):
    """Descends along the gradient itself."""

    def uses_fallback(self, bound):
        return False

    def precondition(self, bound):
        return [Preconditioned(item, item.gradient(), "direction") for item in bound]


class Idle(PrecondOptimizer):
    """Preconditions nothing."""


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def fill(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def whole(model):
    return ModelStructure(matrices=[LayerMatrix("0", model[0], bias="bias")])


def part(model):
    rows = RowSelection(1, (0, 2), 6)
    return ModelStructure(matrices=[LayerMatrix("0[q]", model[0], bias="bias", rows=rows)])


@pytest.mark.parametrize("blocks", [ModelStructure(), None], ids=["none", "found"])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_never_preconditioning_is_the_plain_optimizer(base, blocks):
    model, plain = network(), network()
    config = NKFACConfig(lr=0.1, weight_decay=0.3, base=base)
    ours = Idle(model.parameters(), blocks or part(model), config)
    if base == "adamw":
        theirs = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.3)
    else:
        theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(20):
        fill(model, step)
        fill(plain, step)
        ours.step()
        if base == "sgd":  # torch's decay is coupled, ours decoupled
            with torch.no_grad():
                torch._foreach_mul_(list(plain.parameters()), 1 - 0.1 * 0.3)
        theirs.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fused", [False, True])
def test_only_the_matrix_in_scope_sees_its_preconditioner(fused):
    model = network()
    rows = slice(0, 2) if fused else slice(None)
    optimizer = Doubling(
        model.parameters(), (part if fused else whole)(model), NKFACConfig(base="sgd", lr=1.0)
    )
    before = [p.detach().clone() for p in model.parameters()]
    fill(model)
    optimizer.step()
    factors = [torch.ones(6, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    factors[0][rows] = 2
    for index, (old, new) in enumerate(zip(before, model.parameters(), strict=True)):
        factor = factors[index // 2]
        factor = factor[:, None] if new.dim() == 2 else factor
        torch.testing.assert_close(new.detach(), old - factor * new.grad, rtol=1e-13, atol=0)


def test_a_finished_direction_decays_by_its_own_groups():
    model = network()
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.5, "lr": 0.1},
        {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0, "lr": 0.2},
    ]
    optimizer = Finishing(groups, whole(model), AdamRConfig())
    before = [model[0].weight.detach().clone(), model[0].bias.detach().clone()]
    fill(model)
    optimizer.step()
    expected = before[0] * (1 - 0.05) - 0.1 * model[0].weight.grad
    torch.testing.assert_close(model[0].weight.detach(), expected)
    torch.testing.assert_close(model[0].bias.detach(), before[1] - 0.2 * model[0].bias.grad)
    assert not optimizer.state[model[0].weight], "a finished matrix keeps no base-rule state"
    assert optimizer.state[model[2].weight]


def test_a_matrix_outside_the_groups_is_refused():
    model = network()
    with pytest.raises(ValueError, match="would precondition is in the parameter groups"):
        Doubling(model[2].parameters(), whole(model), NKFACConfig())


def test_low_precision_parameters_are_stepped_in_float32():
    torch.manual_seed(0)
    start = torch.randn(64)
    low = nn.Parameter(start.bfloat16())
    high = nn.Parameter(low.detach().float().clone())
    config = AdamRConfig(lr=1e-2, weight_decay=0.1)
    optimizers = [Idle([p], ModelStructure(), config) for p in (low, high)]
    for step in range(3):
        grad = torch.randn(64, generator=torch.Generator().manual_seed(step)).bfloat16()
        low.grad, high.grad = grad, grad.float()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            high.copy_(high.bfloat16())
    assert torch.equal(low.float(), high.detach())
    assert optimizers[0].state[low]["exp_avg"].dtype == torch.float32


def test_parameters_swapped_in_groups_and_modules_are_found_again():
    model, twin = network(), network()
    optimizers = [Doubling(m.parameters(), whole(m), NKFACConfig(lr=0.1)) for m in (model, twin)]
    swapped = {}
    for module in twin:
        for name, parameter in list(module.named_parameters(recurse=False)):
            swapped[parameter] = nn.Parameter(parameter.detach().clone())
            setattr(module, name, swapped[parameter])
    for group in optimizers[1].param_groups:
        group["params"] = [swapped[p] for p in group["params"]]
    for step in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            fill(m, step)
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_joint_deep_copy_steps_its_own_parameters():
    model = network()
    optimizer = Doubling(model.parameters(), whole(model), NKFACConfig(lr=0.1))
    fill(model)
    optimizer.step()
    twin, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, copied)):
        fill(m, 1)
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p is not q and torch.equal(p, q)
