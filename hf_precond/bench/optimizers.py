"""The optimizers that can be compared: those of ``--optim``, torch's, and controls, by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_precond.architectures.pretrained import starting_lr
from hf_precond.config.base import OptimizerConfig
from hf_precond.registry import create_optimizer, get_info, list_optimizers

CONTROLS = {
    "adamw": "torch_optimizers:AdamWConfig",
    "sgd": "torch_optimizers:SGDConfig",
    "torch_muon": "torch_optimizers:TorchMuonConfig",
    "schedulefree": "torch_optimizers:ScheduleFreeConfig",
    "soap": "soap:SOAPConfig",
    "soap_muon": "soap_muon:SOAPMuonConfig",
    "newton_muon": "newton_muon:NewtonMuonConfig",
    "lora_plus": "lora:LoRAPlusConfig",
    "lora_muon": "lora:LoRAMuonConfig",
}
"""Name to module and config class, below ``hf_precond.bench.controls``."""

BETAS = ("beta1", "beta2")
AUTO = "auto"
"""A learning rate that follows from pretrained weights and the number of steps."""


def names() -> list[str]:
    """The names that a file may use.

    Returns:
        Those of ``--optim``, then the controls.
    """
    return [*list_optimizers(), *CONTROLS]


def config_class(name: str) -> type[OptimizerConfig]:
    """The config class of a name.

    Args:
        name: one of :func:`names`.

    Raises:
        ValueError: the name is unknown; the message has the nearest one.
    """
    if name in list_optimizers():
        return get_info(name).config_cls
    if name not in CONTROLS:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"optimizer {name!r} is unknown{hint} The names are {', '.join(names())}.")
    module, _, cls = CONTROLS[name].partition(":")
    return getattr(importlib.import_module(f"hf_precond.bench.controls.{module}"), cls)


def field_names(name: str) -> list[str]:
    """The fields of an optimizer, ``beta1`` and ``beta2`` of its ``betas`` among them.

    Args:
        name: one of :func:`names`.
    """
    return [*config_class(name)._fields(), *BETAS]


def check(name: str, fields: Mapping[str, Any]) -> OptimizerConfig:
    """The config of an optimizer with these fields.

    Args:
        name: one of :func:`names`.
        fields: field to value; ``beta1`` and ``beta2`` replace one of ``betas``, and ``lr`` may
            be ``"auto"``.

    Raises:
        ValueError: a name is unknown or a value not legal.
    """
    cls, values = config_class(name), {k: v for k, v in fields.items() if (k, v) != ("lr", AUTO)}
    given = {number: values.pop(b) for number, b in enumerate(BETAS) if b in values}
    if given:
        betas = list(values.get("betas", cls._fields()["betas"].default))
        for number, value in given.items():
            betas[number] = value
        values["betas"] = betas
    return cls.create(**values)


def check_for_script(name: str, fields: Mapping[str, Any]) -> None:
    """Refuse what a script could not take as ``--optim`` and its arguments.

    Args:
        name: one of :func:`names`.
        fields: its fields that are not tuned.

    Raises:
        ValueError: the optimizer is a control of this package, or its rate follows from nothing.
    """
    if name == "adamw" and fields.get("lr") == AUTO:
        raise ValueError(
            f"lr = {AUTO!r}: under adamw a Trainer takes 5e-5 whatever the weights; give a number, "
            "or take optimizer = 'adamr' with basis = 'identity', which is AdamW."
        )
    if name not in (*list_optimizers(), "adamw"):
        raise ValueError(
            f"optimizer {name!r} is no --optim name, so a script cannot train with it; write the "
            f"task as a function, or take one of {', '.join([*list_optimizers(), 'adamw'])}."
        )


def build(
    model: nn.Module, name: str, fields: Mapping[str, Any], warmup: int, steps: int | None = None
) -> Any:
    """Build an optimizer for a model.

    Args:
        model: the model.
        name: one of :func:`names`.
        fields: its fields.
        warmup: steps of warm-up, for an optimizer that has a schedule of its own.
        steps: of the whole training, from which ``lr = "auto"`` follows.

    Returns:
        A torch optimizer, or what steps like one.

    Raises:
        ValueError: as :func:`check`, and where no rate follows from the model.
    """
    if fields.get("lr") == AUTO:
        fields = {**fields, "lr": _followed_lr(model, name, steps)}
    config: Any = check(name, fields)
    if name in list_optimizers():
        return create_optimizer(model, config)
    return config.build(model, warmup)


def _followed_lr(model: nn.Module, name: str, steps: int | None) -> float:
    found = starting_lr(model, steps)
    if found is None:
        raise ValueError(
            f"{name}: lr = {AUTO!r} follows from pretrained weights, and the task's model has none "
            "that train; give a number."
        )
    return found


def has_own_schedule(optimizer: Any) -> bool:
    """Whether an optimizer sets its rate itself (schedule-free ones average instead of decaying).

    Args:
        optimizer: as :func:`build` returned it.
    """
    groups = optimizer.param_groups
    return any("warmup_steps" in group for group in groups)


def switch(optimizer: Any, training: bool) -> None:
    """Tell an optimizer whose evaluated weights differ from the trained ones which are needed.

    Args:
        optimizer: as :func:`build` returned it.
        training: whether training goes on, or evaluation follows.
    """
    mode = getattr(optimizer, "train" if training else "eval", None)
    if callable(mode):
        mode()


def state_bytes(optimizer: Any) -> int:
    """The memory of an optimizer's tensors of state.

    Args:
        optimizer: as :func:`build` returned it.
    """
    return sum(map(_bytes, optimizer.state.values()))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list) else 0
