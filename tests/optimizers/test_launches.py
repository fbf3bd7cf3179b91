"""How many kernels a step of BERT-base launches on a pretended GPU, and in which precision."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BertConfig, BertForSequenceClassification

from hf_precond.optimizers.afopt.optimizer import NORMS
from hf_precond.registry import create_optimizer
from tests.fake_cuda import Watch, on_gpu, pretended, step, with_source

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "mv": 0}


class Operations(Watch):
    """Floating-point operations of products, by the precision that they are computed in."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            a, b = args[PRODUCTS[name] :][:2]
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            kind = "tf32" if tf32 and a.dtype == torch.float32 else str(a.dtype)
            self.operations[kind] += 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.fixture
def build(monkeypatch):
    def made(name, layers=12, **fields):
        with unset_fake_temporarily(), torch.device("meta"):
            model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers))
        fields = {"weight_decay": 0.01} | fields
        return with_source(create_optimizer(on_gpu(model), name, **fields))

    with pretended(monkeypatch):
        yield made


def long_after(optimizer):
    """AFOpt's averages of the gradients' norms as they are after the first steps."""
    if optimizer.config.name == "afopt":
        optimizer._norms_seen.update(dict.fromkeys(optimizer.bound, NORMS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "limit"),
    [
        ("afopt", {}, 250),
        ("afopt", {"scope": "attention"}, 150),
        ("muon", {}, 120),
    ],
    ids=str,
)
def test_a_plain_step(name, fields, limit, build):
    optimizer = build(name, **fields)
    step(optimizer)
    long_after(optimizer)
    seen = step(optimizer)
    assert seen.waits == [] and seen.total <= limit, seen.kernels


@pytest.mark.slow
def test_afopt_with_statistics_and_refreshes(build):
    """Averaged over an interval of refreshes, all at its first step, long after the first steps."""
    optimizer = build("afopt")
    step(optimizer)
    optimizer._seen.update({moment.request.key: 10 for moment in optimizer.plan.moments})
    long_after(optimizer)
    for group in optimizer.param_groups:
        group["step"] = 4 * optimizer.config.inverse_interval
    steps = [step(optimizer) for _ in range(optimizer.config.stat_interval + 1)]
    due, plain, statistics = steps[0], steps[1], steps[-1]
    assert due.waits == plain.waits == statistics.waits == []
    refreshes = 1 / optimizer.config.inverse_interval
    rate = 1 / optimizer.config.stat_interval - refreshes
    rest = 1 - rate - refreshes
    assert refreshes * due.total + rate * statistics.total + rest * plain.total <= 350


@pytest.mark.parametrize("name", ["afopt", "muon"])
def test_another_layer_costs_a_plain_step_no_kernel(name, build):
    kernels = []
    for layers in (2, 3):
        optimizer = build(name, layers)
        step(optimizer)
        kernels.append(step(optimizer).kernels)
    assert kernels[0] == kernels[1]


def test_afopts_products_are_in_low_precision(build):
    optimizer = build("afopt", 2)
    step(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    with Operations() as seen:
        optimizer.step()
    low = sum(seen.operations[kind] for kind in ("tf32", "torch.float16"))
    assert low >= 0.95 * sum(seen.operations.values())
