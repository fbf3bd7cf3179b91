"""Output gradients of several backward passes, and inside the transforms of ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hf_precond.statistics.requests import Statistic
from tests.statistics.support import assert_same, close_all, linears, opened, requests_for


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


class Branches(nn.Module):
    """A trunk with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(inputs).tanh()
        first: Tensor = self.first(hidden).square().mean()
        second: Tensor = (self.second(hidden) ** 4).sum()
        return first, second


def _branches(run: Callable[[nn.Module, Tensor, Tensor], None]) -> dict[str, Statistic]:
    """What is collected where ``run(model, first loss, second loss)`` goes backward."""
    torch.manual_seed(0)
    model = Branches().double()
    collector = opened(model, requests_for(linears(model)))
    run(model, *model(torch.randn(20, 5, dtype=torch.float64)))
    return collector.take()


def test_two_backward_passes_through_one_graph_are_that_of_the_sum() -> None:
    def together(model: nn.Module, first: Tensor, second: Tensor) -> None:
        (first + second).backward()

    def apart(model: nn.Module, first: Tensor, second: Tensor) -> None:
        first.backward(retain_graph=True)
        second.backward()

    def asked_before(model: nn.Module, first: Tensor, second: Tensor) -> None:
        weight = model.trunk.weight
        torch.autograd.grad(second, [weight], retain_graph=True)  # how large a task's gradient is
        torch.autograd.grad(second, [model.second.bias], retain_graph=True)
        together(model, first, second)

    def penalised(model: nn.Module, first: Tensor, second: Tensor) -> None:
        torch.autograd.grad(3 * second, [second], create_graph=True)
        apart(model, first, second)

    def handed_out(model: nn.Module, first: Tensor, second: Tensor) -> None:
        parameters = list(model.parameters())
        for loss, kept in ((first, True), (second, False)):
            torch.autograd.grad(loss, parameters, retain_graph=kept, allow_unused=True)

    wanted = _branches(together)
    for run in (apart, asked_before, penalised, handed_out):
        assert_same(_branches(run), wanted)


def test_gradients_of_single_samples_bring_what_their_batch_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    collector = opened(model, requests_for(linears(model)))
    inputs = torch.randn(7, 2, 4, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, values, (sample,))
        return output.square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    assert gradients["0.weight"].shape == (7, 5, 4)
    single = collector.take()
    model(inputs).square().sum().backward()
    batch = collector.take()
    for key, found in batch.items():
        torch.testing.assert_close(single[key].sum + 0, found.sum)
        assert single[key].count.item() == found.count.item() == 14
