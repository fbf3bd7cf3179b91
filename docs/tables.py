"""The tables of fields.md, made from the config classes."""

import importlib
import inspect
import re
from typing import Any

from hf_precond.config.base import OptimizerConfig

CONFIGS = {"afopt": "AFOpt", "adamr": "AdamR", "nkfac": "NKFAC", "sgdph": "SGDPH", "muon": "Muon"}
ARGUMENT = re.compile(r"^    (\w+): (.*?)(?=^    \w|\Z)", flags=re.DOTALL | re.MULTILINE)
# What stands in columns of its own: the range, and the default (unless a reason follows it).
RANGE = re.compile(r",? (?:each )?in [\[(][\d.]+, [\d.]+[\])]|, >=? [\d.]*\d")
DEFAULT = re.compile(r" Default `?[-\w.]*\w`?(?: and [-\w.]*\w)?\.(?= |$)")
REASON = re.compile(r" Default `?[-\w.]*\w`?; ")
# The Trainer's arguments that a field follows, and their defaults there.
FOLLOWED = {
    "lr": ("`--learning_rate`", "5e-5"),
    "weight_decay": ("`--weight_decay`", "0.0"),
    "betas": ("`--adam_beta1`, `--adam_beta2`", "0.9:0.999"),
    "eps": ("`--adam_epsilon`", "1e-08"),
}


def config_class(name: str) -> type[OptimizerConfig]:
    """The config class of an optimizer; torch is not imported."""
    module = importlib.import_module(f"hf_precond.optimizers.{name}.config")
    return getattr(module, f"{CONFIGS[name]}Config")


def meanings(config_cls: type[OptimizerConfig]) -> dict[str, str]:
    """Field to its description in Markdown, without range and default."""
    found: dict[str, str] = {}
    for cls in reversed(config_cls.__mro__):
        section = re.search(
            r"^Args:\n(.*?)(?=^\w|\Z)", inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE
        )
        for name, text in ARGUMENT.findall(section[1] if section else ""):
            text = RANGE.sub("", " ".join(text.split()).replace("``", "`"))
            text = REASON.sub(" ", DEFAULT.sub("", text)).strip()
            found[name] = text[:1].upper() + text[1:]
    return found


def table(config_cls: type[OptimizerConfig], names: list[str]) -> str:
    """Fields of a config with defaults, legal values and meanings."""
    fields, described = config_cls._fields(), meanings(config_cls)
    rows = ["| field | default | values | meaning |", "|---|---|---|---|"]
    for name in names:
        legal, default = fields[name].legal().replace("'", "`"), shown(fields[name].default)
        cells = (f"`{name}`", f"`{default}`", legal, described.get(name, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def shown(value: Any) -> str:
    """A value as ``--optim_args`` takes it."""
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def differs(name: str, item: Any) -> bool:
    """Whether a field is an optimizer's own, or has a default or range of its own there."""
    shared = OptimizerConfig._fields().get(name)
    return shared is None or (item.default, item.legal()) != (shared.default, shared.legal())


def tables() -> dict[str, str]:
    """Name in ``{{ name }}`` to table."""
    shared = OptimizerConfig._fields()
    followed = ["| field | follows | default there | default outside |", "|---|---|---|---|"]
    for name, (arguments, default) in FOLLOWED.items():
        followed.append(
            f"| `{name}` | {arguments} | `{default}` | `{shown(shared[name].default)}` |"
        )
    made = {"followed": "\n".join(followed), "shared": table(OptimizerConfig, list(shared))}
    for name in CONFIGS:
        own = config_class(name)
        made[name] = table(own, [n for n, item in own._fields().items() if differs(n, item)])
    return made
