"""What goes wrong in training: bad numbers, failing solvers, memory that runs out."""

import copy
import itertools
import math

import pytest
import torch

from hf_precond.distributed.collectives import all_finite
from hf_precond.optimizers.adamr import refresh as rotation_refresh
from hf_precond.optimizers.adamr.batch import Batch
from hf_precond.optimizers.base.refresh import MAX_DROPPED, FailureRecord
from hf_precond.registry import list_optimizers
from tests.optimizers.models import NO_STATISTICS, backward, batch, make, train, train_step, weights
from tests.optimizers.test_shared import build, same

each_name = pytest.mark.parametrize("name", list_optimizers())
# What belongs to the base rule and takes in every gradient, as it does in torch's optimizers.
MOMENTS = ("exp_avg", "exp_avg_sq", "mean_sq", "momentum", "momentum_buffer", "energy")
VARIANTS = {
    "adamr-feature": {"basis_source": "feature"},
    "nkfac-reference": {"reference": True, "exact_interval": 1},
}


def make_both(name, model_name="bert", **values):
    model = make(model_name)
    return model, build(name.split("-")[0], model, **VARIANTS.get(name, {}), **values)


def preconditioner(optimizer):
    """Every tensor of the state that no gradient enters directly."""
    return {
        f"{index}.{key}": value.clone()
        for index, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.endswith(MOMENTS)
    }


def everything(optimizer):
    """Every tensor and number of the state."""
    return {
        f"{index}.{key}": value.clone() if isinstance(value, torch.Tensor) else value
        for index, state in enumerate(optimizer.state.values())
        for key, value in state.items()
    }


