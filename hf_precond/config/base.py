"""One frozen dataclass per optimizer: fields, legal ranges, parsing and JSON.

A config is plain data. It is validated when it is made, so that a value out of
range never reaches an optimizer, and it holds only what JSON can hold. Nothing
here imports torch before a dtype is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    import torch

ConfigT = TypeVar("ConfigT", bound="OptimizerConfig")
ValueT = TypeVar("ValueT")

_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_NONE = ("none", "null")
# What the Trainer and torch call some fields.
ALIASES = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "beta1", "beta2"), "betas"),
    **{"learning_rate": "lr", "adam_epsilon": "eps", "epsilon": "eps"},
}

TRAINERS = (
    *("max_grad_norm", "warmup_steps", "warmup_ratio", "lr_scheduler_type", "max_steps"),
    *("num_train_epochs", "gradient_accumulation_steps", "seed", "bf16", "fp16"),
)
"""Arguments of the Trainer that are no fields."""


def bounded(
    default: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """Declare a number, or a pair of numbers, between ``low`` and ``high``.

    Args:
        default: the field's default.
        low: least value.
        high: largest value.
        open_low: ``low`` itself is not legal.
        open_high: ``high`` itself is not legal.
    """
    return field(default=default, metadata={"bounds": (low, high, open_low, open_high)})


def positive(default: float) -> Any:
    """Declare a number greater than zero."""
    return bounded(default, 0.0, open_low=True)


def interval(default: int) -> Any:
    """Declare a number of steps: an integer of at least 1."""
    return bounded(default, 1)


def decay(default: Any) -> Any:
    """Declare the decay of a running average, in [0, 1)."""
    return bounded(default, 0.0, 1.0, open_high=True)


def one_of(*names: str) -> Any:
    """Declare one of ``names``, or ``None``, the default."""
    return field(default=None, metadata={"choices": names})


@dataclass(frozen=True)
class Removed:
    """What a field was that earlier releases had.

    A config, or a checkpoint that recorded it, with its default means what it meant, and is read
    without it; any other value shaped what was trained, and is refused.

    Args:
        default: the field's.
        last: the last release that has the field.
    """

    default: Any
    last: str

    def parse(self, text: str) -> Any:
        """The value that a text stands for, or the text where it stands for none.

        Args:
            text: as on the command line.
        """
        if isinstance(self.default, bool):
            return _WORDS.get(text.lower(), text)
        if self.default is None:
            return None if text.lower() in _NONE else text
        try:
            return type(self.default)(text)
        except ValueError:
            return text


class _Field:
    """The legal values of one field of a config, and how text becomes a value."""

    def __init__(
        self, owner: str, item: dataclasses.Field[Any], hint: Any, removed: Mapping[Any, str]
    ) -> None:
        self.owner, self.name, self.default = owner, item.name, item.default
        self.removed = removed
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if union else (hint,)
        self.kind = kinds[0]
        self.optional = type(None) in kinds
        literal = typing.get_origin(hint) is Literal
        self.choices = typing.get_args(hint) if literal else item.metadata.get("choices", ())
        self.bounds = item.metadata.get("bounds", (-math.inf, math.inf, True, True))
        pair = typing.get_origin(hint) is tuple
        self.size = len(typing.get_args(hint)) if pair else 0

    def legal(self) -> str:
        """The legal range in words."""
        optional = " or None" if self.optional else ""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices)) + optional
        if self.kind is bool:
            return "True or False" + optional.replace(" or", ", or")
        low, high, open_low, open_high = self.bounds
        kind = "an integer" if self.kind is int else "a number"
        if self.size:
            kind = "two numbers, each"
        left = f"{'(' if open_low else '['}{low:g}"
        right = "infinity)" if high == math.inf else f"{high:g}{')' if open_high else ']'}"
        return f"{kind} in {left}, {right}{optional}"

    def refusal(self, value: Any) -> ValueError:
        """The error for a value that is not legal."""
        near = difflib.get_close_matches(value, self.choices, n=1) if isinstance(value, str) else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        if isinstance(value, str) and value in self.removed:
            last = self.removed[value]
            hint = f" (hf_precond {last} is the last release that has {value!r}; docs/migration.md"
            hint += " says what to set instead)"
        if self.name == "lr" and value is None:
            hint = " (starting_lr() is None where nothing was pretrained: leave lr out)"
        return ValueError(
            f"{self.name}={value!r}: {self.owner} takes {self.legal()}{hint}; "
            f"the default is {self.default!r}."
        )

    def conform(self, value: Any) -> Any:
        """``value`` in the field's own type.

        Raises:
            ValueError: naming the legal range.
        """
        if self.choices and type(value).__name__ == "dtype":
            value = str(value).removeprefix("torch.")
        if value is None and self.optional:
            return None
        if self.choices:
            legal = value in self.choices
        elif self.kind is bool:
            legal = isinstance(value, bool)
        elif self.size:
            legal = isinstance(value, (tuple, list)) and len(value) == self.size
            legal = legal and all(map(self._in_bounds, value))
        else:
            legal = self._in_bounds(value)
        if not legal:
            raise self.refusal(value)
        if self.size:
            return tuple(map(float, value))
        return self.kind(value) if self.kind in (int, float) else value

    def _in_bounds(self, value: Any) -> bool:
        # Numbers of numpy too: grids and searches hand them over.
        number = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, number):
            return False
        low, high, open_low, open_high = self.bounds
        above = value > low if open_low else value >= low
        below = value < high if open_high or high == math.inf else value <= high
        return bool(above and below)

    def parse(self, text: str) -> Any:
        """The value that ``text`` stands for; its range is not checked.

        Raises:
            ValueError: the text is no value of the field's type.
        """
        if self.optional and text.lower() in _NONE:
            return None
        try:
            if self.kind is bool:
                return _WORDS[text.lower()]
            if self.size:
                return tuple(map(float, text.strip("()[]").replace(";", ":").split(":")))
            return text if self.choices else self.kind(text)
        except (KeyError, ValueError):
            raise self.refusal(text) from None


@dataclass(frozen=True)
class OptimizerConfig:
    """The fields that every optimizer has.

    Args:
        lr: learning rate of all parameter groups, >= 0. Default 0.001.
        weight_decay: decoupled weight decay of the groups that decay, >= 0.
            Default 0.
        head_lr_scale: learning rate of a newly initialised head over the
            body's, > 0. Default 1.
        head: how a newly initialised head (linear layers that the checkpoint
            lacked) is stepped: ``auto``, along AdamW's direction by steps that
            change its outputs by ``head_step`` whatever the learning rate is,
            times the schedule; ``lr``, as everything else, at the learning
            rate. A ``head_lr_scale`` other than 1, a group with an ``lr`` of
            its own and a training of the head alone mean ``lr``. Default
            ``auto``.
        head_step: root mean square change of a new head's outputs (logits), of
            what varies from token to token, that a step makes at the peak of
            the schedule, > 0. Default 0.04.
        layer_lr_decay: learning rate of a layer over that of the layer above
            it, in (0, 1]: with L layers, layer i (from 0) gets
            ``lr · decay^(L - i)``, embeddings ``lr · decay^(L + 1)``, and what
            stands above the layers, heads too, ``lr``. As BEiT and ELECTRA are
            fine-tuned. Default 1.
        betas: AdamW's decay rates of the first and second moment, each in
            [0, 1). Default 0.9 and 0.999.
        eps: AdamW's epsilon, >= 0. Default 1e-8.
        state_dtype: dtype in which Kronecker factors are kept between steps
            (``muon`` and ``sgdph`` have none): ``float32``, ``float64``,
            ``bfloat16``, under ``nkfac`` also ``float16`` (the others leave its
            range), or ``None``: float32, and float64 for float64 parameters.
            Default ``None``.
        skip_nonfinite: skip a step whose gradients are not all finite, as a
            loss scaler does: weights, moments and factors stay as they are.
            Such steps are counted as ``skipped_steps``; ten in a row stop
            training. Costs one pass over the gradients and one read from the
            device per step. Default ``False``.
        diagnostics: what the Trainer's logs show of the optimizer: ``auto``,
            the counters in every log, and once in 100 steps what must be
            computed for it; ``full``, all of it in every log; ``off``,
            nothing, and nothing is computed. Default ``auto``.

    Raises:
        ValueError: naming the field, its legal range and its default.
    """

    name: ClassVar[str] = ""
    layout: ClassVar[tuple[str, ...]] = ("state_dtype",)
    """Fields that decide which tensors the state has: a checkpoint is refused under others."""
    from_model: ClassVar[tuple[str, ...]] = ()
    """Those of them whose ``auto`` means what the model decides; a resumed training keeps that."""
    removed: ClassVar[Mapping[str, Removed]] = {}
    """Fields of earlier releases."""
    removed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Field to the values that it no longer has, each with the last release that has it."""

    lr: float = bounded(1e-3, 0.0)
    weight_decay: float = bounded(0.0, 0.0)
    head_lr_scale: float = positive(1.0)
    head: Literal["auto", "lr"] = "auto"
    head_step: float = positive(0.04)
    layer_lr_decay: float = bounded(1.0, 0.0, 1.0, open_low=True)
    betas: tuple[float, float] = decay((0.9, 0.999))
    eps: float = bounded(1e-8, 0.0)
    state_dtype: str | None = one_of("float32", "float64", "bfloat16", "float16")
    skip_nonfinite: bool = False
    diagnostics: Literal["auto", "full", "off"] = "auto"

    def __post_init__(self) -> None:
        for name, item in self._fields().items():
            object.__setattr__(self, name, item.conform(getattr(self, name)))

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """A pickle of an earlier release is read as its config file is."""
        for name, value in self._known(state).items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @classmethod
    @functools.cache
    def _fields(cls) -> dict[str, _Field]:
        hints = typing.get_type_hints(cls)
        return {
            item.name: _Field(
                cls.name, item, hints[item.name], cls.removed_values.get(item.name, {})
            )
            for item in dataclasses.fields(cls)
        }

    @classmethod
    def _known(cls, values: Mapping[str, ValueT]) -> dict[str, ValueT]:
        """Values without those of removed fields.

        Raises:
            ValueError: a name is no field, with the field that was probably meant; a removed
                field is not at its default.
        """
        gone = [name for name in values if name in cls.removed and name not in cls._fields()]
        cls._refuse_unknown(name for name in values if name not in gone)
        for name, value in ((name, values[name]) for name in gone):
            if value != cls.removed[name].default:
                raise ValueError(
                    f"{name}={value!r}: {cls.name} no longer has this field, and hf_precond "
                    f"{cls.removed[name].last} is the last release that has it; leave it out (that "
                    f"is {name}={cls.removed[name].default!r} there), or install that release."
                )
        return {name: value for name, value in values.items() if name not in gone}

    @classmethod
    def _refuse_unknown(cls, names: Iterable[str]) -> None:
        known = list(cls._fields())
        for name in [name for name in names if name not in known]:
            raise ValueError(
                f"{name}: {cls.name} has no such field{cls._hint(name)} Its fields are "
                f"{', '.join(known)}."
            )

    @classmethod
    def _hint(cls, name: str) -> str:
        """Where a name belongs that is no field: the field that was meant, or whose it is."""
        from hf_precond.registry import get_info, list_optimizers

        known, others = cls._fields(), []
        if name not in ALIASES:
            configs = {other: get_info(other).config_cls for other in list_optimizers()}
            others = [other for other, config in configs.items() if name in config._fields()]
        near = [ALIASES[name]] if name in ALIASES else []
        near = near or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
        if others:
            return f"; it is one of {' and '.join(others)}."
        if name in TRAINERS:
            return f"; the Trainer has it, as --{name}."
        return f"; did you mean {near[0]!r}?" if near else "."

    @classmethod
    def create(cls: type[ConfigT], **values: Any) -> ConfigT:
        """A config from keyword values.

        Args:
            **values: fields; the others have their defaults.

        Raises:
            ValueError: a value is not legal, or a name is no field (the
                message has the nearest field).
        """
        return cls(**cls._known(values))

    @classmethod
    def from_strings(cls: type[ConfigT], values: Mapping[str, str]) -> ConfigT:
        """A config from strings, as :meth:`parse` reads them.

        Args:
            values: field to text.
        """
        return cls.create(**cls.parse(values))

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> dict[str, Any]:
        """Turn strings into values of the fields' types; a pair is written ``0.9:0.99``.

        Args:
            values: field to text.

        Returns:
            Field to value, also of removed fields. The ranges are checked when a config is made.

        Raises:
            ValueError: a string is no value of its field's type, or a name is
                no field.
        """
        known: dict[str, _Field | Removed] = {**cls.removed, **cls._fields()}
        cls._refuse_unknown(name for name in values if name not in known)
        return {name: known[name].parse(str(text).strip()) for name, text in values.items()}

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """A config from what :meth:`to_dict` returned.

        Args:
            values: field to value; a list stands for a pair.

        Raises:
            ValueError: the values are another optimizer's, or not legal.
        """
        values = dict(values)
        name = values.pop("optimizer", cls.name)
        values.pop("hf_precond_version", None)
        if name != cls.name:
            raise ValueError(
                f"optimizer: this config is for {name!r}, and {cls.__name__} reads {cls.name!r}; "
                "use the config class of that optimizer."
            )
        return cls.create(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold.

        Returns:
            Field to value, and the optimizer's name under ``optimizer``.
        """
        values = dataclasses.asdict(self)
        return {"optimizer": self.name} | {
            k: list(v) if isinstance(v, tuple) else v for k, v in values.items()
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> str:
        """Write ``optimizer_config.json`` into a folder, as a whole or not at all.

        Args:
            save_directory: the folder; created if it does not exist.

        Returns:
            The file's path.
        """
        from hf_precond.config import hub

        return hub.save(self, save_directory)

    @classmethod
    def from_pretrained(
        cls: type[ConfigT],
        pretrained_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **fields: Any,
    ) -> ConfigT:
        """Read a config from a folder or from a repository on the Hub.

        The file is data: nothing in it is executed. Called on
        ``OptimizerConfig`` itself, it returns the config class of the optimizer
        that the file names.

        Args:
            pretrained_name_or_path: a folder that holds
                ``optimizer_config.json``, that file itself, or a repository's
                id on the Hub.
            revision: branch, tag or commit on the Hub.
            token: access token; ``None`` uses the one of ``hf auth login``.
            cache_dir: the Hub's cache folder.
            force_download: download even when cached.
            local_files_only: never ask the Hub.
            **fields: fields that replace the saved ones.

        Returns:
            The config.

        Raises:
            FileNotFoundError: there is no such folder, repository or file.
            ValueError: the file is no config, is of another optimizer, or has
                a field or value that is not legal.
        """
        from hf_precond.config import hub

        return hub.load(
            cls, pretrained_name_or_path, fields, revision=revision, token=token,
            cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only,
        )  # fmt: skip

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload optimizer config",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload ``optimizer_config.json`` to a repository on the Hub.

        Args:
            repo_id: ``user/name`` or ``name``; created if it does not exist.
            commit_message: message of the commit.
            private: make a new repository private.
            token: access token; ``None`` uses the one of ``hf auth login``.
            branch: branch to commit to, ``main`` by default.
            create_pr: open a pull request instead of committing.

        Returns:
            The commit's URL.
        """
        from hf_precond.config import hub

        return hub.push(
            self, repo_id, private, token,
            commit_message=commit_message, revision=branch, create_pr=create_pr,
        )  # fmt: skip

    def to_json(self) -> str:
        """The output of :meth:`to_dict` with the package's version, as JSON."""
        from hf_precond.config.hub import version

        return json.dumps(self.to_dict() | {"hf_precond_version": version()}, indent=2) + "\n"

    def replace(self: ConfigT, **values: Any) -> ConfigT:
        """The same config with some fields changed, validated again.

        Args:
            **values: the fields to change.

        Raises:
            ValueError: as :meth:`create`.
        """
        return dataclasses.replace(self, **self._known(values))

    @property
    def decays_everything(self) -> bool:
        """Whether biases and norms decay too, as in the authors' code (``reference=True``)."""
        return getattr(self, "reference", False)

    def factor_dtype(self, parameter_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the factors of a parameter are kept.

        Args:
            parameter_dtype: the parameter's dtype.
        """
        import torch

        from hf_precond.linalg.products import compute_dtype

        if self.state_dtype is not None:
            return getattr(torch, self.state_dtype)
        return compute_dtype(parameter_dtype)


# The config of any optimizer that was saved in a folder or on the Hub.
load_config = OptimizerConfig.from_pretrained
