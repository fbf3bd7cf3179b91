"""Parameter groups: the Trainer's rule of decay, rates by head and depth, the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_precond import AdamRConfig
from hf_precond.architectures.groups import parameter_groups, undecayed_names
from tests.architectures.families import FAMILIES, build

fields = AdamRConfig.create


def labels_of(model: nn.Module, groups: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Name of every parameter in a group to the group's name."""
    held = {id(p): group["name"] for group in groups for p in group["params"]}
    return {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}


class _Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 4)
        self.final_norm = nn.BatchNorm1d(4)
        self.plain = nn.LayerNorm(4)
        self.batch = nn.BatchNorm1d(4)
        self.normal = nn.Linear(4, 4)
        self.input_layernorm = nn.RMSNorm(4)


@pytest.mark.parametrize("name", [*FAMILIES, "norms"])
def test_decay_is_the_trainers(name: str, tmp_path: Path) -> None:
    model = _Norms() if name == "norms" else build(name, torch.float32)
    trainer = tf.Trainer(model, tf.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(model))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    undecayed = undecayed_names(model)
    assert {n for n in names if n not in undecayed} == decayed & set(names)
    groups = parameter_groups(model, fields(lr=1e-3, weight_decay=0.1))
    labels = labels_of(model, groups)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("decay", 0.1), ("no decay", 0.0)]
    assert set(labels) == set(names)
    by_name = dict(model.named_parameters())
    for group in groups:
        wanted = [by_name[n] for n in names if labels[n] == group["name"]]
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted]


def test_head_has_groups_of_its_own_at_another_rate() -> None:
    model = build("bert", torch.float32)
    groups = parameter_groups(model, fields(lr=1e-3, weight_decay=0.1, head_lr_scale=5.0))
    labels = labels_of(model, groups)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("decay", 1e-3, 0.1),
        ("no decay", 1e-3, 0.0),
        ("head decay", 5e-3, 0.1),
        ("head no decay", 5e-3, 0.0),
    ]
    assert labels["classifier.weight"] == "head decay"
    assert labels["classifier.bias"] == "head no decay"
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_nothing_to_group_says_why() -> None:
    with pytest.raises(ValueError, match="this model has no newly initialised head"):
        parameter_groups(build("gpt2", torch.float32), fields(head_lr_scale=5.0))
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), fields())


def test_frozen_parameters_are_in_no_group() -> None:
    model = build("bert", torch.float32)
    model.bert.embeddings.requires_grad_(False)
    groups = parameter_groups(model, fields())
    labels = labels_of(model, groups)
    assert all(p.requires_grad for group in groups for p in group["params"])
    assert not any(name.startswith("bert.embeddings") for name in labels)


# Groups of the user's ------------------------------------------------------------


class _Network(nn.Module):
    """Two blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
        self.head = nn.Linear(4, 2)


def test_given_groups_are_taken_as_they_are() -> None:
    model = _Network()
    given = [
        {"params": iter(model.stem.parameters()), "lr": 0.5, "weight_decay": 0.25, "betas": (0, 0)},
        {"params": model.head.weight, "name": "mine"},
        {"params": model.blocks.named_parameters(), "weight_decay": 0.0},
        {"params": [], "lr": 1.0},
        {"params": [], "weight_decay": 0.0},
        {"params": [model.head.bias]},
    ]
    groups = parameter_groups(model, fields(lr=1e-3, weight_decay=0.1), given)
    assert groups == [
        {"params": list(model.stem.parameters()), "lr": 0.5, "weight_decay": 0.25, "betas": (0, 0),
         "name": "group 0"},
        {"params": [model.head.weight], "name": "mine"},
        {"params": list(model.blocks.named_parameters()), "weight_decay": 0.0, "name": "no decay"},
        {"params": [], "lr": 1.0, "name": "group 3"},
        {"params": [model.head.bias], "name": "decay"},
    ]  # fmt: skip
    assert "name" not in given[0], "the caller's dictionaries are copied"


def test_groups_of_another_optimizer_do_not_bring_its_step_along() -> None:
    model = _Network()
    given = [{"params": list(model.parameters()), "lr": 1.0, "step": 7}]
    assert "step" not in parameter_groups(model, fields(), given)[0]


def test_without_decay_groups_are_told_apart_by_what_is_in_them() -> None:
    model = _Network()
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    given = [{"params": p, "weight_decay": 0.0} for p in (matrices, vectors, [])]
    names = [group["name"] for group in parameter_groups(model, fields(), given)]
    assert names == ["decay", "no decay"]
    halves = [{"params": matrices[:1]}, {"params": matrices[1:]}]
    names = [group["name"] for group in parameter_groups(model, fields(), halves)]
    assert names == ["decay", "decay (1)"]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (lambda m: m, TypeError, r"params is a _Network; pass parameters \(model.parameters"),
        (lambda m: m.stem.weight, TypeError, "params is a Parameter"),
        (lambda m: {"params": m.parameters()}, TypeError, "params is a dict"),
        (lambda m: [{"params": set(m.parameters())}], TypeError, "a set, whose order"),
        (lambda m: [{"lr": 1.0}], TypeError, "must be a dictionary with params"),
        (lambda m: [], ValueError, "params is empty"),
    ],
)
def test_what_are_no_groups_is_refused(given: Any, error: type[Exception], said: str) -> None:
    model = _Network()
    with pytest.raises(error, match=said):
        parameter_groups(model, fields(), given(model))


# Rates by depth ----------------------------------------------------------------------


def rates(model: nn.Module, groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Name of every parameter to the learning rate of its group."""
    held = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: held[id(p)] for name, p in model.named_parameters() if id(p) in held}


