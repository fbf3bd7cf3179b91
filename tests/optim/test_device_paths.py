"""What is done otherwise where tensors are not the CPU's, done on the CPU."""

import pytest
import torch

from hf_precond.registry import create_optimizer, list_optimizers
from tests.optim.models import batch, make, train_step, weights
from tests.optim.test_shared import QUICK

CASES = [(name, {}) for name in list_optimizers()]
CASES += [
    ("adamr", {"basis": "one_sided"}),
    ("adamr", {"basis_source": "feature"}),
    ("adamr", {"max_dim": 10}),
    ("adamr", {"floor": 0.0}),
    ("nkfac", {"base": "adamr"}),
]


def trained(name, values, steps):
    # More images than any layer is wide: an eigenbasis of a null space is left to rounding.
    model = make("vit", dtype=torch.float64)
    optimizer = create_optimizer(model, name, lr=1e-3, **QUICK[name] | values)
    for _ in range(steps):
        train_step(model, optimizer, batch("vit", size=48, dtype=torch.float64))
    optimizer.close()
    return weights(model)


@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
def test_the_same_steps_are_taken(name, values, monkeypatch):
    # AdamR's eigenvectors of close eigenvalues multiply rounding by 1e5 a step, and what NKFAC
    # makes of the head's gradient has a null space.
    steps = {"adamr": 3}.get(name, 2 if "base" in values else 5)
    expected = trained(name, values, steps)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False), raising=False)
    found = trained(name, values, steps)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-8, msg=key)
