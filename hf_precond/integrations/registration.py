"""The names of the optimizers under ``--optim``.

transformers is not imported for it: a module of transformers is changed as soon
as a script imports that module.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from hf_precond.compat import transformers_internals as internals
from hf_precond.compat.warn import warn
from hf_precond.registry import get_info, list_optimizers

if TYPE_CHECKING:
    from hf_precond.optimizers.base.optimizer import PrecondOptimizer


def register() -> None:
    """Make ``--optim`` of transformers accept the names of :func:`list_optimizers`.

    ``import hf_precond`` calls it. It may be called any number of times, before
    or after transformers is imported.

    Raises:
        RuntimeError: transformers is outside the supported range. Loops that
            call ``create_optimizer`` themselves work all the same.
    """
    version = internals.transformers_version()
    if not internals.is_supported(version):
        *names, last = list_optimizers()
        installed = "is not installed" if version is None else f"{version} is installed"
        raise RuntimeError(
            f"--optim {', '.join(names)} and {last} need {internals.SUPPORTED}, and transformers "
            f'{installed}; install one with `pip install "{internals.SUPPORTED}"`, or use '
            "hf_precond.create_optimizer(model, name) in a training loop of your own."
        )
    when_imported("transformers.training_args", _extend_arguments)
    when_imported("transformers.modelcard", _correct_model_card)
    when_imported("transformers.trainer", _extend_trainer)


def register_at_import() -> None:
    """Call :func:`register`, with a warning in place of the error."""
    try:
        register()
    except RuntimeError as error:
        warn(str(error), RuntimeWarning)


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action(module)`` as soon as a module is imported, now if it already is.

    Args:
        name: full name of the module.
        action: takes the module; the import raises what it raises.
    """
    if name in sys.modules:
        importlib.import_module(name)  # another thread may be in the middle of importing it
    wrapt.register_post_import_hook(action, name)


def optimizer_name(value: str) -> Any:
    """The member of ``OptimizerNames`` for a name; unpickling calls it.

    Args:
        value: one of :func:`list_optimizers`.
    """
    register()
    from transformers.training_args import OptimizerNames

    return OptimizerNames(value)


def look_up(args: Any, model: Any = None) -> tuple[type[PrecondOptimizer], dict[str, Any]]:
    """What ``Trainer.get_optimizer_cls_and_kwargs`` returns for one of the names.

    Args:
        args: the training arguments.
        model: the model that the optimizer is made for, if the caller names it.

    Returns:
        The class, which makes the optimizer from any parameter groups, and its
        keyword arguments: ``lr``, ``weight_decay``, ``betas``, ``eps``, the
        other fields that are not at their defaults, and ``attach_to``, the
        model. Without a model the optimizer is attached when training begins.
        Under ``reference=True``, whose biases and norms decay too, also
        ``optimizer_dict``, groups that do so.

    Raises:
        ValueError: under DeepSpeed, with several GPUs in one process
            (``nn.DataParallel``), and for bad ``--optim_args``.
    """
    from hf_precond.distributed import strategies
    from hf_precond.integrations.arguments import FOLLOWS, config_from_arguments, note_rate

    config = config_from_arguments(args, model, warn=True)
    note_rate(args, model, config)
    if internals.uses_deepspeed(args):
        raise ValueError(f"{config.name}: {strategies.DEEPSPEED}{strategies.INSTEAD}")
    if getattr(args, "n_gpu", 1) > 1:
        raise ValueError(f"{config.name}: {strategies.DATA_PARALLEL}{strategies.INSTEAD}")
    values: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in FOLLOWS or getattr(config, field.name) != field.default
    }
    if model is not None:
        values["attach_to"] = model
        if config.decays_everything:
            from hf_precond.architectures.groups import parameter_groups

            values["optimizer_dict"] = parameter_groups(model, config)
    return get_info(config.name).optimizer_cls, values


def _extend_arguments(module: ModuleType) -> None:
    from hf_precond.integrations.arguments import config_from_arguments

    internals.extend_enum(module, list_optimizers(), optimizer_name)
    internals.wrap_arguments(module, config_from_arguments)


def _correct_model_card(module: ModuleType) -> None:
    from hf_precond.integrations.model_card import correct_hyperparameters

    internals.wrap_model_card(module, correct_hyperparameters)


def _extend_trainer(module: ModuleType) -> None:
    from hf_precond.integrations.arguments import follow_steps
    from hf_precond.integrations.callback import PrecondCallback, during_training

    internals.wrap_lookup(module, look_up)
    internals.wrap_training(module, during_training)
    internals.wrap_scheduling(module, follow_steps)
    internals.add_default_callback(module, PrecondCallback)
