"""What is done otherwise with tensors of a GPU, done on the CPU."""

import contextlib
import warnings

import pytest
import torch

from hf_precond.linalg.matrix_functions import newton_schulz
from hf_precond.optimizers.muon.step import EPS, MuonStep
from hf_precond.registry import create_optimizer, get_info, list_optimizers
from tests.optimizers.models import backward, batch, make, train_step, weights
from tests.optimizers.test_shared import QUICK
from tests.rounding import Rounding, accelerator

CASES = [(name, {}) for name in list_optimizers()]
CASES += [
    ("adamr", {"basis": "one_sided"}),
    ("adamr", {"basis_source": "feature"}),
    ("adamr", {"max_dim": 10}),
    ("adamr", {"floor": 0.0}),
    ("adamr", {"direction": "sign"}),
    ("nkfac", {"base": "adamr"}),
    ("nkfac", {"reference": True, "weight_decay": 0.1}),
]


def trained(name, values, steps, dtype):
    """Losses, and the weights at the end."""
    # More images than any layer is wide: an eigenbasis of a null space is left to rounding.
    model = make("vit", dtype=dtype)
    optimizer = create_optimizer(model, name, lr=1e-3, **QUICK[name] | values)
    if name == "afopt":  # on a CPU layers take turns to be refreshed, on accelerators they do not
        optimizer.plan.phases = dict.fromkeys(optimizer.plan.phases, 0)
    data = batch("vit", size=48, dtype=dtype)
    losses = [train_step(model, optimizer, data) for _ in range(steps)]
    assert all(isinstance(value, float) for value in optimizer.diagnostics().values())
    optimizer.close()
    return losses, weights(model)


@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
def test_float64_steps_are_the_same(name, values, monkeypatch):
    # Muon's sign is bfloat16 in any model: the products of both paths are rounded alike here, which
    # those of some processors are not; tests of the sign itself bound that.
    batched = lambda step, stack: newton_schulz(stack, step.ns_steps, EPS)  # noqa: E731
    monkeypatch.setattr(MuonStep, "_own_signs", batched)
    # AdamR's eigenvectors of close eigenvalues multiply rounding by 1e5 a step, and what NKFAC
    # makes of the head's gradient has a null space.
    steps = {"adamr": 3}.get(name, 2 if "base" in values else 5)
    with Rounding():
        _, expected = trained(name, values, steps, torch.float64)
    with accelerator():
        _, found = trained(name, values, steps, torch.float64)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.parametrize("precision", ["auto", "highest", "tf32", "bf16"])
@pytest.mark.parametrize(
    "name", [n for n in list_optimizers() if hasattr(get_info(n).config_cls, "precision")]
)
def test_float32_losses_are_alike(name, precision):
    expected, _ = trained(name, {}, 6, torch.float32)
    with accelerator():
        found, _ = trained(name, {"precision": precision}, 6, torch.float32)
    # AFOpt takes the matrix sign of square matrices in bfloat16 then.
    assert found == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("sizes", [(12, 30), (30, 12), (12, 12), (40, 9)])
def test_afopt_steps_every_form_alike(sizes):
    """Rows and columns longer than the other side, and neither; widths that are padded."""
    found = []
    for context in (contextlib.nullcontext(), accelerator()):
        torch.manual_seed(0)
        first, second = torch.nn.Linear(*sizes), torch.nn.Linear(sizes[1], 8)
        model = torch.nn.Sequential(first, torch.nn.Tanh(), second).double()
        rows = torch.randn(64, sizes[0], dtype=torch.float64)
        with context, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is no attention
            optimizer = create_optimizer(model, "afopt", lr=1e-2, stat_interval=1)
            for _ in range(3):
                optimizer.zero_grad()
                model(rows).square().mean().backward()
                optimizer.step()
            optimizer.close()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", list_optimizers())
def test_a_gradient_of_zeros_moves_nothing(name):
    """As of LoRA's A at the first step."""
    model = make("bert")
    layer = model.bert.encoder.layer[0].intermediate.dense
    start = layer.weight.detach().clone()
    with accelerator():
        optimizer = create_optimizer(model, name, lr=1e-3, weight_decay=0.0)
        for step in range(3):
            backward(model, optimizer, batch("bert", step))
            layer.weight.grad.zero_(), layer.bias.grad.zero_()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.close()
    assert torch.equal(layer.weight, start)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("size", [1e-19, 1e-22, 1e-24])
@pytest.mark.parametrize("name", list_optimizers())
def test_tiny_gradients_leave_numbers(name, size):
    """Whose squares vanish, in one layer."""
    model = make("bert")
    layer = model.bert.encoder.layer[0].intermediate.dense
    with accelerator():
        optimizer = create_optimizer(model, name, lr=1e-3, **QUICK[name])
        for step in range(4):
            backward(model, optimizer, batch("bert", step))
            layer.weight.grad.mul_(size), layer.bias.grad.mul_(size)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.close()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
