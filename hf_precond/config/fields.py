"""Fields of a config: their bounds, what may stand in them, and how text becomes a value."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import types
import typing
from dataclasses import field, fields
from typing import Any, Literal, Union

import torch

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_NONE = {"none", "null"}

# What the Trainer and torch call some fields.
_ALIASES = {
    "learning_rate": "lr",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "adam_epsilon": "eps",
    "epsilon": "eps",
}


def bounded(
    default: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """A field whose number (or whose pair of numbers) lies between ``low`` and ``high``."""
    return field(default=default, metadata={"bounds": (low, high, open_low, open_high)})


def positive(default: float) -> Any:
    """A field whose number is greater than zero."""
    return bounded(default, 0.0, open_low=True)


def interval(default: int) -> Any:
    """A field that counts steps: an integer of at least 1."""
    return bounded(default, 1)


def decay(default: Any) -> Any:
    """A field in [0, 1): the decay of a running average."""
    return bounded(default, 0.0, 1.0, open_high=True)


def one_of(*names: str) -> Any:
    """A field that takes one of ``names``, or ``None``, its default."""
    return field(default=None, metadata={"choices": names})


def hints_of(cls: type) -> dict[str, Any]:
    """Field name to type."""
    return typing.get_type_hints(cls)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(item: dataclasses.Field[Any], hint: Any) -> tuple[str, ...] | None:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return item.metadata.get("choices")


def _legal(item: dataclasses.Field[Any], hint: Any) -> str:
    """The legal range of a field in words."""
    choices = _choices(item, hint)
    optional = " or None" if type(None) in _alternatives(hint) else ""
    if choices:
        return "one of " + ", ".join(map(repr, choices)) + optional
    if hint is bool:
        return "True or False"
    low, high, open_low, open_high = item.metadata["bounds"]
    kind = "an integer" if hint is int else "a number"
    if typing.get_origin(hint) is tuple:
        kind = "two numbers, each"
    left = f"{'(' if open_low else '['}{low:g}"
    right = "infinity)" if high == math.inf else f"{high:g}{')' if open_high else ']'}"
    return f"{kind} in {left}, {right}{optional}"


def refuse_unknown(cls: type[Any], key: str) -> None:
    """Refuse a name that is no field, with the one that was probably meant.

    Raises:
        ValueError: ``key`` is no field of ``cls``.
    """
    names = [item.name for item in fields(cls)]
    if key in names:
        return
    near = [_ALIASES[key]] if key in _ALIASES else []
    near = near or difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"{key}: {cls.name} has no such field{hint} Its fields are {', '.join(names)}."
    )


def conform(
    cls: type[Any], item: dataclasses.Field[Any], hint: Any, value: Any
) -> Any:
    """``value`` in the field's own type, or a ValueError that names the legal range."""

    def refuse() -> ValueError:
        near = ""
        choices = _choices(item, hint)
        if choices and isinstance(value, str):
            match = difflib.get_close_matches(value, choices, n=1)
            near = f" (did you mean {match[0]!r}?)" if match else ""
        return ValueError(
            f"{item.name}={value!r}: {cls.name} takes {_legal(item, hint)}{near}; "
            f"the default is {item.default!r}."
        )

    if item.name == "state_dtype" and isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if value is None and type(None) in _alternatives(hint):
        return None
    choices = _choices(item, hint)
    if choices:
        if value not in choices:
            raise refuse()
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise refuse()
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)) or len(value) != len(typing.get_args(hint)):
            raise refuse()
        if not all(_in_bounds(v, item, float) for v in value):
            raise refuse()
        return tuple(float(v) for v in value)
    if not _in_bounds(value, item, hint):
        raise refuse()
    return int(value) if hint is int else float(value)


def _in_bounds(value: Any, item: dataclasses.Field[Any], kind: Any) -> bool:
    # numpy's numbers too: grids and searches hand them over.
    if isinstance(value, bool) or not isinstance(
        value, numbers.Integral if kind is int else numbers.Real
    ):
        return False
    low, high, open_low, open_high = item.metadata["bounds"]
    above = value > low if open_low else value >= low
    below = value < high if open_high or high == math.inf else value <= high
    return above and below


def from_text(cls: type[Any], key: str, hint: Any, text: str) -> Any:
    item = next(f for f in fields(cls) if f.name == key)
    refusal = ValueError(
        f"{key}={text!r}: {cls.name} takes {_legal(item, hint)}; the default is {item.default!r}."
    )
    if type(None) in _alternatives(hint) and text.lower() in _NONE:
        return None
    if hint is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise refusal
        return text.lower() in _TRUE
    if _choices(item, hint):
        return text
    try:
        if typing.get_origin(hint) is tuple:
            return tuple(float(part) for part in text.strip("()[]").replace(";", ":").split(":"))
        return int(text) if hint is int else float(text)
    except ValueError:
        raise refusal from None
