"""Captured moments against sums written out from what really passes the layers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.modules import find_matrices
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import MomentRequest, Statistic
from tests.architectures.families import FAMILIES, build, loss_of, text
from tests.statistics.support import (
    Recorder,
    assert_same,
    close_all,
    explicit,
    linears,
    masked,
    opened,
    requests_for,
)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "deberta-v2", "mpnet", "albert"])
def test_moments_equal_sums_over_the_real_tokens(name: str) -> None:
    model, batch = build(name).eval(), FAMILIES[name].batch()
    for module in model.modules():  # no dropout, yet training
        module.training = True
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    matrices = linears(model)
    collector = opened(model, requests_for(matrices))
    recorder = Recorder([m.module for m in matrices])
    loss_of(model, batch).backward()
    recorder.remove()
    taken = collector.take()
    collector.close()
    for matrix in matrices:
        calls = recorder.calls[matrix.module]
        first, second, count = explicit(calls, matrix, masked(batch))
        found = taken[f"{matrix.name}/input"]
        torch.testing.assert_close(found.sum, first)
        torch.testing.assert_close(found.count, count)
        assert found.sum.dtype == torch.float64
        found = taken[f"{matrix.name}/output_grad"]
        torch.testing.assert_close(found.sum, second)
        torch.testing.assert_close(found.count, count)
        # The rows that were recorded are those whose products make the weight's gradient.
        product = sum(g.flatten(0, -2).T @ x.flatten(0, -2) for x, g in calls)
        weight = matrix.weight_view(matrix.weight_parameter.grad)
        if matrix.name != "transformer.wte":
            torch.testing.assert_close(product, weight)


def test_padding_changes_nothing() -> None:
    model = build("bert").train()
    batch = text()
    batch = {key: value[1:2] for key, value in batch.items()}
    short = {"input_ids": batch["input_ids"][:, :4], "labels": batch["labels"]}
    block = find_attention(model)[0]
    matrices = [block.q, block.o, *[m for m in linears(model) if "intermediate" in m.name]]
    taken = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for given in (batch, short):
        collector = opened(model, requests_for(matrices))
        loss_of(model, given).backward()
        taken.append(collector.take())
        collector.close()
    assert taken[0].keys() == taken[1].keys()
    for key, statistic in taken[0].items():
        torch.testing.assert_close(statistic.sum, taken[1][key].sum)
        torch.testing.assert_close(statistic.count, taken[1][key].count)


def test_parts_of_a_fused_weight_share_its_input_and_split_its_gradient() -> None:
    model = build("gpt2")
    block = find_attention(model)[0]
    whole = next(m for m in linears(model) if m.module is block.q.module)
    parts = [block.q, block.k, block.v]
    collector = opened(model, requests_for([whole, *parts]))
    loss_of(model, FAMILIES["gpt2"].batch()).backward()
    taken = collector.take()
    collector.close()
    entire = taken[f"{whole.name}/output_grad"].sum
    for index, part in enumerate(parts):
        torch.testing.assert_close(
            taken[f"{part.name}/input"].sum, taken[f"{whole.name}/input"].sum
        )
        rows = slice(16 * index, 16 * (index + 1))
        torch.testing.assert_close(taken[f"{part.name}/output_grad"].sum, entire[rows, rows])


def test_one_collection_serves_requests_with_and_without_a_bias() -> None:
    layer = nn.Linear(3, 2).double()
    with_bias, without = LayerMatrix("w", layer, bias="bias"), LayerMatrix("w", layer)
    requests = [MomentRequest("a", "input", without), MomentRequest("b", "input", with_bias)]
    collector = opened(layer, requests)
    x = torch.randn(5, 3, dtype=torch.float64)
    layer(x).sum().backward()
    taken = collector.take()
    rows = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(taken["b"].sum, rows.T @ rows)
    torch.testing.assert_close(taken["a"].sum, x.T @ x)
    assert len(collector.layers) == 1 and _hooks(layer) == 2  # the layer's and that of the root


def _statistics(name: str, prepare: Callable[[nn.Module], None]) -> dict[str, Statistic]:
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    prepare(model)
    collector = opened(model, requests_for(linears(model)))
    loss_of(model, FAMILIES[name].batch()).backward()
    taken = collector.take()
    collector.close()
    return taken


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_checkpointed_passes_count_once(name: str, reentrant: bool) -> None:
    def enable(model: nn.Module) -> None:
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if reentrant:
            model.enable_input_require_grads()

    assert_same(_statistics(name, enable), _statistics(name, lambda model: None))


class Repeated(nn.Module):
    """One layer called twice, each call checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if self.reentrant is None:
                x = self.layer(x).tanh()
            else:
                x = checkpoint(lambda y: self.layer(y).tanh(), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_calls_of_a_shared_module_count_once_each(reentrant: bool) -> None:
    taken = []
    for mode in (reentrant, None):
        torch.manual_seed(0)
        model = Repeated(mode).double()
        collector = opened(model, requests_for(find_matrices(model)))
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        model(x).pow(2).sum().backward()
        taken.append(collector.take())
    assert_same(*taken)
    assert taken[0]["layer/input"].count == 8


def test_a_module_called_several_times_brings_the_sum_of_its_calls() -> None:
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    collector = opened(model, requests_for([LayerMatrix("w", layer, bias="bias")]))
    x = torch.randn(4, 3, dtype=torch.float64)
    recorder = Recorder([layer])
    model(x).pow(2).sum().backward()
    taken = collector.take()
    first, second, count = explicit(
        recorder.calls[layer],
        LayerMatrix("w", layer, bias="bias"),
        lambda inputs: torch.ones(4, dtype=torch.float64),
    )
    torch.testing.assert_close(taken["w/input"].sum, first)
    torch.testing.assert_close(taken["w/output_grad"].sum, second)
    assert taken["w/input"].count == count == 8


def test_micro_batches_add_up() -> None:
    model = build("bert").eval()
    for module in model.modules():
        module.training = not isinstance(module, nn.Dropout)
    batch = text()
    matrices = linears(model)[:3]
    collector = opened(model, requests_for(matrices))
    loss_of(model, batch).backward()
    whole = collector.take()
    for row in range(3):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        (loss_of(model, part) / 3).backward()
    parts = collector.take()
    collector.close()
    for key, statistic in whole.items():
        torch.testing.assert_close(parts[key].sum, statistic.sum)
        torch.testing.assert_close(parts[key].count, statistic.count)


def test_only_trained_passes_of_due_steps_count() -> None:
    model = build("bert")
    matrices = linears(model)[:2]
    collector = MomentCollector(model, requests_for(matrices))
    batch = text()
    loss_of(model, batch).backward()
    assert collector.take() == {}, "not enabled"
    collector.enable(True, 0)
    with torch.no_grad():
        loss_of(model, batch)
    loss_of(model, batch)
    assert collector.take() == {}, "no backward"
    model.eval()
    loss_of(model, batch).backward()
    with pytest.warns(UserWarning, match=r"evaluation mode .* call model\.train\(\)"):
        assert collector.take() == {}, "eval"
    model.train()
    loss_of(model, batch).backward()
    collector.drop()
    assert collector.take() == {}, "dropped"
    loss_of(model, batch).backward()
    collector.enable(True, 1)
    assert collector.take() == {}, "another step's"
    loss = loss_of(model, batch)
    collector.drop()
    loss.backward(retain_graph=True)
    once = collector.take()
    loss.backward()
    assert len(once) == 4, "a drop between forward and backward takes nothing away"
    assert collector.take() == {}, "a second backward through one pass"
    collector.enable(False, 2)
    loss_of(model, batch).backward()
    assert collector.take() == {}, "not due"


def _hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_close_removes_every_hook() -> None:
    model = build("llama")
    before = _hooks(model)
    block = find_attention(model)[0]
    rotated = MomentRequest("k", "key", block.k, block, average_rotation=True)
    collector = opened(model, [*requests_for(linears(model)), rotated])
    assert _hooks(model) > before
    collector.close()
    assert _hooks(model) == before
    collector.close()
    loss_of(model, FAMILIES["llama"].batch()).backward()
    assert collector.take() == {}


def test_a_collector_without_references_leaves_the_model_and_the_compiler() -> None:
    model = build("llama")
    before = _hooks(model)
    block = find_attention(model)[0]
    rotated = MomentRequest("k", "key", block.k, block, average_rotation=True)
    collector = MomentCollector(model, [*requests_for(linears(model)), rotated])
    collector.enable(True, 0)
    loss_of(model, FAMILIES["llama"].batch()).backward()
    switch = collector.switch
    assert switch.held
    gc.disable()
    try:
        del collector
        assert _hooks(model) == before
        assert not switch.held
    finally:
        gc.enable()


def test_copies_and_pickles_of_the_model_do_not_feed_the_collector() -> None:
    model = build("bert")
    collector = opened(model, requests_for(linears(model)))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in others:
        loss_of(other, text()).backward()
        assert collector.take() == {}
    loss_of(model, text()).backward()
    assert len(collector.take()) == len(requests_for(linears(model)))


def test_the_loss_scale_does_not_enter() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    collector = opened(layer, requests_for(find_matrices(layer)))
    layer(x).pow(2).sum().backward()
    plain = collector.take()
    collector.loss_scale = torch.tensor(1024.0)
    (layer(x).pow(2).sum() * 1024).backward()
    assert_same(collector.take(), plain)


def test_autocast_and_half_precision_sum_in_float32() -> None:
    model = build("bert", torch.float32)
    matrices = linears(model)[:4]
    collector = opened(model, requests_for(matrices))
    recorder = Recorder([m.module for m in matrices])
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, text())
    loss.backward()
    taken = collector.take()
    for matrix in matrices:
        first, second, _ = explicit(
            [(x.double(), g.double()) for x, g in recorder.calls[matrix.module]],
            matrix,
            masked(text()),
        )
        found = taken[f"{matrix.name}/input"].sum
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), first, rtol=1e-5, atol=1e-5)
        grads = taken[f"{matrix.name}/output_grad"].sum
        torch.testing.assert_close(grads.double(), second, rtol=1e-5, atol=1e-7)
    half = build("bert", torch.bfloat16)
    collector = opened(half, requests_for(linears(half)[:1]))
    loss_of(half, text()).backward()
    assert {s.sum.dtype for s in collector.take().values()} == {torch.float32}


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique")
        self.count += any(name in str(func) for name in waits)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_nothing_is_read_from_the_device(name: str) -> None:
    model, batch = build(name), FAMILIES[name].batch()
    block = find_attention(model)[0]
    heads = [
        MomentRequest(kind, kind, block.q, block, average_rotation=block.rotary)
        for kind in ("query", "key")
        if block.observed
    ]
    collector = opened(model, [*requests_for(linears(model)), *heads])
    loss_of(model, batch).backward()
    collector.take()
    counts = []
    for due in (True, False):
        collector.enable(due, int(due))
        with Reads() as reads:
            loss_of(model, batch).backward()
            taken = collector.take()
        counts.append(reads.count)
        assert bool(taken) == due
    collector.close()
    assert counts[0] == counts[1]


def test_compiled_models_keep_one_graph_and_run_uncompiled_on_due_steps() -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    collector = MomentCollector(model, requests_for(find_matrices(model)))
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(5, 3, dtype=torch.float64)
    for step in range(6):
        collector.enable(step % 3 == 0, step)
        compiled(x).pow(2).sum().backward()
        taken = collector.take()
        assert len(taken) == (4 if step % 3 == 0 else 0)
        if taken:
            torch.testing.assert_close(taken["0/input"].sum[:3, :3], x.T @ x)
    assert len(graphs) == 1
    collector.close()