def test_rates_fall_layer_by_layer_in_groups_with_and_without_decay() -> None:
    model = _Network()
    groups = parameter_groups(model, fields(lr=1.0, weight_decay=0.1, layer_lr_decay=0.5))
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("layer 0 decay", 0.125, 0.1, 1),
        ("layer 0 no decay", 0.125, 0.0, 1),
        ("layer 1 decay", 0.25, 0.1, 1),
        ("layer 1 no decay", 0.25, 0.0, 1),
        ("layer 2 decay", 0.5, 0.1, 1),
        ("layer 2 no decay", 0.5, 0.0, 1),
        ("decay", 1.0, 0.1, 1),
        ("no decay", 1.0, 0.0, 1),
    ]


def test_a_head_of_its_own_rate_above_layers_of_theirs() -> None:
    model = build("bert", torch.float32)
    config = fields(lr=1.0, head_lr_scale=5.0, layer_lr_decay=0.5)
    found = rates(model, groups := parameter_groups(model, config))
    for name, rate in found.items():
        layer = next((n for n in range(2) if f"layer.{n}." in name), None)
        if "embeddings" in name:
            assert rate == 0.125
        elif layer is not None:
            assert rate == 0.5 ** (2 - layer)
        else:
            assert rate == (5.0 if name.startswith("classifier") else 1.0), name
    assert [g["name"] for g in groups[-4:]] == [
        "decay", "no decay", "head decay", "head no decay"
    ]  # fmt: skip


def test_rates_scale_the_given_groups_that_have_none_of_their_own() -> None:
    model, loss = _Network(), nn.Linear(2, 2)
    given = [
        {"params": model.head.named_parameters(), "lr": 7.0},
        {"params": [*model.stem.named_parameters(), *model.blocks.named_parameters()]},
        {"params": loss.named_parameters(), "weight_decay": 0.0},
    ]
    groups = parameter_groups(model, fields(lr=1.0, layer_lr_decay=0.5), given)
    shown = [(g["name"], g["lr"], [name for name, _ in g["params"]]) for g in groups]
    assert shown == [
        ("layer 0 decay", 0.125, ["weight", "bias"]),
        ("layer 1 decay", 0.25, ["0.0.weight", "0.0.bias"]),
        ("layer 2 decay", 0.5, ["1.0.weight", "1.0.bias"]),
        ("group 0", 7.0, ["weight", "bias"]),
        ("decay (2)", 1.0, ["weight", "bias"]),
    ]


@pytest.mark.parametrize(
    "scale", [{"head_lr_scale": 2.0}, {"layer_lr_decay": 0.5}], ids=lambda scale: next(iter(scale))
)
def test_a_scale_that_would_change_no_rate_is_refused(scale: dict[str, float]) -> None:
    model = build("bert", torch.float32)
    given = [{"params": model.parameters(), "lr": 0.1}]
    (field,) = scale
    with pytest.raises(ValueError, match=f"^{field}=.*leave {field} at 1, or drop lr"):
        parameter_groups(model, fields(**scale), given)


def test_a_model_without_layers_has_no_depths() -> None:
    with pytest.raises(ValueError, match="layer_lr_decay: this model has no stack of layers"):
        parameter_groups(nn.Linear(2, 2), fields(layer_lr_decay=0.5))
