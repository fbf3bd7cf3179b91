"""Layers of one shape stepped together, with an accelerator's rounding; launches and memory."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from hf_precond.compat import devices
from hf_precond.linalg.matrix_functions import pack, unpack
from hf_precond.optimizers.base import optimizer as base
from hf_precond.optimizers.nkfac import factors
from hf_precond.registry import create_optimizer
from hf_precond.statistics.requests import Statistic, StatisticsSource
from tests.fake_cuda import on_gpu, pretended, step, with_source
from tests.rounding import accelerator

F64 = torch.float64
OUT, IN = 33, 46  # with the bias 47: neither is a multiple of 8


class Given(StatisticsSource):
    """Statistics that were made beforehand."""

    def __init__(self, sums):
        self.sums = sums

    def take(self):
        return {key: Statistic(s.clone(), torch.tensor(1.0)) for key, s in self.sums.items()}


def moment(size, condition, seed):
    """A symmetric positive definite matrix and its eigenvectors, in float64."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))
    values = torch.logspace(0, -math.log10(condition), size, dtype=F64)
    return (basis * values) @ basis.T, basis


def case(condition, aligned=False, layers=3, **fields):
    """An optimizer after a refresh, the gradients of its layers, and their exact directions."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(IN, OUT) for _ in range(layers)))
    optimizer = create_optimizer(model, "nkfac", lr=0.0, **fields)
    optimizer.close()
    sums, exact = {}, {}
    for number, bound in enumerate(optimizer.bound):
        name = bound.matrix.name
        left, out_basis = moment(OUT, condition, 2 * number)
        right, in_basis = moment(IN + 1, condition, 2 * number + 1)
        sums |= {f"{name}.output": left.float(), f"{name}.input": right.float()}
        gradient = torch.randn(OUT, IN + 1, dtype=F64)
        if aligned:  # as gradients are, mostly along the largest eigenvectors
            powers = torch.logspace(0, -4, OUT, dtype=F64)
            gradient = (out_basis * powers) @ gradient[:, :OUT] @ in_basis[:, :OUT].T
        bound.weight.grad = gradient[:, :-1].float()
        bound.matrix.bias_parameter.grad = gradient[:, -1].float()
        left, right = (
            torch.linalg.inv(factors.damp(m / m.norm(), optimizer.config.damping))
            for m in (left, right)
        )
        direction = left @ gradient @ right
        exact[bound] = direction * gradient.norm() / direction.norm()
    optimizer.statistics = Given(sums)
    optimizer.step()
    return optimizer, exact


def directions(optimizer):
    """What the gradients become, in float64."""
    found = {}
    for item in optimizer.precondition(optimizer.bound):
        parts = item.bound.matrix.split(item.matrix) if item.parts is None else item.parts
        found[item.bound] = torch.cat([parts[0], parts[1][:, None]], 1).to(F64)
    return found


def error(found, exact):
    """One less the least cosine between directions."""
    cosines = [(found[b] * exact[b]).sum() / found[b].norm() / exact[b].norm() for b in exact]
    return 1 - float(min(cosines))


# float16 and TF32 round at 2^-11, bfloat16 at 2^-8; the inverses' condition is 101 at the default
# damping, so that noise in a gradient along the largest eigenvectors may grow so much.
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    ("fields", "random", "aligned"),
    [
        ({}, 3e-5, 2e-4),
        ({"precision": "tf32"}, 3e-5, 2e-4),
        ({"precision": "bf16"}, 5e-5, 1e-2),
        ({"precision": "highest"}, 3e-5, 5e-5),  # its inverses are float16
        ({"precision": "highest", "state_dtype": "float32"}, 1e-10, 1e-9),
    ],
    ids=str,
)
def test_directions_are_those_of_float64(condition, fields, random, aligned):
    with accelerator():
        optimizer, exact = case(condition, **fields)
        assert error(directions(optimizer), exact) < random
        optimizer, exact = case(condition, aligned=True, **fields)
        assert error(directions(optimizer), exact) < aligned


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_a_cpu_loses_what_float16_does_not_hold(condition):
    for aligned in (False, True):
        optimizer, exact = case(condition, aligned=aligned)
        assert error(directions(optimizer), exact) < 3e-5
        optimizer, exact = case(condition, aligned=aligned, state_dtype="float32")
        assert error(directions(optimizer), exact) < 1e-9


def test_products_are_in_float16_and_keep_the_gradients_norm():
    with accelerator() as rounding:
        optimizer, exact = case(1e3)
        rounding.operations.clear()
        found = directions(optimizer)
    assert set(rounding.operations) == {"float16"}
    for bound, direction in found.items():
        assert float(direction.norm()) == pytest.approx(float(exact[bound].norm()), rel=1e-3)


@pytest.mark.parametrize("size", [1e-20, 1e-9, 1e9, 1e15])
def test_gradients_of_any_size_stay_within_float16(size):
    with accelerator():
        optimizer, exact = case(1e4)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad *= size
        found = directions(optimizer)
    assert error(found, exact) < 3e-5
    for bound, direction in found.items():
        norm = float(exact[bound].norm()) * size
        assert float(direction.norm()) == pytest.approx(norm, rel=1e-3, abs=0)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_stays_zero_and_what_is_not_finite_is_seen(value):
    with accelerator():
        optimizer, _ = case(1e2)
        for bound in optimizer.bound:
            bound.weight.grad.zero_()[1, 2] = value
            bound.matrix.bias_parameter.grad.zero_()
        for direction in directions(optimizer).values():
            assert (direction == 0).all() if value == 0 else direction.isnan().any()


def test_without_a_bias_and_with_one_that_rests():
    with accelerator():
        optimizer, _ = case(1e2, state_dtype="float32", precision="highest")
        for bound in optimizer.bound:
            bound.matrix.bias_parameter.grad = None
        items = list(optimizer.precondition(optimizer.bound))
    for item in items:
        block = optimizer.preconditioner(item.bound)
        expected = block.output @ item.bound.gradient() @ block.input
        ours = item.parts[0]
        expected = expected[:, :-1] * ours.norm() / expected[:, :-1].norm()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert (item.parts[1].abs() < 1e-4).all()


def test_inverses_of_one_shape_are_views_of_one_stack_also_when_resumed():
    with accelerator():
        optimizer, _ = case(1e3)
        expected = directions(optimizer)

        def storages():
            held = [optimizer.state[bound.weight]["input_inverse"] for bound in optimizer.bound]
            return {inverse.untyped_storage().data_ptr() for inverse in held}

        (before,) = storages()
        directions(optimizer)
        assert storages() == {before}
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        found = directions(optimizer)
        assert len(storages()) == 1
        for bound, direction in expected.items():
            assert torch.equal(found[bound], direction)


def test_whole_float32_states_of_0_1_are_packed_and_converted():
    optimizer, exact = case(1e3)
    saved = copy.deepcopy(optimizer.state_dict())
    for number, bound in enumerate(optimizer.bound):  # the weights come first
        state = saved["state"][number]
        for factor in optimizer.factors(bound):
            whole = factor.whole()
            state[f"{factor.side}_factor"] = whole
            state[f"{factor.side}_inverse"] = torch.linalg.inv(factors.damp(whole, 0.01))
    optimizer.load_state_dict(saved)
    for bound in optimizer.bound:
        optimizer.allocate(bound)
        for factor in optimizer.factors(bound):
            assert factor["factor"].dim() == 1
            assert {factor[name].dtype for name in ("factor", "inverse")} == {torch.float16}
            assert torch.linalg.matrix_norm(factor["inverse"].double(), 2) < 1.2
    assert error(directions(optimizer), exact) < 3e-5


def test_the_average_in_float16_follows_that_in_float64():
    generator = torch.Generator().manual_seed(0)
    size, basis = 64, torch.randn(64, 64, dtype=F64, generator=generator)
    exact = torch.zeros(size, size, dtype=F64)
    packed, updates = torch.zeros(size * (size + 1) // 2).half(), torch.tensor(0)
    scales = torch.logspace(0, -3, size, dtype=F64)
    for number in range(200):
        rows = torch.randn(256, size, dtype=F64, generator=generator) * scales @ basis
        total = rows.T @ rows
        keep = min(0.95, 1 - 1 / (number + 1))
        exact = keep * exact + (1 - keep) * total / total.norm()
        factors.average_unit_moments([packed], [updates], [total.float()], 0.95)
    largest = torch.linalg.eigvalsh(exact).amax()
    lost = torch.linalg.matrix_norm(unpack(packed.double()) - exact, 2)
    assert lost < 0.2 * 0.01 * largest  # a fifth of the damping
    found, wanted = (
        torch.linalg.inv(factors.damp(a, 0.01)) for a in (unpack(packed.double()), exact)
    )
    vector = exact[:, :1]
    assert torch.cosine_similarity(found @ vector, wanted @ vector, 0) > 1 - 1e-3
    torch.testing.assert_close(pack(unpack(packed)), packed)


# Counted -----------------------------------------------------------------------------


def bert(layers, **sizes):
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    ("layers", "fields"),
    [
        (1, {}),
        pytest.param(12, {}, marks=pytest.mark.slow),
        pytest.param(12, {"precision": "highest"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_launches_of_a_plain_step_of_bert_base(layers, fields, monkeypatch):
    with pretended(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(devices, "has_tf32", lambda device: True)
        optimizer = with_source(create_optimizer(on_gpu(bert(layers)), "nkfac", **fields))
        monkeypatch.setattr(optimizer, "refresh", lambda: None)
        step(optimizer)
        for factor in optimizer.all_factors():
            factor["refreshes"] = 1
        step(optimizer)  # makes the stacks
        seen = step(optimizer)
    assert seen.total <= 110 and seen.waits == []


def test_adamw_takes_what_is_ready_and_the_numbers_are_the_same(monkeypatch):
    trained = []
    for entries in (10**9, 40):
        monkeypatch.setattr(base, "STEP_ENTRIES", entries)
        optimizer, _ = case(1e2)
        calls, update = [], optimizer.fallback.update
        monkeypatch.setattr(
            optimizer.fallback, "update", lambda v, u=update, c=calls: (c.append(len(v)), u(v))
        )
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(3):
            optimizer.step()
        assert calls == ([6] * 3 if entries > 40 else [2] * 9)
        trained.append([p.clone() for group in optimizer.param_groups for p in group["params"]])
    assert all(map(torch.equal, *trained))


def ratio(model, **fields):
    """Bytes of the state over AdamW's."""
    optimizer = create_optimizer(model, "nkfac", **fields)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in held:
        parameter.grad = torch.empty_like(parameter)
    for bound in optimizer.bound:
        optimizer.allocate(bound)
    optimizer.allocate_fallback()
    values = [v for state in optimizer.state.values() for v in state.values()]
    kept = sum(v.nbytes for v in values if isinstance(v, torch.Tensor))
    optimizer.close()
    return kept / sum(8 * p.numel() for p in held)


MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}


@pytest.mark.parametrize(
    ("layers", "sizes", "most"),
    [
        (6, MINILM, 1.7),
        (12, MINILM, 1.9),
        (6, MINILM | {"vocab_size": 100, "max_position_embeddings": 64}, 2.35),
        (12, {}, 2.1),
    ],
    ids=["MiniLM-L6", "MiniLM-L12", "MiniLM without its vocabulary", "BERT-base"],
)
def test_the_state_is_at_most_twice_and_a_half_adamws(layers, sizes, most):
    with torch.device("meta"):
        model = bert(layers, **sizes)
    assert ratio(model) < most
    assert ratio(model, state_dtype="float32") > ratio(model) + 0.3


class Peak(TorchDispatchMode):
    """The largest storage that operations make."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_wide_inverses_are_converted_piece_by_piece_on_a_cpu():
    size = 1024
    inverse = torch.randn(size, size)
    inverse = (inverse + inverse.mT).half()
    left, right = torch.randn(size, 8), torch.randn(8, size)
    with Peak() as peak:
        found = factors.KroneckerBlock(inverse, None).apply(left)
        other = factors.KroneckerBlock(None, inverse).apply(right)
    assert peak.largest <= factors.PIECE
    torch.testing.assert_close(found, inverse.float() @ left, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(other, right @ inverse.float().mT, rtol=1e-4, atol=1e-3)
