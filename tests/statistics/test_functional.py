"""Layers whose weights are given to functions of torch, against sums over what goes in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hf_precond.architectures.modules import find_matrices
from hf_precond.compat.torch_internals import source_of
from hf_precond.statistics.requests import Statistic
from tests.statistics.support import assert_same, close_all, opened, requests_for

F64 = torch.float64


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


class Functional(nn.Module):
    """A layer that is used as ``use`` says."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.use = layer, use

    def forward(self, inputs: Tensor) -> Tensor:
        return self.use(self.layer, inputs)


def statistics(
    use: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor, **options: int
) -> dict[str, Statistic]:
    torch.manual_seed(0)
    layer: nn.Module = nn.Conv1d(4, 4, **options) if options else nn.Linear(4, 4)
    model = Functional(use, layer.double())
    collector = opened(model, requests_for(find_matrices(model)))
    model(inputs).pow(3).sum().backward()
    return collector.take()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=F64)


def _without_gradients(layer: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        layer(7 * inputs)
    return 0.0


USES = {
    "linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "by name": lambda layer, x: F.linear(bias=layer.bias, input=x, weight=layer.weight),
    "product": lambda layer, x: x @ layer.weight.T + layer.bias,
    "matmul": lambda layer, x: torch.matmul(x, layer.weight.transpose(0, 1)) + layer.bias,
    "from the left": lambda layer, x: (layer.weight @ x.mT).mT + layer.bias,
    "product by name": lambda layer, x: torch.matmul(input=x, other=layer.weight.T) + layer.bias,
    "added product": lambda layer, x: torch.addmm(layer.bias, x.flatten(0, 1), layer.weight.T).view(
        x.shape
    ),
    "vectors": lambda layer, x: (
        torch.stack(
            [
                torch.mv(layer.weight, v) if n % 2 else layer.weight @ v
                for n, v in enumerate(x.view(-1, 4))
            ]
        )
        + layer.bias
    ),
    "after a call without gradients": lambda layer, x: (
        _without_gradients(layer, x) + F.linear(x, layer.weight, layer.bias)
    ),
    "cast": lambda layer, x: F.linear(x, layer.weight.float().double(), layer.bias),
    "twice transposed": lambda layer, x: F.linear(x, layer.weight.t().mT, layer.bias),
    "checkpoint": lambda layer, x: checkpoint(
        lambda y: F.linear(y, layer.weight, layer.bias), x, use_reentrant=False
    ),
    "reentrant": lambda layer, x: checkpoint(
        lambda y: F.linear(y, layer.weight, layer.bias), x.requires_grad_(), use_reentrant=True
    ),
}


@pytest.mark.parametrize("use", USES)
def test_a_linear_layers_weight(use: str) -> None:
    called = statistics(lambda layer, x: layer(x), rows(3, 5, 4))
    given = statistics(USES[use], rows(3, 5, 4))
    for key, found in called.items():
        # A cast to float32 loses digits.
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if use == "cast" else {}
        torch.testing.assert_close(given[key].sum, found.sum, **tolerance)
        assert given[key].count == found.count == 15
    flat = torch.cat([rows(15, 4), torch.ones(15, 1, dtype=F64)], 1)
    torch.testing.assert_close(given["layer/input"].sum, flat.T @ flat)


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, x: x @ layer.weight + layer.bias,  # of another matrix, though it is square
        lambda layer, x: F.linear(x, layer.weight * 1.0, layer.bias),
        lambda layer, x: F.linear(x, layer.weight.view(2, 8).T.reshape(4, 4), layer.bias),
        lambda layer, x: F.linear(x[..., :2], layer.weight[:, :2], layer.bias),
    ],
)
def test_what_is_not_the_layers_product_is_not_read(use: Callable[..., Tensor]) -> None:
    assert statistics(use, rows(5, 4)) == {}


def test_a_module_and_a_function_add_up_and_neither_counts_twice() -> None:
    both = statistics(lambda layer, x: layer(x) + F.linear(x, layer.weight, layer.bias), rows(5, 4))
    twice = statistics(lambda layer, x: layer(x) + layer(x), rows(5, 4))
    assert_same(both, twice)
    assert both["layer/input"].count == 10


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_with_options_of_its_own(groups: int) -> None:
    """As the causal convolutions of Mamba2: padded on the left, the weight squeezed before."""

    def given(layer: nn.Module, x: Tensor) -> Tensor:
        weight = layer.weight.squeeze(1).unsqueeze(1) if groups == 4 else layer.weight
        return F.conv1d(F.pad(x, (2, 0)), weight, layer.bias, dilation=1, groups=groups)

    options = {"kernel_size": 3, "groups": groups}
    found = statistics(given, rows(2, 4, 7), **options)
    wanted = statistics(lambda layer, x: layer(F.pad(x, (2, 0))), rows(2, 4, 7), **options)
    assert_same(found, wanted)

    def padded(layer: nn.Module, x: Tensor) -> Tensor:
        return F.conv1d(x, layer.weight, layer.bias, padding=2, groups=groups)

    wanted = statistics(lambda layer, x: layer(F.pad(x, (2, 2))), rows(2, 4, 7), **options)
    assert_same(statistics(padded, rows(2, 4, 7), **options), wanted)