def equal(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        alike = torch.equal(value, right[key]) if torch.is_tensor(value) else value == right[key]
        assert alike, key


# Numbers that are not finite -----------------------------------------------------------


@each_name
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_reaches_one_parameter_and_no_preconditioner(name, bad):
    model, optimizer = make_both(name)
    train("bert", model, optimizer, 4)
    optimizer.zero_grad()
    backward(model, optimizer, batch("bert", 4))
    layer = model.bert.encoder.layer[0]
    hit = layer.output.LayerNorm if name == "sgdph" else layer.attention.self.query
    hit.weight.grad.flatten()[3] = bad
    optimizer.step()
    for key, value in preconditioner(optimizer).items():
        assert torch.isfinite(value).all(), key
    # As with torch's optimizers, the weight is lost; it takes nobody with it but its own bias.
    lost = {p for p in model.parameters() if not torch.isfinite(p).all()}
    assert lost <= {hit.weight, hit.bias}
    # SGD-PH's clipped step bears infinities.
    assert hit.weight in lost or (name == "sgdph" and math.isinf(bad))
    optimizer.close()


def poison_loss(model, optimizer, step):
    backward(model, optimizer, batch("vit", step), scale=math.nan)


def poison_activations(model, optimizer, step):
    inputs = batch("vit", step)
    inputs["pixel_values"][0, 0, 1, 2] = math.inf
    backward(model, optimizer, inputs)


def poison_gradient(model, optimizer, step):
    backward(model, optimizer, batch("vit", step))
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.grad is not None]
    matrices[len(matrices) // 2].grad[0, 0] = math.nan


POISONS = [poison_loss, poison_activations, poison_gradient]


@pytest.mark.parametrize("name", [*sorted({*list_optimizers()} - NO_STATISTICS), "adamr-feature"])
@pytest.mark.parametrize("poison", POISONS[:2])
def test_bad_losses_and_activations_are_dropped_from_the_statistics_and_counted(name, poison):
    model, optimizer = make_both(name, "vit")
    train("vit", model, optimizer, 4)
    optimizer.zero_grad()
    poison(model, optimizer, 4)
    optimizer.step()
    for key, value in preconditioner(optimizer).items():
        assert torch.isfinite(value).all(), key
    seen = optimizer.diagnostics()
    counter = {
        "adamr": "gradients_dropped",
        "sgdph": "dropped_probes",
    }.get(name, "statistics_dropped")
    # A loss that is not a number leaves finite inputs, which are all that AFOpt looks at.
    assert (seen[counter] > 0) == ((name, poison) != ("afopt", poison_loss))
    optimizer.close()


@each_name
@pytest.mark.parametrize("poison", POISONS)
def test_skip_nonfinite_leaves_the_step_out_without_a_trace(name, poison):
    model, optimizer = make_both(name, "vit", skip_nonfinite=True)
    twin, undisturbed = make_both(name, "vit", skip_nonfinite=True)
    for step in range(3):
        optimizer.zero_grad()
        poison(model, optimizer, step)
        before = everything(optimizer)
        optimizer.step()
        if before:
            equal(before, everything(optimizer))
        train("vit", model, optimizer, 1, start=step)
        train("vit", twin, undisturbed, 1, start=step)
    same(weights(model), weights(twin))
    equal(everything(optimizer), everything(undisturbed))
    seen = optimizer.diagnostics()
    assert seen.pop("skipped_steps") == 3
    assert seen == undisturbed.diagnostics()
    for each in (optimizer, undisturbed):
        each.close()


@each_name
def test_too_many_skipped_steps_in_a_row_stop_with_advice(name):
    model, optimizer = make_both(name, "vit", skip_nonfinite=True)

    def bad_step():
        optimizer.zero_grad()
        poison_loss(model, optimizer, 0)
        optimizer.step()

    for _ in range(2):
        for _ in range(MAX_DROPPED - 1):
            bad_step()
        train("vit", model, optimizer, 1)
    for _ in range(MAX_DROPPED - 1):
        bad_step()
    with pytest.raises(RuntimeError, match=rf"{name}: 10 steps in a row.*look at the data"):
        bad_step()
    optimizer.close()


@pytest.mark.parametrize("name", [*sorted({*list_optimizers()} - NO_STATISTICS), "adamr-feature"])
def test_statistics_that_stay_bad_stop_with_advice(name):
    model, optimizer = make_both(name, "vit")
    with pytest.raises(RuntimeError, match=r"10 .*in a row.*skip_nonfinite=True") as stopped:
        for step in range(40):
            optimizer.zero_grad()
            poison_activations(model, optimizer, step)
            optimizer.step()
    if name in ("afopt", "nkfac"):
        assert str(stopped.value).startswith("vit.")
    assert optimizer.steps <= 20
    optimizer.close()


def test_all_finite_looks_at_every_dtype_and_at_nothing():
    assert all_finite([]) and all_finite([torch.empty(0), torch.zeros(())])
    large = [torch.full((3,), 1e38), torch.full((3,), 6e4).half(), torch.ones(2).double()]
    assert all_finite(large)
    for bad in (math.nan, math.inf, -math.inf):
        for place in range(3):
            tensors = [t.clone() for t in large]
            tensors[place][-1] = bad
            assert not all_finite(tensors)


# Solvers that fail, memory that runs out ------------------------------------------------

# Made anew at every call: an exception that is raised again keeps the frames of all its raises,
# and so the optimizers in them, alive.
ERRORS = {
    "solver": lambda: torch.linalg.LinAlgError("linalg: the algorithm failed to converge"),
    "out_of_memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
}
SOLVERS = ("eigh", "qr", "inv", "cholesky_ex", "solve_triangular")
# The solver on which an optimizer's refreshes depend; the others it does without, or has
# a way around.
NEEDED: dict[str, tuple[str, ...]] = {
    "adamr": ("cholesky_ex", "solve_triangular"),
    "afopt": ("cholesky_ex", "solve_triangular"),
    "muon": (),
    "nkfac": ("cholesky_ex",),
    "nkfac-reference": ("inv",),
    "sgdph": (),
}
each_needed = pytest.mark.parametrize(
    ("name", "solver"), [(name, solver) for name, needed in NEEDED.items() for solver in needed]
)
# The tensors that then stay as they are.
KEPT = {
    "adamr": ("_basis",),
    "afopt": ("_moment_inverse", "_moment_factor", "left"),
    ("afopt", "solve_triangular"): ("_moment_factor",),
    "nkfac": ("_inverse",),
    "nkfac-reference": ("_inverse",),
}


class Failing:
    """A function of ``torch.linalg`` that raises at its first ``times`` calls."""

    def __init__(self, monkeypatch, solver, error, times=math.inf):
        self.plain, self.error, self.times = getattr(torch.linalg, solver), error, times
        self.calls = 0
        monkeypatch.setattr(torch.linalg, solver, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error()
        return self.plain(*args, **kwargs)


@each_needed
def test_a_solver_that_fails_once_is_asked_again(name, solver, monkeypatch):
    """A batch that failed is refreshed matrix by matrix: nothing is lost but time."""
    model, optimizer = make_both(name)
    twin, undisturbed = make_both(name)
    with monkeypatch.context() as patch:
        failing = Failing(patch, solver, ERRORS["solver"], times=1)
        train("bert", model, optimizer, 3)
    train("bert", twin, undisturbed, 3)
    assert failing.calls > 1
    assert optimizer.diagnostics().get("refresh_solver", 0) == 0
    for key, value in weights(model).items():
        # Batched or not, they differ by rounding, which Adam's first steps enlarge.
        torch.testing.assert_close(value, weights(twin)[key], rtol=1e-3, atol=1e-4)
    optimizer.close()
    undisturbed.close()


@each_needed
@pytest.mark.parametrize("kind", ERRORS)
def test_a_solver_that_always_fails_leaves_the_last_preconditioner(name, solver, kind, monkeypatch):
    model, optimizer = make_both(name, **{"basis_tolerance": 0.0} if name == "adamr" else {})
    train("bert", model, optimizer, 6)
    before = preconditioner(optimizer)
    failing = Failing(monkeypatch, solver, ERRORS[kind])
    train("bert", model, optimizer, 2, start=6)  # two intervals at most: below the limit
    after = preconditioner(optimizer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    counts = optimizer.diagnostics()
    # NKFAC's ladder ends in keeping the inverse: its refresh has not failed.
    assert failing.calls > 0 and counts.get(f"refresh_{kind}", 0) + counts.get("inverse_kept", 0)
    kept = [key for key in before if key.endswith(KEPT.get((name, solver), KEPT[name]))]
    assert len(kept) > 2
    for key in kept:
        assert torch.equal(before[key], after[key]), key
    advice = "max_dim" if kind == "out_of_memory" else "damping"
    with pytest.raises(RuntimeError, match=rf"3 times in a row.*{advice}"):
        train("bert", model, optimizer, 12, start=8)
    optimizer.close()


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("kind", ERRORS)
def test_without_the_solvers_that_are_not_needed_training_goes_on(name, kind, monkeypatch):
    model, optimizer = make_both(name)
    for solver in set(SOLVERS) - set(NEEDED[name]):
        Failing(monkeypatch, solver, ERRORS[kind])
    train("bert", model, optimizer, 5)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (optimizer.diagnostics().get("basis_kept", 0) > 0) == (name == "adamr")
    optimizer.close()


@each_needed
def test_an_error_of_another_kind_is_raised(name, solver, monkeypatch):
    model, optimizer = make_both(name)
    train("bert", model, optimizer, 2)
    Failing(monkeypatch, solver, lambda: RuntimeError("expected scalar type Half"))
    with pytest.raises(RuntimeError, match="scalar type"):
        train("bert", model, optimizer, 3, start=2)
    optimizer.close()


@pytest.mark.parametrize("transport", ["permute", "overlap"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_memory_that_runs_out_during_a_refresh_changes_nothing(transport, side, monkeypatch):
    """Factor, basis and both moments change together or not at all, wherever it happens."""
    model, optimizer = make_both("adamr", transport=transport)
    train("bert", model, optimizer, 4)
    bases = optimizer.rotated.bases
    view = optimizer._view(optimizer.bound[3])
    chosen = Batch([view], optimizer.rotated.tiling(view))
    plain, outcomes = rotation_refresh.eigenbasis.rotate, []
    for number in range(5):
        calls, attempts = itertools.count(), itertools.count()

        def rotate(*args, calls=calls, attempts=attempts, number=number):
            if next(calls) >= number and next(attempts) < 2:
                raise ERRORS["out_of_memory"]()
            return plain(*args)

        monkeypatch.setattr(rotation_refresh.eigenbasis, "rotate", rotate)
        before, count = everything(optimizer), optimizer.counters["basis_refreshes"]
        bases.refresh([rotation_refresh.RefreshItem(chosen, 0, 0, (), (side,))])
        outcomes.append(optimizer.counters["basis_refreshes"] > count)
        if not outcomes[-1]:
            equal(before, everything(optimizer))
            bases.failures = FailureRecord()
    # The basis, the momentum and, by overlap, the second moment.
    products = 2 if transport == "permute" else 3
    assert outcomes == [False] * products + [True] * (5 - products)
    assert optimizer.counters["refresh_out_of_memory"] == products
    optimizer.close()


def test_a_copy_starts_counting_anew_and_names_are_judged_apart():
    failures = FailureRecord()
    for _ in range(2):
        failures.note("factor", "a", True)
        failures.note("factor", "b", True)
        failures.watch("factor", ["c", "d"], torch.tensor([1, 0]))
        failures.check()
    copied = copy.deepcopy(failures)
    copied.note("factor", "a", True)
    failures.note("factor", "b", False)
    failures.note("factor", "b", True)
    with pytest.raises(RuntimeError, match=r"^a: .*3 times in a row"):
        failures.note("factor", "a", True)
    failures.watch("factor", ["d", "c"], torch.tensor([True, False]))
    failures.watch("factor", ["c"], torch.tensor([True]))
    failures.check()
    failures.watch("factor", ["d"], torch.ones(1))
    with pytest.raises(RuntimeError, match=r"^d: "):  # a CPU's numbers are judged at once
        failures.watch("factor", ["d"], torch.ones(1))


def test_a_module_without_tokens_is_no_failure():
    """A mask that leaves nothing of a layer's input drops nothing, however often."""
    model, optimizer = make_both("afopt")
    empty = batch("bert")
    empty["attention_mask"] = torch.zeros_like(empty["attention_mask"])
    for _ in range(MAX_DROPPED + 2):
        train_step(model, optimizer, empty)
    assert optimizer.diagnostics()["statistics_dropped"] == 0
    optimizer.close()
