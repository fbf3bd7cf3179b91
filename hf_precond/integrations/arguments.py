"""From ``TrainingArguments`` to a config, and the config that a Trainer uses.

Precedence: ``--optim_args``, then the Trainer's own arguments, then the
config's defaults.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from hf_precond.compat.transformers_internals import has_added
from hf_precond.config.base import OptimizerConfig
from hf_precond.registry import get_info

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

CONFIG_KEY = "config"

# Field -> the Trainer's arguments that it follows.
FOLLOWS = {
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
}


STARTING_LR = (
    "%s: the learning rate was left at the Trainer's %g; training starts at %g instead, which "
    "follows from the pretrained weights and a training of %s steps. Set --learning_rate, or "
    "--optim_args lr=%g for the Trainer's."
)
SAVED_LR = "--optim_args config=%s sets the learning rate: lr=%s. For another write lr=… beside it."


IN_TRAINING: ContextVar[Any] = ContextVar("IN_TRAINING", default=None)
"""The Trainer whose ``train`` runs; transformers asks for an optimizer without naming it."""


def training_state(args: Any) -> Any:
    """The state of the Trainer that trains with these arguments; ``None`` where none does.

    Args:
        args: the training arguments.
    """
    trainer = IN_TRAINING.get()
    return trainer.state if getattr(trainer, "args", None) is args else None


def planned_steps(args: Any) -> int | None:
    """Optimizer steps of the whole training; ``None`` where they are not known yet.

    Args:
        args: the training arguments.
    """
    state = training_state(args)
    steps = int(args.max_steps if args.max_steps > 0 else getattr(state, "max_steps", 0))
    return steps if steps > 0 else None


def config_from_arguments(
    args: Any, model: nn.Module | None = None, *, warn: bool = False
) -> OptimizerConfig:
    """The config given by ``--optim``, ``--optim_args`` and the Trainer's own arguments.

    A learning rate that nobody has set follows from the pretrained weights and the number of
    steps (:func:`~hf_precond.architectures.pretrained.starting_lr`).

    Args:
        args: ``TrainingArguments`` whose ``optim`` is a name of this package.
        model: the model that is trained, where it is known.
        warn: say, on the first rank, which learning rate was chosen, and warn of
            an argument of the Trainer that was given and that ``--optim_args``
            overrules.

    Returns:
        The config.

    Raises:
        ValueError: ``--optim_args`` is malformed, or a field or value in it or
            in the Trainer's arguments is not legal.
        FileNotFoundError: ``config=`` names no config.
    """
    config_cls = get_info(args.optim.value).config_cls
    pairs = parse_pairs(args.optim_args)
    own: dict[str, Any] = {}
    for field, names in FOLLOWS.items():
        if field in pairs or CONFIG_KEY in pairs:
            continue
        values = tuple(getattr(args, name) for name in names)
        own[field] = values if len(values) > 1 else values[0]
        if field == "lr" and model is not None and lr_is_unset(args):
            own[field] = _starting_lr(args, model, planned_steps(args), warn)
        try:
            config_cls.create(**{field: own[field]})
        except ValueError as error:
            options = " and ".join(f"--{name}" for name in names)
            raise ValueError(f"{options}: {error}") from error
    config = config_from_pairs(config_cls, pairs, own)
    if warn and args.process_index == 0:
        _warn_of_unused(args, config, pairs)
    return config


def lr_is_unset(args: Any) -> bool:
    """Whether the learning rate is the one that ``TrainingArguments`` have by themselves.

    A class of arguments with a default of its own has chosen one, and so has who named
    ``--learning_rate`` on the command line.

    Args:
        args: the training arguments.
    """
    named = any(re.match(r"--learning[_-]rate\b", word) for word in sys.argv)
    defaults = {
        field.default
        for cls in type(args).__mro__
        if dataclasses.is_dataclass(cls)
        for field in dataclasses.fields(cls)
        if field.name == "learning_rate"
    }
    return not named and defaults == {args.learning_rate}


def lr_follows(args: Any) -> bool:
    """Whether the learning rate is left to what follows from the weights.

    Args:
        args: the training arguments.
    """
    pairs = parse_pairs(args.optim_args)
    return lr_is_unset(args) and not {"lr", CONFIG_KEY} & pairs.keys()


Rate = tuple[ReferenceType[Any], float, int | None]
RATES: WeakKeyDictionary[nn.Module, dict[int, Rate]] = WeakKeyDictionary()
"""Model -> ``id`` of training arguments -> these, the rate that followed from the weights when an
optimizer was last made by them, and the steps."""


def note_rate(args: Any, model: nn.Module | None, config: OptimizerConfig) -> None:
    """Note that a rate follows from weights and steps, for :func:`follow_steps`.

    Args:
        args: the training arguments.
        model: the model, where it is known.
        config: with the rate.
    """
    if model is not None and lr_follows(args):
        RATES.setdefault(model, {})[id(args)] = ref(args), config.lr, planned_steps(args)


def follow_steps(trainer: Any, steps: int) -> None:
    """Let the rate of an optimizer that a schedule is about to be made for follow the steps.

    It was made for other steps under ``auto_find_batch_size``, whose smaller batches take more, and
    where a script makes it before training or names the steps itself.

    Args:
        trainer: the Trainer.
        steps: of the schedule.
    """
    from hf_precond.architectures.pretrained import counted_steps, starting_lr

    own, args = own_optimizer(trainer.optimizer), trainer.args
    model = None if own is None else own.structure.model
    if own is None or model is None or not lr_follows(args):
        return
    made_by, rate, planned = RATES.get(model, {}).get(id(args), (None, None, None))
    if made_by is None or made_by() is not args or own.common_lr != rate:
        return
    if counted_steps(planned) == counted_steps(steps):
        return
    lr = starting_lr(model, steps)
    if lr in (None, rate):  # parameters that were sharded since do not tell
        return
    if own.change_lr(lr):
        RATES[model][id(args)] = made_by, lr, steps
        _announce(args, lr, steps)


def _starting_lr(args: Any, model: nn.Module, steps: int | None, warn: bool) -> float:
    """The rate that follows from weights and steps, the Trainer's own where none does."""
    from hf_precond.architectures.pretrained import starting_lr

    found = starting_lr(model, steps)
    if found is None:
        return args.learning_rate
    if warn:
        _announce(args, found, steps)
    return found