class Attention(nn.Module):
    """As WavLM's: the weights of four layers go to one function."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        layers = self.q_proj, self.k_proj, self.v_proj
        output, _ = F.multi_head_attention_forward(
            query, memory, memory, 4, 2, torch.empty(0), torch.cat([p.bias for p in layers]), None,
            None, False, 0.0, self.out_proj.weight, self.out_proj.bias, key_padding_mask=mask,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return output

    def by_modules(self, query: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        heads = [
            layer(x).unflatten(-1, (2, 2)).permute(1, 2, 0, 3)
            for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), (query, memory, memory),
                                strict=True)
        ]  # fmt: skip
        kept = None if mask is None else ~mask[:, None, None]
        output = F.scaled_dot_product_attention(*heads, attn_mask=kept)
        return self.out_proj(output.permute(2, 0, 1, 3).flatten(2))


class ChannelsLast(nn.Conv1d):
    """As the CTC heads of Parakeet and LASR."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mT).mT


class Gated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        value, gate = super().forward(input).chunk(2, dim=-1)
        return value * gate


@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize("odd", [ChannelsLast(4, 6, 1), Gated(4, 6)], ids=["conv", "linear"])
def test_a_subclass_that_computes_more_is_read_inside(odd: nn.Module, length: int) -> None:
    collector = opened(odd.double(), requests_for(find_matrices(odd)))
    odd(rows(3, length, 4)).pow(3).sum().backward()
    assert collector.take() == {}
    collector.watch()
    collector.enable(True, 1)
    odd(rows(3, length, 4)).pow(3).sum().backward()
    found = collector.take()

    conv = isinstance(odd, nn.Conv1d)
    plain: nn.Module = nn.Conv1d(4, 6, 1) if conv else nn.Linear(4, 6)
    plain.double().load_state_dict(odd.state_dict())
    expected = opened(plain, requests_for(find_matrices(plain)))
    inputs = rows(3, length, 4)
    out = plain(inputs.mT) if conv else plain(inputs)
    (out if conv else out.chunk(2, -1)[0] * out.chunk(2, -1)[1]).pow(3).sum().backward()
    assert_same(found, expected.take())


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_the_projections_inside_a_function_of_attention(own: bool, masked: bool) -> None:
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = True
    # Of 5 queries, as many as there are keys: shapes do not tell whose the mask is.
    memory, query = rows(5, 3, 4), rows(5, 3, 4).flip(0)
    query = memory if own else query
    given = mask if masked else None
    taken, calls, hooks = [], {}, []
    for forward in (Attention.forward, Attention.by_modules):
        torch.manual_seed(0)
        model = Attention().double()
        matrices = find_matrices(model)
        collector = opened(model, requests_for(matrices))
        if forward is Attention.by_modules:
            hooks = [
                m.module.register_forward_hook(
                    lambda _, args, out, m=m: (calls.update({m.name: [args[0], out]}), None)[1]
                )
                for m in matrices
            ]
        else:
            model(query, memory, given).pow(2).sum().backward()
            taken.append(collector.take())
            continue
        output = forward(model, query, memory, given)
        for _, out in calls.values():
            out.retain_grad()
        output.pow(2).sum().backward()
    assert len(hooks) == 4
    for name, (inputs, output) in calls.items():
        whose = masked and (own or name in ("k_proj", "v_proj"))
        weights = (~mask.T if whose else torch.ones(5, 3)).double().flatten()
        x = torch.cat([inputs.detach().flatten(0, 1), torch.ones(15, 1, dtype=F64)], 1)
        found = taken[0][f"{name}/input"]
        torch.testing.assert_close(found.sum, (x * weights[:, None]).T @ x)
        assert found.count == weights.sum()
        delta = output.grad.flatten(0, 1)
        torch.testing.assert_close(taken[0][f"{name}/output_grad"].sum, delta.T @ delta)


def test_a_loss_outside_the_model_is_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    collector = opened(model, requests_for(find_matrices(model)))
    model.register_forward_hook(lambda *_: None)
    hidden: list[Tensor] = []
    model[0].register_forward_hook(lambda _, args, out: hidden.append(out))
    model(rows(6, 4))
    F.linear(hidden[0], model[1].weight).pow(2).sum().backward()
    found = collector.take()["1/input"].sum[:5, :5]
    torch.testing.assert_close(found, hidden[0].detach().T @ hidden[0].detach())


class Counted(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_other_modes_end_in_their_own_order() -> None:
    model = nn.Linear(4, 4).double()
    collector = opened(model, requests_for(find_matrices(model)))
    with torch.device("cpu"):
        with Counted() as counted:
            F.linear(model(rows(3, 4)), model.weight).sum().backward()
        calls = counted.calls
        torch.ones(1) + 1
        assert counted.calls == calls > 0
        with torch.device("meta"):
            assert torch.ones(2).device.type == "meta"
        assert collector.take()["/input"].count == 6
    assert torch.ones(2).device.type == "cpu"
    assert torch.overrides._get_current_function_mode() is None


def test_where_nothing_is_given_to_functions_the_mode_is_entered_once() -> None:
    model = nn.Linear(4, 4).double()
    collector = opened(model, requests_for(find_matrices(model)))
    seen = []
    for step in range(4):
        collector.enable(True, step)
        model(rows(3, 4)).sum().backward()
        seen.append(collector.functions.entered)
        assert len(collector.take()) == 2
    assert seen == [True, False, False, False]
    collector.watch()
    collector.enable(True, 4)
    F.linear(model(rows(3, 4)), model.weight).sum().backward()
    assert collector.take()["/input"].count == 6


def test_the_source_of_a_weight() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    square, kernel = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 1, 2))
    assert source_of(weight) == (weight, False)
    assert source_of(weight.T) == source_of(weight.double().mT) == (weight, True)
    assert source_of(square.T) == (square, True)
    assert source_of(kernel.view(3, 2)) is None and source_of(weight.view(4, 3)) is None
    assert source_of(kernel.view(3, 2).unsqueeze(1)) == (kernel, False)
    assert source_of(weight * 2) is None and source_of(weight[:, :2]) is None
    assert source_of(weight + 0) is None
