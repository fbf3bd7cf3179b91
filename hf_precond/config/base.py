"""One frozen dataclass per optimizer: fields, legal ranges, parsing and JSON.

A config is plain data. It is validated when it is made, so a value that is
out of range never reaches an optimizer, and it holds only what JSON can hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch

from hf_precond.config.fields import (
    bounded,
    conform,
    decay,
    from_text,
    hints_of,
    one_of,
    positive,
    refuse_unknown,
)
from hf_precond.config.hub import HubMixin
from hf_precond.linalg.products import compute_dtype

ConfigT = TypeVar("ConfigT", bound="OptimizerConfig")

STATE_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class OptimizerConfig(HubMixin):
    """The fields every optimizer has.

    Args:
        lr: learning rate of all groups, > 0 or 0.
        weight_decay: decoupled weight decay of the decay group, >= 0.
        head_lr_scale: learning rate of a newly initialised head over the
            body's, > 0.
        betas: decay rates of the AdamW rule's two moments, each in [0, 1).
        eps: the AdamW rule's epsilon, >= 0.
        state_dtype: dtype of the Kronecker factors kept between steps (``sgdph``
            has none): ``float32``, ``float64``, ``bfloat16``, under ``nkfac``
            ``float16`` (others leave its range); ``None`` is float32, and
            float64 for float64 parameters.
        skip_nonfinite: leave a step out whose gradients are not all finite,
            as a loss scaler does: weights, moments and factors stay as they
            are (counted as ``skipped_steps``; ten in a row stop training).
            It costs one pass over the gradients and one reading from the
            device a step.

    Raises:
        ValueError: naming the field, its legal range and, for an unknown
            field, the nearest legal one.
    """

    name: ClassVar[str] = ""
    layout: ClassVar[tuple[str, ...]] = ("state_dtype",)
    """Fields that decide which tensors the state has: a checkpoint is refused under others."""

    lr: float = bounded(1e-3, 0.0)
    weight_decay: float = bounded(0.0, 0.0)
    head_lr_scale: float = positive(1.0)
    betas: tuple[float, float] = decay((0.9, 0.999))
    eps: float = bounded(1e-8, 0.0)
    state_dtype: str | None = one_of(*STATE_DTYPES)
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for item in fields(self):
            value = conform(type(self), item, hints[item.name], getattr(self, item.name))
            object.__setattr__(self, item.name, value)

    @classmethod
    def create(cls: type[ConfigT], **values: Any) -> ConfigT:
        """A config from keyword values, unknown names refused with the nearest legal one."""
        for key in values:
            refuse_unknown(cls, key)
        return cls(**values)

    @classmethod
    def from_strings(cls: type[ConfigT], values: Mapping[str, str]) -> ConfigT:
        """A config from ``key=value`` strings, as ``--optim_args`` hands them over."""
        return cls.create(**cls.parse(values))

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> dict[str, Any]:
        """Turn strings into the fields' types; a pair is written ``0.9:0.99``."""
        hints = hints_of(cls)
        parsed: dict[str, Any] = {}
        for key, text in values.items():
            refuse_unknown(cls, key)
            parsed[key] = from_text(cls, key, hints[key], str(text).strip())
        return parsed

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """A config from :meth:`to_dict`'s output, lists standing for pairs."""
        values = dict(values)
        name = values.pop("optimizer", cls.name)
        values.pop("hf_precond_version", None)
        if name != cls.name:
            raise ValueError(
                f"optimizer: this config is for {name!r}, and {cls.__name__} reads {cls.name!r}; "
                "use the config class of that optimizer."
            )
        return cls.create(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with the optimizer's name under ``optimizer``."""
        values = dataclasses.asdict(self)
        return {"optimizer": self.name} | {
            k: list(v) if isinstance(v, tuple) else v for k, v in values.items()
        }

    def replace(self: ConfigT, **values: Any) -> ConfigT:
        """The same config with some fields changed, validated again."""
        for key in values:
            refuse_unknown(type(self), key)
        return dataclasses.replace(self, **values)

    def factor_dtype(self, parameter_dtype: torch.dtype) -> torch.dtype:
        """The dtype of kept factors for a parameter of ``parameter_dtype``."""
        if self.state_dtype is not None:
            return STATE_DTYPES[self.state_dtype]
        return compute_dtype(parameter_dtype)


# The config saved in a folder or on the Hub, in the class that its "optimizer" names.
load_config = OptimizerConfig.from_pretrained
