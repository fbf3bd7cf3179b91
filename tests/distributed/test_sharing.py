"""Refreshes shared out among ranks: the same results, counters and stops as on one rank."""

import pytest
import torch
from torch import nn

from hf_precond.distributed import collectives
from hf_precond.linalg import factorization, matrix_functions
from hf_precond.optimizers.nkfac import factors
from hf_precond.registry import create_optimizer
from tests import ranks
from tests.optimizers.models import batch, make, train_step

STEPS = 10
FIELDS = {
    "adamr": {"basis_interval": 2, "basis_tolerance": 0.0},
    "afopt": {"scope": "all_linear", "stat_interval": 1, "inverse_interval": 2},
    "nkfac": {"stat_interval": 1, "inverse_interval": 2},
}


class Work:
    """Counts the matrices that a function is given."""

    def __init__(self, function):
        self.function, self.matrices = function, 0

    def __call__(self, matrices, *args, **kwargs):
        self.matrices += matrices.shape[:-2].numel()
        return self.function(matrices, *args, **kwargs)


def matrices_with(name, transport="permute"):
    """Steps with the same gradients on every rank; what came of them."""
    seen = {
        "adamr": (factorization, "eigh"),
        "afopt": (matrix_functions, "damp"),
        "nkfac": (factors, "damp"),
    }
    module, attribute = seen[name]
    plain = getattr(module, attribute)
    work = Work(plain)
    setattr(module, attribute, work)
    try:
        fields = FIELDS[name] | ({"transport": transport} if name == "adamr" else {})
        model = make("bert", dtype=torch.float64)
        if name == "adamr":
            model = nn.ModuleList(nn.Linear(n, m, dtype=torch.float64) for m, n in [(6, 6)] * 3)
            model.append(nn.Linear(9, 5, dtype=torch.float64))
        optimizer = create_optimizer(model, name, lr=1e-3, **fields)
        for step in range(STEPS):
            if name != "adamr":
                train_step(model, optimizer, batch("bert", step, dtype=torch.float64))
                continue
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = draw
            optimizer.step()
        state = {
            f"{number}.{key}": torch.as_tensor(value)
            for number, parameter in enumerate(model.parameters())
            for key, value in optimizer.state[parameter].items()
        }
        weights = {key: value.detach() for key, value in model.named_parameters()}
        counters = optimizer.diagnostics()
        optimizer.close()
        return {"weights": weights, "state": state, "counters": counters, "work": work.matrices}
    finally:
        setattr(module, attribute, plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "transport"),
    [("adamr", "permute"), ("adamr", "overlap"), ("afopt", ""), ("nkfac", "")],
)
def test_two_ranks_share_the_work_and_end_as_one(name, transport):
    single = matrices_with(name, transport)
    first, second = ranks.run(matrices_with, name, transport)
    assert first["work"] + second["work"] == single["work"]
    assert max(first["work"], second["work"]) <= 0.7 * single["work"]
    counted = {key for key in single["counters"] if "refresh" in key or "inverses" in key}
    assert counted and first["counters"].keys() == single["counters"].keys()
    for key in counted:
        assert first["counters"][key] == second["counters"][key] == single["counters"][key], key
    for part in ("weights", "state"):
        assert first[part].keys() == second[part].keys() == single[part].keys()
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), key
            if not key.endswith("factor"):  # above the diagonal a basis's factor may hold anything
                torch.testing.assert_close(value, single[part][key], rtol=1e-7, atol=1e-9, msg=key)


def fails_on_one_rank():
    """Rank 1's first inverses fail for good; what every rank is told."""
    model = make("bert", dtype=torch.float64)
    optimizer = create_optimizer(model, "nkfac", lr=1e-3, **FIELDS["nkfac"])
    plain = factors.damp

    def damp(moments, damping):
        if collectives.rank() == 1:
            raise torch.OutOfMemoryError("out of memory")
        return plain(moments, damping)

    factors.damp = damp
    try:
        for step in range(STEPS):
            train_step(model, optimizer, batch("bert", step, dtype=torch.float64))
    except RuntimeError as error:
        broken = optimizer.diagnostics()["refresh_out_of_memory"]
        return {"steps": optimizer.steps, "said": str(error), "broken": broken}
    finally:
        factors.damp = plain
    return {}


@pytest.mark.slow
def test_a_failure_on_one_rank_is_counted_and_stops_all():
    first, second = ranks.run(fails_on_one_rank)
    assert first == second
    assert first["steps"] == 4 and "3 times in a row" in first["said"] and first["broken"] > 3
