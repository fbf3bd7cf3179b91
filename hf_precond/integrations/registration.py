"""The four names under ``--optim``.

Nothing is imported for it: what must be done to a module of transformers is
done when a script imports that module (see :mod:`hf_precond.integrations.import_hooks`).
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

from hf_precond.integrations.names import NAMES


def register() -> None:
    """Make ``--optim`` of transformers know this package's names; ``import hf_precond`` does it.

    May be called any number of times, before or after transformers is
    imported.

    Raises:
        RuntimeError: transformers is outside the supported range. Loops that
            call ``create_optimizer`` themselves work all the same.
    """
    from hf_precond.integrations import compat

    reason = compat.unsupported()
    if reason is not None:
        raise RuntimeError(reason)
    from hf_precond.integrations.import_hooks import when_imported

    when_imported("transformers.training_args", _extend_enum)
    when_imported("transformers.trainer_optimizer", _add_handlers)
    when_imported("transformers.modelcard", _correct_model_card)
    when_imported("transformers.trainer", _extend_trainer)


def register_at_import() -> None:
    """:func:`register`, with a warning in place of the error."""
    try:
        register()
    except RuntimeError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=3)


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
        from hf_precond.integrations import compat
        from hf_precond.registry import create_optimizer

        if compat.uses_deepspeed(args):
            raise ValueError(f"{config.name}: {strategies.DEEPSPEED}{strategies.INSTEAD}")
        if getattr(args, "n_gpu", 1) > 1:
            raise ValueError(f"{config.name}: {strategies.DATA_PARALLEL}{strategies.INSTEAD}")
        return create_optimizer(model, config)


def look_up(args: Any) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """A factory and its keyword arguments, for training arguments with one of the names."""
    from hf_precond.integrations.arguments import config_from_arguments

    return OptimizerFactory, {"args": args, "config": config_from_arguments(args, tell=True)}


def _handle(context: Any) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    return look_up(context.args)


def _extend_enum(module: ModuleType) -> None:
    from hf_precond.integrations import compat

    compat.extend_enum(module, NAMES, optimizer_name)


def _add_handlers(module: ModuleType) -> None:
    from hf_precond.integrations import compat

    compat.add_handlers(module, NAMES, _handle)


def _correct_model_card(module: ModuleType) -> None:
    from hf_precond.integrations import compat
    from hf_precond.integrations.model_card import correct_hyperparameters

    compat.wrap_model_card(module, correct_hyperparameters)


def _extend_trainer(module: ModuleType) -> None:
    from hf_precond.integrations import compat
    from hf_precond.integrations.callback import PrecondCallback

    compat.wrap_lookup(module, NAMES, look_up)
    compat.add_default_callback(module, PrecondCallback)
