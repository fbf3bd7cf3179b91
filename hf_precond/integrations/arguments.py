"""From ``TrainingArguments`` to a config.

Precedence: ``--optim_args``, then the Trainer's own arguments, then the
config's defaults.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from hf_precond.config.base import OptimizerConfig
from hf_precond.integrations import compat
from hf_precond.integrations.names import NAMES

logger = logging.getLogger(__name__)

CONFIG_KEY = "config"

# Field -> the Trainer's arguments it follows.
FOLLOWS = {
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
}


def config_from_arguments(args: Any, *, tell: bool = False) -> OptimizerConfig:
    """The config that ``--optim``, ``--optim_args`` and the Trainer's own arguments mean.

    Args:
        args: ``TrainingArguments`` whose ``optim`` is one of this package's.
        tell: warn, on the first rank, of an argument of the Trainer that was
            given and that ``--optim_args`` overrules.

    Raises:
        ValueError: ``--optim_args`` is malformed, or a field or value in it or
            in the Trainer's arguments is not legal.
        FileNotFoundError: ``config=`` names no config.
    """
    config_cls = _config_class(str(args.optim.value))
    own = {
        field: getattr(args, names[0]) if len(names) == 1
        else tuple(getattr(args, name) for name in names)
        for field, names in FOLLOWS.items()
    }
    pairs = parse_pairs(args.optim_args)
    if CONFIG_KEY not in pairs:
        _check_own(config_cls, {f: value for f, value in own.items() if f not in pairs})
    config = config_from_pairs(config_cls, args.optim_args, own)
    if tell and args.process_index == 0:
        _tell_unused(args, config, [f for f in FOLLOWS if f in pairs or CONFIG_KEY in pairs])
    return config


def config_from_pairs(
    config_cls: type[OptimizerConfig], text: str | None, defaults: Mapping[str, Any] | None = None
) -> OptimizerConfig:
    """A config from ``key=value,…``, where ``config=`` names a saved one to start from.

    Args:
        config_cls: the optimizer's config class.
        text: the pairs.
        defaults: fields for which neither the pairs nor a saved config have a
            value.

    Raises:
        ValueError, FileNotFoundError: as :func:`config_from_arguments`.
    """
    texts = parse_pairs(text)
    source = texts.pop(CONFIG_KEY, None)
    try:
        given = config_cls.parse(texts)
        if source is not None:
            return config_cls.from_pretrained(source, **given)
        return config_cls.create(**{**(defaults or {}), **given})
    except ValueError as error:
        raise ValueError(f"--optim_args: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--optim_args config={source}: {error}") from error


def config_in_use(trainer: Any) -> OptimizerConfig | None:
    """The config of a Trainer's optimizer, or of the one it will make; ``None`` for another's."""
    own = compat.own_optimizer(trainer.optimizer)
    if own is not None:
        return own.config
    if trainer.optimizer is None and trainer.args.optim in NAMES:
        return config_from_arguments(trainer.args)
    return None


def parse_pairs(text: str | None) -> dict[str, str]:
    """Split ``key=value,key=value``; white space around a key or a value is dropped.

    Raises:
        ValueError: naming the piece that is no ``key=value``, or a key that
            stands twice; or this is no string (a mapping out of a YAML file).
    """
    pairs: dict[str, str] = {}
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"--optim_args {text!r}: it is a {type(text).__name__} and must be one string, "
            "key=value,key=value."
        )
    if text is None or not text.strip():
        return pairs
    for piece in text.split(","):
        key, *rest = (part.strip() for part in piece.split("="))
        if len(rest) != 1 or not key or not rest[0]:
            shown = piece.strip() or "an empty piece (a comma too many)"
            raise ValueError(
                f"--optim_args {text!r}: {shown} is not of the form key=value; write "
                "key=value,key=value, and a pair of numbers with a colon (betas=0.9:0.99)."
            )
        if key in pairs:
            raise ValueError(f"--optim_args {text!r}: {key} stands twice; give it once.")
        pairs[key] = rest[0]
    return pairs


def _config_class(name: str) -> type[OptimizerConfig]:
    from hf_precond.registry import get_info

    return get_info(name).config_cls


def _check_own(config_cls: type[OptimizerConfig], own: Mapping[str, Any]) -> None:
    """Refuse values of the Trainer's own arguments by the names that these have there."""
    for field, value in own.items():
        try:
            config_cls.create(**{field: value})
        except ValueError as error:
            names = " and ".join(f"--{name}" for name in FOLLOWS[field])
            raise ValueError(f"{names}: {error}") from error


def _tell_unused(args: Any, config: OptimizerConfig, fields: list[str]) -> None:
    """Warn of an argument of the Trainer that was given and that ``--optim_args`` overrules."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for field in fields:
        for number, name in enumerate(FOLLOWS[field]):
            value, used = getattr(args, name), getattr(config, field)
            used = used if len(FOLLOWS[field]) == 1 else used[number]
            if value not in (used, defaults.get(name)):
                logger.warning(
                    "--%s %s is not used: --optim_args sets %s=%s.",
                    name, value, field, getattr(config, field),
                )
