"""On a GPU that torch only pretends to have: no devices mixed, no wait between refreshes."""

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hf_precond.optimizers.base.refresh import FailureRecord
from hf_precond.registry import create_optimizer, list_optimizers
from tests.fake_cuda import GPU, Watch, on_gpu, pretended, step, with_source
from tests.optimizers.models import make
from tests.optimizers.test_shared import QUICK

# Statistics at every step where there are any; refreshes and probes in the first steps, one of
# the last without. AdamR's bases turn at steps 1, 2, 3 and 5 of the first interval.
RARELY = {
    "afopt": {"scope": "all_linear", "stat_interval": 1, "inverse_interval": 100},
    "adamr": {"basis_interval": 64},
    "muon": {},
    "nkfac": {"stat_interval": 1, "inverse_interval": 100},
    "sgdph": {"probe_interval": 100},
}
QUIET = {"afopt": 3, "adamr": 4, "muon": 1, "nkfac": 1, "sgdph": 1}
CASES = [(name, {}) for name in list_optimizers()]
CASES += [("afopt", {"scope": scope}) for scope in ("query_key", "attention")]
CASES += [("afopt", {"direction": "inverse"})]
CASES += [("afopt", {"scaling": scaling}) for scaling in ("rms", "cap", "norm_recovery")]
CASES += [("afopt", {"base": base}) for base in ("sgd", "adamr", "muon")]
CASES += [("afopt", {"base": "muon", "scope": "attention"})]
CASES += [("afopt", {"precision": precision}) for precision in ("tf32", "bf16")]
CASES += [
    ("afopt", {"attention_entropy": True}),
    ("afopt", {"max_dim": 10}),
    ("afopt", {"damping": 0.1}),
    ("afopt", {"state_dtype": "bfloat16"}),
    ("afopt", {"nesterov": False, "base": "sgd"}),
]
CASES += [("adamr", {"basis": basis}) for basis in ("two_sided", "one_sided", "identity")]
CASES += [("adamr", {"precision": precision}) for precision in ("tf32", "bf16")]
CASES += [
    ("adamr", {"basis_source": "feature"}),
    ("adamr", {"transport": "overlap", "floor": 0.0}),
    ("adamr", {"max_dim": 10}),
    ("adamr", {"state_dtype": "bfloat16"}),
]
CASES += [("muon", {"variant": "normuon"}), ("muon", {"adjust_lr_fn": "original"})]
CASES += [("nkfac", {"solver": solver}) for solver in ("newton", "exact")]
CASES += [("nkfac", {"base": base}) for base in ("sgd", "adamr")]
CASES += [("nkfac", {"precision": precision}) for precision in ("tf32", "bf16")]
CASES += [
    ("nkfac", {"max_dim": 20}),
    ("nkfac", {"damping": 1e-4}),
    ("nkfac", {"newton_steps": 2, "solver": "newton"}),
    ("nkfac", {"reference": True}),
    ("nkfac", {"reference": True, "base": "sgd"}),
    ("nkfac", {"state_dtype": "bfloat16"}),
]
CASES += [
    ("sgdph", {"base": "sgd"}),
    ("sgdph", {"include_bias": True}),
    ("sgdph", {"base": "sgd", "momentum": 0.0}),
    ("sgdph", {"base": "sgd", "probe": "ones", "reference": True}),
]


pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
DTYPES = [pytest.param(None, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
NAMES = list_optimizers()
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with pretended(monkeypatch):
        yield


def build(name, model_name="bert", dtype=None, table=RARELY, layers=1, **values):
    """An optimizer over a model that is on the GPU, with statistics from nowhere."""
    with unset_fake_temporarily():
        model = make(model_name)
    if model_name == "bert":  # one layer has every kind of matrix, and is tested sooner
        model.bert.encoder.layer = model.bert.encoder.layer[:layers]
    fields = {"lr": 1e-3, "weight_decay": 0.01} | table.get(name, {}) | values
    return with_source(create_optimizer(on_gpu(model, dtype), name, **fields))


def assert_placed(optimizer):
    """State on the GPU, but for AdamR's energies, which the host reads an interval later."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                on_host = key.endswith("_energy")
                assert value.device == (torch.device("cpu") if on_host else GPU), key


def assert_steps(name, values, dtype):
    """Steps with statistics, with refreshes and without: no device mixed, no wait at the last."""
    optimizer = build(name, dtype=dtype, **values)
    for _ in range(QUIET.get(name, 1)):
        step(optimizer)
    # A base rule of AdamR's turns its bases at steps 1, 2 and then once an interval.
    assert values.get("base") == "adamr" or step(optimizer).waits == []
    assert_placed(optimizer)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "adamr"])  # that is slow, see below
def test_steps(name):
    assert_steps(name, {}, None)


@slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
def test_steps_of_every_kind(name, values, dtype):
    assert_steps(name, values, dtype)


@slow
@pytest.mark.parametrize("model_name", ["gpt2", "llama", "vit"])
@pytest.mark.parametrize("name", NAMES)
def test_other_models(name, model_name):
    optimizer = build(name, model_name, table=QUICK)
    for _ in range(4):
        step(optimizer)
    assert_placed(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_the_allocating_step_of_a_checkpoint(name):
    optimizer = build(name)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    # Zeros are what a number read from the device turns out to be.
    assert optimizer.steps == 0 and step(optimizer, number=0).kernels
    assert optimizer.steps == 0
    assert_placed(optimizer)


def test_a_step_with_skip_nonfinite_waits_once_for_each_dtype():
    optimizer = build("sgdph", skip_nonfinite=True)
    step(optimizer)
    (wait,) = step(optimizer).waits
    assert "collectives.py" in wait


@pytest.mark.parametrize(
    ("name", "number", "places"),
    [
        ("nkfac", 0, {"optimizer.py", "factors.py"}),  # factors without data; Newton's start astray
        ("adamr", 1, {"factorization.py"}),  # the first eigenvectors, and whether they are finite
    ],
)
def test_where_a_refresh_waits(name, number, places):
    optimizer = build(name)
    for _ in range(number):
        assert step(optimizer).waits == []
    assert {wait.split(" at ")[1].split(":")[0] for wait in step(optimizer).waits} == places


@pytest.mark.parametrize(
    ("name", "values"), [("afopt", {"stat_interval": 50}), ("nkfac", {}), ("sgdph", {})], ids=str
)
def test_another_layer_costs_a_step_its_products_alone(name, values):
    kernels = []
    for layers in (2, 3):  # what only one layer has is not stacked
        optimizer = build(name, layers=layers, **values)
        step(optimizer)
        kernels.append(step(optimizer).kernels)  # NKFAC's with statistics
    assert set(kernels[1] - kernels[0]) <= {"mm", "stack"}


def test_another_layer_costs_a_probe_no_kernel():
    first, second = (step(build("sgdph", layers=layers)).kernels for layers in (1, 2))
    assert set(second - first) <= {"zeros", "zeros_like"}  # its state


def test_names_whose_failures_are_watched_share_their_kernels():
    failures = FailureRecord()
    for names in (["a", "b"], ["c"], ["d"]):
        failures.watch("factor", names, torch.empty(len(names), device=GPU))
    with Watch() as watch:
        failures.check()
    # The counts of new names, their change, and the stack that is sent to the host.
    assert watch.total <= 8 and watch.waits == []


def test_the_watch_sees_what_it_should():
    one, other = torch.empty(3, device=GPU), torch.empty(3)
    for work, waits in (
        (lambda: float(one.sum()), 1),
        (lambda: bool((one > 0).all()), 1),
        (lambda: one.nonzero(), 1),
        (lambda: one.cpu(), 1),
        (lambda: other.to(GPU), 1),
        (lambda: torch.tensor(1.0, device=GPU), 1),
        (lambda: torch.empty(3, pin_memory=True).copy_(one, non_blocking=True), 0),
        (lambda: torch.empty(3).copy_(one, non_blocking=True), 1),
        (lambda: torch.where(one > 0, one, 0.0), 0),
        (lambda: one[0].add_(1.0), 0),
    ):
        with Watch() as watch:
            work()
        assert len(watch.waits) == waits
    with Watch() as watch:
        one.view(1, 3).T.add_(1.0)
    assert watch.kernels == {"add_": 1}
    with pytest.raises(RuntimeError, match="same device"):
        one + other