def _announce(args: Any, rate: float, steps: int | None) -> None:
    """Say which rate follows from weights and steps."""
    # The scheduler and the groups of a training that is resumed bring their own rate.
    resumes = getattr(training_state(args), "global_step", 0) > 0
    if not resumes and args.process_index == 0:
        given, length = args.learning_rate, steps or "300 or more"
        logger.warning(STARTING_LR, args.optim.value, given, rate, length, given)


def config_from_pairs(
    config_cls: type[OptimizerConfig],
    pairs: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
) -> OptimizerConfig:
    """A config from ``key=value`` pairs.

    Args:
        config_cls: the optimizer's config class.
        pairs: field to text, as :func:`parse_pairs` returns them; ``config``
            names a saved config to start from.
        defaults: values of fields that are neither in the pairs nor in a saved
            config.

    Returns:
        The config.

    Raises:
        ValueError, FileNotFoundError: as :func:`config_from_arguments`.
    """
    texts = dict(pairs)
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


def parse_pairs(text: str | None) -> dict[str, str]:
    """Split ``key=value,key=value``.

    Args:
        text: the pairs; white space around a key or a value is dropped.

    Returns:
        Key to text; empty for ``None``.

    Raises:
        ValueError: a piece is no ``key=value``, a key is given twice, or
            ``text`` is no string (a mapping out of a YAML file).
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


def _warn_of_unused(args: Any, config: OptimizerConfig, pairs: Mapping[str, str]) -> None:
    """Warn of given arguments of the Trainer that ``--optim_args`` overrules.

    A saved config's learning rate is told also where ``--learning_rate`` has its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for field, names in FOLLOWS.items():
        saved = field not in pairs and CONFIG_KEY in pairs
        if field not in pairs and not saved:
            continue
        source = f" {CONFIG_KEY}={pairs[CONFIG_KEY]}" if saved else ""
        used = getattr(config, field)
        values = used if isinstance(used, tuple) else (used,)
        for name, value in zip(names, values, strict=True):
            legal = {value} if saved and field == "lr" else {value, defaults.get(name)}
            if getattr(args, name) in legal:
                continue
            if saved and field == "lr" and lr_is_unset(args):
                logger.warning(SAVED_LR, pairs[CONFIG_KEY], used)
            else:
                logger.warning(
                    "--%s %s is not used: --optim_args%s sets %s=%s.",
                    name, getattr(args, name), source, field, used,
                )  # fmt: skip


def own_optimizer(optimizer: Any) -> Any:
    """The optimizer of this package inside accelerate's wrapper.

    Args:
        optimizer: any optimizer, wrapped or not, or ``None``.

    Returns:
        The optimizer; ``None`` if it is of another package.
    """
    base = sys.modules.get("hf_precond.optimizers.base.optimizer")
    if base is None:  # no optimizer of this package was made
        return None
    while not isinstance(optimizer, base.PrecondOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            return None
    return optimizer


def config_in_use(trainer: Any) -> OptimizerConfig | None:
    """The config of the optimizer that a Trainer has or will create.

    Before a training whose steps follow from epochs, a rate that follows from the weights is that
    of 300 steps or more.

    Args:
        trainer: any ``Trainer``.

    Returns:
        The config; ``None`` with an optimizer of another package.
    """
    own = own_optimizer(trainer.optimizer)
    if own is not None:
        return own.config
    if trainer.optimizer is None and has_added(trainer.args):
        return config_from_arguments(trainer.args, trainer.model)
    return None
