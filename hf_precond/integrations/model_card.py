"""The optimizer in the model card."""

from __future__ import annotations

import dataclasses
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_precond.config.hub import version, write_whole
from hf_precond.integrations.arguments import config_in_use
from hf_precond.registry import get_info

TAG = "hf_precond"

_BEGIN, _END = "<!-- hf_precond: optimizer -->", "<!-- hf_precond: end -->"
_BEFORE = "### Framework versions"
_VERSIONS = re.compile(rf"{_BEFORE}\n(?:\n- .*)+")
_RECONSTRUCTION = (
    'a reconstruction from the abstract of [Ying Sun, "Designing effective preconditioned '
    'optimizers for deep neural network training", PhD thesis, The Hong Kong Polytechnic '
    "University, 2024](https://theses.lib.polyu.edu.hk/handle/200/13232)"
)
_SOURCES = {
    **dict.fromkeys(("adamr", "afopt"), _RECONSTRUCTION),
    "muon": '[Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024]'
    "(https://kellerjordan.github.io/posts/muon/)",
    "nkfac": '[Sun, Yong and Zhang, "NKFAC: A Fast and Stable KFAC Optimizer for Deep Neural '
    'Networks", ECML PKDD 2023](https://doi.org/10.1007/978-3-031-43421-1_15)',
    "sgdph": '[Sun, Yong and Zhang, "SGD with Partial Hessian for Deep Neural Networks '
    'Optimization", 2024](https://arxiv.org/abs/2403.02681)',
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


def section(config: Any, optimizer: Any = None, repository: str | None = None) -> str:
    """The section on the optimizer: its settings, and how many parameters it preconditions.

    Args:
        config: the optimizer's config.
        optimizer: the optimizer, if it exists already.
        repository: the id of the model's repository, if it has one.
    """
    info = get_info(config.name)
    package = f"[`{TAG}`]({_link()})" if info.package == TAG else f"`{info.package}`"
    source = f" ({_SOURCES[config.name]})" if config.name in _SOURCES else ""
    lines = [
        _BEGIN,
        "### Optimizer",
        "",
        f"{info.title} of {package}{source}. The file "
        "`optimizer_config.json` beside the weights holds the settings; `--optim "
        f"{config.name} --optim_args config={repository or 'FOLDER_OR_HUB_ID'}` uses them again.",
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


def add_section(
    path: str | Path, config: Any, optimizer: Any = None, repository: str | None = None
) -> None:
    """Put the section, and this package's version, into a model card; replaces an earlier section.

    Args:
        path: the card.
        config: the optimizer's config.
        optimizer: the optimizer, if it exists already.
        repository: the id of the model's repository, if it has one.
    """
    text = Path(path).read_text(encoding="utf-8")
    if _BEGIN in text and _END in text:
        head, rest = text.split(_BEGIN, 1)
        text = head + rest.split(_END, 1)[1].lstrip("\n")
    added = section(config, optimizer, repository)
    if f"\n- {TAG} {version()}\n" not in text:
        text = _VERSIONS.sub(lambda found: f"{found[0]}\n- {TAG} {version()}", text, count=1)
    if _BEFORE in text:
        text = text.replace(_BEFORE, f"{added}\n{_BEFORE}", 1)
    else:
        text = f"{text.rstrip()}\n\n{added}"
    write_whole(path, text)


def _link() -> str:
    """The first of this package's URLs, or its page on the index."""
    try:
        urls = metadata.metadata(TAG).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    return urls[0].rpartition(", ")[2] if urls else "https://pypi.org/project/hf-precond/"


def _shown(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
