"""Private names of transformers, read in 5.4.0 to 5.23.0.

transformers has no public way to add an optimizer's name, so these things are
changed from outside:

- ``training_args.OptimizerNames`` gets a member per name, which makes
  ``TrainingArguments``, ``HfArgumentParser`` and ``--help`` accept it;
- ``training_args.TrainingArguments.__post_init__`` is wrapped, so that bad
  ``--optim_args`` are refused before a script loads data and a model;
- ``Trainer.get_optimizer_cls_and_kwargs`` is wrapped. That works whatever it
  looks up (a table of handlers since 5.2), and comes before its parsing of
  ``--optim_args``, whose errors are obscure;
- ``trainer.Trainer.train`` is wrapped, so that the calls of ``compute_loss``
  are seen;
- ``trainer.Trainer.create_scheduler`` is wrapped, which is the first that hears
  of the steps where a script or a smaller batch size decides them;
- ``trainer.DEFAULT_CALLBACKS`` gets a callback;
- ``modelcard.extract_hyperparameters_from_trainer`` is wrapped, because it
  describes every optimizer with "adam" in its name as Adam.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import metadata
from types import ModuleType
from typing import Any

LOWEST, BEYOND = (5, 4), (6, 0)
SUPPORTED = "transformers>=5.4,<6"

_MARK = "_hf_precond"


def transformers_version() -> str | None:
    """The version of transformers, without importing it; ``None`` when it is not installed."""
    module = sys.modules.get("transformers")
    if module is not None and isinstance(getattr(module, "__version__", None), str):
        return module.__version__
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


def is_supported(version: str | None) -> bool:
    """Whether a version of transformers is in the supported range.

    Args:
        version: the version; ``None`` where transformers is not installed.
    """
    number = re.match(r"(\d+)\.(\d+)", version or "")
    return number is not None and LOWEST <= (int(number[1]), int(number[2])) < BEYOND


def extend_enum(module: ModuleType, names: Iterable[str], restore: Callable[[str], Any]) -> None:
    """Add members to ``module.OptimizerNames``: ``AFOPT = "afopt"`` and so on.

    A value that transformers already has stays as it is.

    Args:
        module: ``transformers.training_args``.
        names: the values.
        restore: a module-level function that returns the member for a value.
            Members are pickled as a call of it, so that a process that
            unpickles them (a spawned worker; ``training_args.bin``) imports
            this package.
    """
    enum = module.OptimizerNames
    names = list(names)
    for value in names:
        if value in enum._value2member_map_:
            continue
        member = str.__new__(enum, value)
        member._name_ = value.upper()
        member._value_ = value
        member._sort_order_ = len(enum._member_names_)
        member.__objclass__ = enum
        member.__reduce_ex__ = functools.partial(_reduce, restore, value)
        setattr(member, _MARK, True)
        enum._member_names_.append(member._name_)
        enum._member_map_[member._name_] = member
        enum._value2member_map_[value] = member
        type.__setattr__(enum, member._name_, member)
    _suggest(enum, names)


def _suggest(enum: Any, names: Iterable[str]) -> None:
    """Let the error for an unknown value name the added one that is nearest."""
    original = enum._missing_
    if hasattr(original, _MARK):
        return

    def _missing_(cls: Any, value: Any) -> Any:
        near = difflib.get_close_matches(str(value).lower(), names, n=1)
        if near:
            raise ValueError(
                f"{value} is not a valid {cls.__name__}: --optim has no such name; did you mean "
                f"{near[0]!r}?"
            )
        return original(value)

    setattr(_missing_, _MARK, True)
    enum._missing_ = classmethod(_missing_)


def _reduce(restore: Callable[[str], Any], value: str, protocol: int) -> tuple[Any, tuple[str]]:
    return restore, (value,)


def is_added(member: Any) -> bool:
    """Whether :func:`extend_enum` added a member of ``OptimizerNames``.

    Args:
        member: the member.
    """
    return hasattr(member, _MARK)


def has_added(args: Any) -> bool:
    """Whether training arguments have one of the added optimizers.

    A plain string, which a script may have set since, becomes the member.

    Args:
        args: training arguments; other packages' may have no ``optim``.
    """
    optim = getattr(args, "optim", None)
    if type(optim) is str and "transformers.training_args" in sys.modules:
        known = sys.modules["transformers.training_args"].OptimizerNames._value2member_map_
        if is_added(known.get(optim)):
            args.optim = optim = known[optim]
    return is_added(optim)


def wrap_arguments(module: ModuleType, check: Callable[[Any], object]) -> None:
    """Call ``check(args)`` when ``TrainingArguments`` with one of the added names are made.

    Args:
        module: ``transformers.training_args``.
        check: takes the training arguments; they are refused by what it raises.
    """
    original = module.TrainingArguments.__post_init__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        # A class that goes on from here may still complete its arguments.
        if has_added(self) and type(self).__post_init__ is __post_init__:
            check(self)

    setattr(__post_init__, _MARK, True)
    module.TrainingArguments.__post_init__ = __post_init__


def wrap_lookup(
    module: ModuleType, look_up: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
) -> None:
    """Let ``look_up`` answer ``Trainer.get_optimizer_cls_and_kwargs`` for added names.

    Args:
        module: ``transformers.trainer``.
        look_up: takes the training arguments and the model or ``None``, returns
            an optimizer class and its keyword arguments.
    """
    trainer = module.Trainer
    original = trainer.get_optimizer_cls_and_kwargs
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        return look_up(args, model) if has_added(args) else original(args, model)

    setattr(get_optimizer_cls_and_kwargs, _MARK, True)
    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)


def wrap_training(
    module: ModuleType, during: Callable[[Any], AbstractContextManager[None]]
) -> None:
    """Run ``Trainer.train`` inside a context.

    Args:
        module: ``transformers.trainer``.
        during: takes the Trainer, returns the context.
    """
    original = module.Trainer.train
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        with during(self):
            return original(self, *args, **kwargs)

    setattr(train, _MARK, True)
    module.Trainer.train = train


def wrap_scheduling(module: ModuleType, before: Callable[[Any, int], None]) -> None:
    """Call ``before(trainer, steps)`` where ``Trainer.create_scheduler`` makes a schedule.

    Args:
        module: ``transformers.trainer``.
        before: takes the Trainer, which has an optimizer, and the steps of the schedule.
    """
    original = module.Trainer.create_scheduler
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_scheduler(self: Any, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self.lr_scheduler is None:
            before(self, num_training_steps)
        return original(self, num_training_steps, *args, **kwargs)

    setattr(create_scheduler, _MARK, True)
    module.Trainer.create_scheduler = create_scheduler


def add_default_callback(module: ModuleType, callback: type) -> None:
    """Add a callback to every ``Trainer`` made from now on, before the reporting ones.

    Args:
        module: ``transformers.trainer``.
        callback: a ``TrainerCallback`` class.
    """
    if callback not in module.DEFAULT_CALLBACKS:
        module.DEFAULT_CALLBACKS.append(callback)


def wrap_model_card(module: ModuleType, correct: Callable[[Any, dict[str, Any]], None]) -> None:
    """Let ``correct(trainer, hyperparameters)`` change the hyperparameters in model cards.

    Args:
        module: ``transformers.modelcard``.
        correct: changes the dictionary in place.
    """
    name = "extract_hyperparameters_from_trainer"
    original = getattr(module, name, None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def extract_hyperparameters_from_trainer(trainer: Any) -> dict[str, Any]:
        hyperparameters = original(trainer)
        correct(trainer, hyperparameters)
        return hyperparameters

    setattr(extract_hyperparameters_from_trainer, _MARK, True)
    setattr(module, name, extract_hyperparameters_from_trainer)


def uses_deepspeed(args: Any) -> bool:
    """Whether training arguments ask for DeepSpeed.

    Args:
        args: the training arguments.
    """
    return bool(getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None))


def was_loaded(parameter: Any) -> bool:
    """Whether ``from_pretrained`` found a parameter in the checkpoint.

    It marks those that it did not have to initialise. A model from a config alone has no marks, nor
    has a deep copy.

    Args:
        parameter: of a model.
    """
    return bool(getattr(parameter, "_is_hf_initialized", False))


def mark_loaded(parameters: Iterable[Any]) -> None:
    """Mark parameters as ``from_pretrained`` marks those that it found in the checkpoint.

    Args:
        parameters: of a model.
    """
    for parameter in parameters:
        parameter._is_hf_initialized = True
