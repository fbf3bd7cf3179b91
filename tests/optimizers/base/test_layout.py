"""What a step keeps of the one before: used while nothing changes, never after something did."""

import copy
import gc
import weakref
from unittest.mock import Mock

import pytest
import torch
from torch import is_tensor, nn

from hf_precond.optimizers.base.layout import Layout
from hf_precond.registry import list_optimizers
from tests.optimizers.models import backward, batch, make, weights
from tests.optimizers.test_shared import build, same

NAMES = list_optimizers()
LAYER = "bert.encoder.layer.1."


def parameter(model, name):
    return model.get_parameter(f"{LAYER}{name}")


def nothing(model, optimizer):
    pass


def other_rates(model, optimizer):
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = group["lr"] / 2, 0.1


def freeze(model, optimizer):
    for name in ("output.dense.weight", "intermediate.dense.bias", "output.LayerNorm.bias"):
        parameter(model, name).requires_grad_(False).grad = None


def lose_gradients(model, optimizer):
    for name in ("output.dense.weight", "intermediate.dense.bias", "output.LayerNorm.weight"):
        parameter(model, name).grad = None


def move_to_other_group(model, optimizer):
    first, second = optimizer.param_groups[:2]
    second["params"].append(first["params"].pop())
    first["params"].append(second["params"].pop(0))


def new_groups(model, optimizer):
    optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] *= 2


def new_values(model, optimizer):
    for p in model.parameters():
        p.data = p.data * 1.5


def to_float64(model, optimizer):
    model.double()


def copied_state(model, optimizer):
    for state in optimizer.state.values():
        held = {k: v.clone() if is_tensor(v) else v for k, v in state.items()}
        state.update(held)


def new_dictionaries(model, optimizer):
    for p, state in optimizer.state.items():
        optimizer.state[p] = dict(state)


def state_in_float64(model, optimizer):
    for state in optimizer.state.values():
        for key, value in state.items():
            if is_tensor(value) and value.is_floating_point():
                state[key] = value.double()


def data_in_float64(model, optimizer):
    for state in optimizer.state.values():
        for value in state.values():
            if is_tensor(value) and value.is_floating_point():
                value.data = value.data.double()


def without_state(model, optimizer):
    for state in optimizer.state.values():
        state.clear()


def loaded(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [
    freeze, lose_gradients, move_to_other_group, new_groups, to_float64, copied_state,
    new_dictionaries, state_in_float64, data_in_float64, without_state, loaded,
]  # fmt: skip
BEFORE = [to_float64, loaded]
"""What is done before the passes: statistics are forgotten, or are of one dtype."""
UNSEEN = [nothing, other_rates, new_values]
"""What a layout does not follow from."""


def trained(name, change, forget, steps=7):
    """Weights and state after steps with a change between two of them; whether it was noticed."""
    model, noticed = make("bert"), None
    optimizer = build(name, model)
    for step in range(steps):
        if forget:
            optimizer.layout = Layout()
        known = optimizer.layout
        if step == 4 and change in BEFORE:
            change(model, optimizer)
        backward(model, optimizer, batch("bert", dtype=model.dtype))
        if step == 4 and change not in BEFORE:
            change(model, optimizer)
        optimizer.step()
        if step == 4:
            noticed = optimizer.layout is not known
        optimizer.zero_grad()
    optimizer.close()
    names = {p: key for key, p in model.named_parameters()}
    state = {
        f"{names[p]} {key}": torch.as_tensor(value)
        for p, held in optimizer.state.items()
        for key, value in held.items()
    }
    return weights(model) | state, noticed


@pytest.mark.parametrize("change", [*CHANGES, *UNSEEN], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_without_a_layout(name, change):
    expected, _ = trained(name, change, forget=True)
    found, noticed = trained(name, change, forget=False)
    same(expected, found)
    assert noticed == (change in CHANGES)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_is_held_after_a_step(name):
    model = make("bert")
    optimizer = build(name, model)
    for _ in range(3):
        backward(model, optimizer, batch("bert"))
        optimizer.step()
    views = [v for made in optimizer.layout._made.values() for v in flat(made)]
    assert views and all(view.grad is view.param for view in views)
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_is_held_after_a_step_that_failed(name, monkeypatch):
    model = make("bert")
    optimizer = build(name, model)
    for fails in (False, False, True):
        backward(model, optimizer, batch("bert"))
        if fails:
            fail = MemoryError("no memory is left")
            monkeypatch.setattr(optimizer, "_enable_statistics", Mock(side_effect=fail))
            held = [weakref.ref(p.grad) for p in model.parameters()]
            with pytest.raises(MemoryError):
                optimizer.step()
            optimizer.zero_grad()
            gc.collect()
            assert not any(reference() is not None for reference in held)
        else:
            optimizer.step()
            optimizer.zero_grad()
    optimizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_state_is_freed_with_its_optimizer(name):
    model = make("bert")
    optimizer = build(name, model)
    for _ in range(3):
        backward(model, optimizer, batch("bert"))
        optimizer.step()
    optimizer.close()
    held = [weakref.ref(v) for s in optimizer.state.values() for v in s.values() if is_tensor(v)]
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert held and all(reference() is None for reference in held)
    finally:
        gc.enable()


def flat(made):
    """The views somewhere in what was made."""
    if hasattr(made, "grad") and hasattr(made, "param"):
        return [made]
    if hasattr(made, "views"):
        made = made.views
    return [view for each in made for view in flat(each)] if isinstance(made, list | tuple) else []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused_is_refused_at_later_steps_too(name):
    for change in (replace, tie):
        model = make("bert")
        optimizer = build(name, model)
        for step in range(4):
            backward(model, optimizer, batch("bert"))
            if step < 3:
                optimizer.step()
        change(model)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                optimizer.step()
        optimizer.close()


def replace(model):
    for kind in ("dense", "LayerNorm"):
        layer = model.get_submodule(f"{LAYER}output.{kind}")
        held = layer.weight
        layer.weight = nn.Parameter(held.detach().clone())
        layer.weight.grad = held.grad


def tie(model):
    for name in ("attention.self.query", "output.LayerNorm"):
        layers = [model.get_submodule(f"bert.encoder.layer.{n}.{name}") for n in (0, 1)]
        layers[1].weight = layers[0].weight
