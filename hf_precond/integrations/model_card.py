"""The optimizer in the model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hf_precond.config.hub import write_whole
from hf_precond.integrations.arguments import config_in_use
from hf_precond.registry import get_info

TAG = "hf_precond"

_BEGIN, _END = "<!-- hf_precond: optimizer -->", "<!-- hf_precond: end -->"
_BEFORE = "### Framework versions"
_THESIS = (
    'Ying Sun, "Designing effective preconditioned optimizers for deep neural network training", '
    "PolyU 2024"
)
_SOURCES = {
    **dict.fromkeys(("adamr", "afopt", "nkfac", "sgdph"), _THESIS),
    "muon": 'Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024',
}


def correct_hyperparameters(trainer: Any, hyperparameters: dict[str, Any]) -> None:
    """Correct the optimizer and its learning rate in the hyperparameters of a model card.

    Args:
        trainer: any ``Trainer``; nothing changes with an optimizer of another
            package.
        hyperparameters: what the card lists, changed in place.
    """
    config = config_in_use(trainer)
    if config is not None:
        hyperparameters["learning_rate"] = config.lr
        hyperparameters["optimizer"] = summary(config)


def summary(config: Any) -> str:
    """The optimizer, its package, and the fields that differ from the defaults, in a line.

    Args:
        config: the optimizer's config.
    """
    info = get_info(config.name)
    changed = ", ".join(
        f"{field.name}={_shown(getattr(config, field.name))}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    )
    settings = changed or "its default settings"
    return f"{info.title} ({info.package}, --optim {config.name}) with {settings}"


def section(config: Any, optimizer: Any = None) -> str:
    """The section on the optimizer: its settings, and how many parameters it preconditions.

    Args:
        config: the optimizer's config.
        optimizer: the optimizer, if it exists already.
    """
    info = get_info(config.name)
    source = f" ({_SOURCES[config.name]})" if config.name in _SOURCES else ""
    lines = [
        _BEGIN,
        "### Optimizer",
        "",
        f"{info.title} of `{info.package}`{source}. The file "
        "`optimizer_config.json` beside the weights holds the settings; "
        f"`--optim {config.name} --optim_args config=<this repository>` uses them again.",
        "",
        "| field | value |",
        "|:--|:--|",
    ]
    lines += [
        f"| {field.name} | {_shown(getattr(config, field.name))} |"
        for field in dataclasses.fields(config)
    ]
    if optimizer is not None:
        counts = sorted(optimizer.routing.count().items())
        shown = ", ".join(f"{number} {treatment}" for treatment, number in counts)
        lines += ["", f"Parameter tensors: {shown}."]
    return "\n".join([*lines, _END, ""])


def add_section(path: str | Path, config: Any, optimizer: Any = None) -> None:
    """Put the section into a model card; an earlier section is replaced.

    Args:
        path: the card.
        config: the optimizer's config.
        optimizer: the optimizer, if it exists already.
    """
    text = Path(path).read_text(encoding="utf-8")
    if _BEGIN in text and _END in text:
        head, rest = text.split(_BEGIN, 1)
        text = head + rest.split(_END, 1)[1].lstrip("\n")
    added = section(config, optimizer)
    if _BEFORE in text:
        text = text.replace(_BEFORE, f"{added}\n{_BEFORE}", 1)
    else:
        text = f"{text.rstrip()}\n\n{added}"
    write_whole(path, text)


def _shown(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
