"""Passes that reach the gradients count, however outputs are changed; others on the side do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hf_precond.registry import create_optimizer
from tests.optimizers.models import batch, make
from tests.statistics.support import assert_same, close_all, linears, opened, requests_for


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


# Outputs that are changed in place --------------------------------------------------


def masked(output: Tensor) -> Tensor:  # as wav2vec2 masks its features
    output[..., 1, :] = torch.arange(4.0, dtype=output.dtype)
    return output


def added(output: Tensor) -> Tensor:  # as OWL-ViT adds its box bias
    output += 2.0
    return output


def scaled(output: Tensor) -> Tensor:  # as Longformer scales its global queries
    output /= 3.0
    return output.transpose(0, 1)


def activated(output: Tensor) -> Tensor:
    return torch.relu_(output)


def of_a_view(output: Tensor) -> Tensor:
    output.view(-1, 4)[::2].mul_(2.0)
    return output


@pytest.mark.parametrize("change", [masked, added, scaled, activated, of_a_view])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 5)])
def test_outputs_may_be_changed_in_place(
    shape: tuple[int, ...], bias: bool, change: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias)).double()
    inputs = torch.randn(*shape, dtype=torch.float64)
    collector = opened(model, requests_for(linears(model)))
    change(model(inputs).clone()).pow(3).sum().backward()
    wanted = collector.take()
    change(model(inputs)).pow(3).sum().backward()
    assert_same(collector.take(), wanted)
    change(model(inputs).clone()).pow(3).sum().backward()
    assert collector.take().keys() == wanted.keys()


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 5), (5,)])
def test_gradients_that_are_parts_of_a_larger_one(
    shape: tuple[int, ...], join: Callable[[list[Tensor]], Tensor]
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    model = nn.Sequential(layer)
    inputs = [torch.randn(*shape, dtype=torch.float64) for _ in range(3)]
    collector = opened(model, requests_for(linears(model)))
    outputs = [model(tensor) for tensor in inputs]
    for output in outputs:
        output.retain_grad()
    factors = torch.arange(1.0, 4 * sum(o.numel() // 4 for o in outputs) + 1)
    joined = join(outputs)
    (joined * factors.view(joined.shape)).sum().backward()
    delta = torch.cat([o.grad.view(-1, 4) for o in outputs if o.grad is not None])
    torch.testing.assert_close(collector.take()["0/output_grad"].sum, delta.T @ delta)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", ["returned", "in place"])
def test_hooks_of_the_users_own_may_change_outputs(change: str, before: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    model = nn.Sequential(layer)
    factors = torch.arange(1.0, 5.0).double()

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * factors if change == "returned" else output.mul_(factors)

    if before:
        layer.register_forward_hook(hook)
    collector = opened(model, requests_for(linears(model)))
    if not before:
        layer.register_forward_hook(hook)
    model(torch.randn(3, 5).double()).sum().backward()
    delta = factors.expand(3, 4)
    torch.testing.assert_close(collector.take()["0/output_grad"].sum, delta.T @ delta)


def test_a_transposed_view_brings_the_gradient_in_its_own_layout() -> None:
    class Transposed(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).transpose(0, 1)

    torch.manual_seed(0)
    layer = Transposed(5, 4).double()
    inputs = torch.randn(2, 3, 5, dtype=torch.float64)
    collector = opened(layer, requests_for(linears(layer)))
    output = layer(inputs).clone()
    output.retain_grad()
    masked(output.clone()).pow(3).sum().backward()
    wanted = collector.take()
    masked(layer(inputs)).pow(3).sum().backward()
    assert_same(collector.take(), wanted)
    assert output.grad is not None
    delta = output.grad.flatten(0, 1)
    torch.testing.assert_close(wanted["/output_grad"].sum, delta.T @ delta)


# Passes on the side -------------------------------------------------------------------


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**inputs).loss
    return loss


def samples_by_vmap(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, Tensor], tokens: Tensor) -> Tensor:
        given = {"input_ids": tokens[None], "labels": tokens[None]}
        return torch.func.functional_call(model, values, (), given).loss

    torch.func.vmap(torch.func.grad(one), (None, 0), randomness="different")(
        parameters, inputs["input_ids"]
    )


def handed_out(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss_of(model, inputs), parameters)


def into_another_leaf(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    loss_of(model, rest | {"inputs_embeds": embedded}).backward(inputs=[embedded])
    assert embedded.grad is not None


def of_the_input(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    torch.autograd.grad(loss_of(model, rest | {"inputs_embeds": embedded}), [embedded])


SIDE = [samples_by_vmap, handed_out, into_another_leaf, of_the_input]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("side", SIDE)
@pytest.mark.parametrize("name", ["afopt", "nkfac"])
def test_passes_on_other_data_move_no_weight(
    name: str, side: Callable[[nn.Module, dict[str, Tensor]], None], lora: bool
) -> None:
    weights = []
    for beside in (False, True):
        model: nn.Module = make("llama")
        if lora:
            from peft import LoraConfig, get_peft_model

            options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}
            model = get_peft_model(model, LoraConfig(**options, init_lora_weights=False)).train()
        fields = {"stat_interval": 1, "inverse_interval": 1, "lr": 1e-2}
        optimizer = create_optimizer(model, name, **fields)
        for step in range(3):
            optimizer.zero_grad()
            if beside:
                side(model, batch("llama", seed=50 + step))
            loss_of(model, batch("llama", seed=step)).backward()
            if beside:
                side(model, batch("llama", seed=90 + step))
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
        optimizer.close()
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)
