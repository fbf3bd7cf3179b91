"""Layers called with one tensor share the computation of its moment, never the moment itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hf_precond.statistics import collector as collector_module
from hf_precond.statistics.requests import MomentRequest
from tests.architectures.families import FAMILIES, build, loss_of
from tests.statistics.support import close_all, linears, opened


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the matrices whose moment was computed."""
    names: list[str] = []
    original = collector_module.second_moment

    def counted(collection, *args):
        names.append(collection.matrix.name)
        return original(collection, *args)

    monkeypatch.setattr(collector_module, "second_moment", counted)
    return names


def requests(model: nn.Module) -> list[MomentRequest]:
    return [MomentRequest(m.name, "input", m) for m in linears(model)]


def test_q_k_v_and_gate_up_are_computed_once(computed: list[str]) -> None:
    model = build("llama")
    collector = opened(model, requests(model))
    loss_of(model, FAMILIES["llama"].batch()).backward()
    taken = collector.take()
    # q, o, gate and down of two layers, and the head.
    assert len(computed) == 9
    assert len(taken) == 15
    q, k, v = (taken[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert torch.equal(q.sum, k.sum) and torch.equal(q.sum, v.sum)
    assert q.sum is not k.sum and q.sum.data_ptr() != k.sum.data_ptr()
    assert q.count == k.count


@pytest.mark.parametrize("passes", [1, 2])
def test_micro_batches_of_one_tensor_add_up(passes: int, computed: list[str]) -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]))
    first, second = model[0]
    model.forward = lambda x: first(x) + second(x)
    collector = opened(model, requests(model))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(passes):
        model(x).sum().backward()
    taken = collector.take()
    rows = torch.cat([x, torch.ones(5, 1)], 1)
    for statistic in taken.values():
        torch.testing.assert_close(statistic.sum, passes * rows.T @ rows)
        assert statistic.count == 5 * passes
    assert len(computed) == passes


@pytest.mark.parametrize("change", ["in place", "bias"])
def test_what_differs_is_computed_apart(change: str, computed: list[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3, bias=change != "bias")

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            if change == "in place":
                x.mul_(2)
            return first + self.second(x)

    model = Model()
    collector = opened(model, requests(model))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    model.first.weight.requires_grad_(change == "bias")  # its gradient needs the old tensor
    model(x).sum().backward()
    taken = collector.take()
    assert len(computed) == 2
    rows = torch.cat([before, torch.ones(5, 1)], 1)
    torch.testing.assert_close(taken["first"].sum, rows.T @ rows)
    seen = x if change == "bias" else torch.cat([x, torch.ones(5, 1)], 1)
    torch.testing.assert_close(taken["second"].sum, seen.T @ seen)
