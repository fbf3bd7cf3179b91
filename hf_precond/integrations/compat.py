"""Every touch of a private name of transformers or accelerate.

transformers has no public way to add an optimizer's name, so four things are
changed from outside, each only where the feature is found:

- ``training_args.OptimizerNames`` gets a member per name, which makes
  ``TrainingArguments``, ``HfArgumentParser`` and ``--help`` accept it;
- ``trainer_optimizer._OPTIMIZER_HANDLERS`` gets a handler per name;
- ``Trainer.get_optimizer_cls_and_kwargs`` is wrapped, because the stock one
  splits a malformed ``--optim_args`` with an obscure error before any handler
  is asked, and because a transformers without the handler table needs it;
- ``modelcard.extract_hyperparameters_from_trainer`` is wrapped, because the
  stock one gives every name with "adam" in it Adam's description.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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


def unsupported() -> str | None:
    """Why the names cannot be registered, in one sentence; ``None`` when they can."""
    version = transformers_version()
    what = "is not installed" if version is None else f"{version} is installed"
    number = re.match(r"(\d+)\.(\d+)", version or "")
    if number and LOWEST <= (int(number[1]), int(number[2])) < BEYOND:
        return None
    return (
        f"--optim afopt, adamr, nkfac and sgdph need {SUPPORTED}, and transformers {what}; install "
        f'one with `pip install "{SUPPORTED}"`, or use hf_precond.create_optimizer(model, name) in '
        "a training loop of your own."
    )


def extend_enum(module: ModuleType, names: tuple[str, ...], restore: Callable[[str], Any]) -> None:
    """Add members to ``module.OptimizerNames``: ``AFOPT = "afopt"`` and so on.

    Args:
        module: ``transformers.training_args``.
        names: the values.
        restore: a module-level function that returns the member for a value.
            Members are pickled as a call of it, so that a process which has
            not imported this package does when it opens them (a spawned
            worker, ``training_args.bin``).
    """
    enum = module.OptimizerNames
    for value in names:
        if value in enum._value2member_map_:
            continue
        member = str.__new__(enum, value)
        member._name_ = value.upper()
        member._value_ = value
        member._sort_order_ = len(enum._member_names_)
        member.__objclass__ = enum
        member.__reduce_ex__ = functools.partial(_reduce, restore, value)
        enum._member_names_.append(member._name_)
        enum._member_map_[member._name_] = member
        enum._value2member_map_[value] = member
        type.__setattr__(enum, member._name_, member)


def _reduce(restore: Callable[[str], Any], value: str, protocol: int) -> tuple[Any, tuple[str]]:
    return restore, (value,)


def add_handlers(module: ModuleType, names: tuple[str, ...], handler: Callable[..., Any]) -> None:
    """Put ``handler(context)`` into the handler table, where there is one.

    Args:
        module: ``transformers.trainer_optimizer``.
        names: values of ``OptimizerNames``.
        handler: called with an ``OptimizerContext``, returns what
            ``Trainer.get_optimizer_cls_and_kwargs`` returns.
    """
    table = getattr(module, "_OPTIMIZER_HANDLERS", None)
    if table is not None:
        for name in names:
            table[module.OptimizerNames(name)] = handler


def wrap_lookup(
    module: ModuleType, names: tuple[str, ...], look_up: Callable[[Any], tuple[Any, dict[str, Any]]]
) -> None:
    """Send ``Trainer.get_optimizer_cls_and_kwargs`` to ``look_up(args)`` for ``names``.

    Args:
        module: ``transformers.trainer``.
        names: values of ``OptimizerNames``.
        look_up: takes the training arguments, returns a factory and its
            keyword arguments.
    """
    trainer = module.Trainer
    original = trainer.get_optimizer_cls_and_kwargs
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        return look_up(args) if args.optim in names else original(args, model)

    setattr(get_optimizer_cls_and_kwargs, _MARK, True)
    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)


def add_default_callback(module: ModuleType, callback: type) -> None:
    """Give every ``Trainer`` made from now on a callback, ahead of the reporting ones.

    Args:
        module: ``transformers.trainer``.
        callback: a ``TrainerCallback`` class.
    """
    if callback not in module.DEFAULT_CALLBACKS:
        module.DEFAULT_CALLBACKS.append(callback)


def wrap_model_card(module: ModuleType, correct: Callable[[Any, dict[str, Any]], None]) -> None:
    """Let ``correct(trainer, hyperparameters)`` change what the model card says.

    Args:
        module: ``transformers.modelcard``.
        correct: changes the dict in place.
    """
    original = getattr(module, "extract_hyperparameters_from_trainer", None)
    if original is None or getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def extract_hyperparameters_from_trainer(trainer: Any) -> dict[str, Any]:
        hyperparameters = original(trainer)
        correct(trainer, hyperparameters)
        return hyperparameters

    setattr(extract_hyperparameters_from_trainer, _MARK, True)
    module.extract_hyperparameters_from_trainer = (  # type: ignore[attr-defined]
        extract_hyperparameters_from_trainer
    )


def uses_deepspeed(args: Any) -> bool:
    """Whether training arguments ask for DeepSpeed."""
    return bool(getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None))


def own_optimizer(optimizer: Any) -> Any:
    """This package's optimizer under accelerate's wrapper, or ``None`` if it is another's."""
    base = sys.modules.get("hf_precond.optimizers.base.optimizer")
    if base is None:
        return None
    while not isinstance(optimizer, base.PrecondOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            return None
    return optimizer


def loss_scale(optimizer: Any) -> Tensor | float | None:
    """The loss scale of the passes before the coming step; ``None`` without a loss scaler.

    Args:
        optimizer: accelerate's wrapper, which holds the scaler.
    """
    from hf_precond.compat.torch_internals import loss_scale as scale_of

    return scale_of(getattr(optimizer, "scaler", None))
