"""The optimizers' names under ``--optim``.

Nothing is imported for it: what must be done to a module of transformers is
done as soon as a script imports that module.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from hf_precond.compat import transformers_internals as internals
from hf_precond.registry import create_optimizer, list_optimizers


def register() -> None:
    """Makes ``--optim`` of transformers take the optimizers' names; ``import hf_precond`` does it.

    May be called any number of times, before or after transformers is
    imported.

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
    when_imported("transformers.training_args", _extend_enum)
    when_imported("transformers.modelcard", _correct_model_card)
    when_imported("transformers.trainer", _extend_trainer)


def register_at_import() -> None:
    """:func:`register`, with a warning in place of the error."""
    try:
        register()
    except RuntimeError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=3)


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls ``action(module)`` now if module ``name`` is imported, else when it has been.

    Args:
        name: full module name.
        action: takes the module; what it raises, the import raises.
    """
    if name in sys.modules:
        importlib.import_module(name)  # another thread may be in the middle of importing it
    wrapt.register_post_import_hook(action, name)


def optimizer_name(value: str) -> Any:
    """The member of ``OptimizerNames`` for one of the names; how a pickled one is restored."""
    register()
    from transformers.training_args import OptimizerNames

    return OptimizerNames(value)


class OptimizerFactory:
    """What the Trainer calls in place of an optimizer class: ``OptimizerFactory()(model, …)``."""

    def __call__(self, model: Any, *, args: Any, config: Any) -> Any:
        """The optimizer for a model, with the decay and no-decay groups of the Trainer's rule.

        Args:
            model: the model as the Trainer has it before ``accelerator.prepare``.
            args: the training arguments.
            config: the config.

        Raises:
            ValueError: under DeepSpeed, with several GPUs in one process
                (``nn.DataParallel``), and whatever ``create_optimizer`` refuses.
        """
        from hf_precond.distributed import strategies

        if internals.uses_deepspeed(args):
            raise ValueError(f"{config.name}: {strategies.DEEPSPEED}{strategies.INSTEAD}")
        if getattr(args, "n_gpu", 1) > 1:
            raise ValueError(f"{config.name}: {strategies.DATA_PARALLEL}{strategies.INSTEAD}")
        return create_optimizer(model, config)


def look_up(args: Any) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """A factory and its keyword arguments, for training arguments with one of the names."""
    from hf_precond.integrations.arguments import config_from_arguments

    return OptimizerFactory, {"args": args, "config": config_from_arguments(args, warn=True)}


def _extend_enum(module: ModuleType) -> None:
    internals.extend_enum(module, list_optimizers(), optimizer_name)


def _correct_model_card(module: ModuleType) -> None:
    from hf_precond.integrations.model_card import correct_hyperparameters

    internals.wrap_model_card(module, correct_hyperparameters)


def _extend_trainer(module: ModuleType) -> None:
    from hf_precond.integrations.callback import PrecondCallback

    internals.wrap_lookup(module, look_up)
    internals.add_default_callback(module, PrecondCallback)
