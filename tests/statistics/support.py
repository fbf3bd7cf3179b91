"""What tests of collectors share: requests, explicit sums, and collectors that get closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.modules import find_matrices, is_linear
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import MomentRequest, Statistic

OPEN: list[MomentCollector] = []


def close_all() -> None:
    """Close every collector that a test opened."""
    while OPEN:
        OPEN.pop().close()


def requests_for(matrices: Sequence[LayerMatrix]) -> list[MomentRequest]:
    kinds = ("input", "output_grad")
    return [MomentRequest(f"{m.name}/{kind}", kind, m) for m in matrices for kind in kinds]


def linears(model: nn.Module) -> list[LayerMatrix]:
    return [m for m in find_matrices(model) if is_linear(m.module)]


def opened(model: nn.Module, requests: Sequence[MomentRequest]) -> MomentCollector:
    OPEN.append(MomentCollector(model, requests))
    OPEN[-1].enable(True, 0)
    return OPEN[-1]


class Recorder:
    """Inputs and output gradients of layers, kept whole, one entry a call."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.handles = [m.register_forward_hook(self._hook) for m in set(modules)]

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inputs = args[0].detach()
        if output.requires_grad:
            calls = self.calls.setdefault(module, [])
            output.register_hook(lambda grad: calls.append((inputs, grad)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def explicit(
    calls: Sequence[tuple[Tensor, Tensor]], matrix: LayerMatrix, weights: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Input moment, output-gradient moment and count, row by row."""
    columns, outs = matrix.columns, matrix.shape[0]
    first = torch.zeros(columns, columns, dtype=torch.float64)
    second = torch.zeros(outs, outs, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    for inputs, gradient in calls:
        kept = weights(inputs).reshape(-1)
        for row, delta, weight in zip(
            inputs.flatten(0, -2), gradient.flatten(0, -2), kept, strict=True
        ):
            if matrix.bias is not None:
                row = torch.cat([row, torch.ones(1, dtype=row.dtype)])
            first += weight * torch.outer(row, row)
            second += torch.outer(delta, delta)
            count += weight
    return first, second, count


def masked(batch: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def weights(inputs: Tensor) -> Tensor:
        if inputs.dim() == 3 and inputs.shape[:2] == batch["attention_mask"].shape:
            return batch["attention_mask"].double()
        return torch.ones(inputs.shape[:-1], dtype=torch.float64)

    return weights


def assert_same(first: dict[str, Statistic], second: dict[str, Statistic]) -> None:
    assert first.keys() == second.keys() and first
    for key in first:
        torch.testing.assert_close(first[key].sum, second[key].sum)
        torch.testing.assert_close(first[key].count, second[key].count)
