"""What the training loop tells the optimizer, and the other way round.

``PrecondCallback`` is among the default callbacks of every Trainer, and does
nothing unless the optimizer is one of this package's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from hf_precond.trainer import compat

# Prefix of the optimizer's diagnostics among the Trainer's logs.
PREFIX = "optim_"


def logged_diagnostics(optimizer: Any) -> dict[str, float]:
    """The optimizer's diagnostics under the names they have in the logs; empty for others'.

    Args:
        optimizer: any optimizer, wrapped or not, or ``None``.
    """
    own = compat.own_optimizer(optimizer)
    if own is None:
        return {}
    return {PREFIX + name: value for name, value in own.diagnostics().items()}


class PrecondCallback(TrainerCallback):
    """Early checks, hooks alive in training only, loss scale, skipped steps, logs, config files."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse bad ``--optim_args`` when the Trainer is made, not when training starts."""
        from hf_precond.trainer.arguments import config_from_arguments
        from hf_precond.trainer.names import NAMES

        if args.optim in NAMES:
            config_from_arguments(args)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Install the hooks that an earlier ``train()`` removed; write the config."""
        own = compat.own_optimizer(optimizer)
        if own is None:
            return
        if own.statistics is None and own.requests():
            own.attach(model)
        if args.should_save:
            own.config.save_pretrained(args.output_dir)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Tell the loss scale of the passes to come."""
        own = compat.own_optimizer(optimizer)
        if own is not None and own.statistics is not None:
            own.statistics.loss_scale = compat.loss_scale(optimizer)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Drop what was staged for a step that the loss scaler skipped."""
        own = compat.own_optimizer(optimizer)
        if own is None or own.statistics is None:
            return
        if getattr(optimizer, "step_was_skipped", False):
            own.statistics.drop()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the diagnostics to the training logs, before the reporting callbacks see them."""
        if logs is None or "loss" not in logs or any(key.startswith(PREFIX) for key in logs):
            return
        found = logged_diagnostics(optimizer)
        logs.update(found)
        if found and state.log_history:
            state.log_history[-1].update(found)

    def on_save(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Write the config beside the checkpoint that was just saved."""
        own = compat.own_optimizer(optimizer)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if own is not None and args.should_save and checkpoint.is_dir():
            own.config.save_pretrained(checkpoint)

    def on_train_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Remove the hooks: the trained model is left as it was given."""
        own = compat.own_optimizer(optimizer)
        if own is not None:
            own.close()
