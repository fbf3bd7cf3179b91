"""What the training loop tells the optimizer, and the other way round.

``PrecondCallback`` is among the default callbacks of every Trainer, and does
nothing unless the optimizer is one of this package's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from hf_precond.integrations import compat

# Prefix of the optimizer's diagnostics among the Trainer's logs.
PREFIX = "optim_"

logger = logging.getLogger(__name__)


def logged_diagnostics(optimizer: Any) -> dict[str, float]:
    """The optimizer's diagnostics under the names they have in the logs; empty for others'.

    What it tells of every layer, ``kind/layer``, is one line of the logs for all:
    the least ``entropy`` and ``entropy_min``, the largest of every other kind.

    Args:
        optimizer: any optimizer, wrapped or not, or ``None``.
    """
    own = compat.own_optimizer(optimizer)
    if own is None:
        return {}
    found: dict[str, list[float]] = {}
    for name, value in own.diagnostics().items():
        found.setdefault(PREFIX + name.partition("/")[0], []).append(value)
    return {name: _worst(name, values) for name, values in found.items()}


def _worst(name: str, values: Sequence[float]) -> float:
    """The least entropy, the largest of anything else; NaN where there is one."""
    if any(map(math.isnan, values)):
        return math.nan
    return min(values) if name.startswith(PREFIX + "entropy") else max(values)


def settings_of_checkpoint(own: Any) -> dict[str, Any]:
    """Fields that an optimizer has from its checkpoint and whose values its config gives otherwise.

    torch restores the parameter groups, learning rate and weight decay
    included, and the Trainer its schedule, whatever the new run says.

    Args:
        own: an optimizer of this package, whose state was loaded.
    """
    from hf_precond.architectures.parameters import DECAY, NO_DECAY

    # The body's groups by their names: a head has its own rate, others are a script's own.
    groups = [g for g in own.param_groups if g.get("name") in (DECAY, NO_DECAY)]
    found: dict[str, Any] = {}
    for group in groups:
        found |= {key: group[key] for key in ("betas", "eps", "momentum") if key in group}
        if "initial_lr" in group:  # set by a scheduler that counts from it
            found["lr"] = float(group["initial_lr"])
        if group["name"] == DECAY:
            found["weight_decay"] = group["weight_decay"]
    return {
        key: value
        for key, value in found.items()
        if hasattr(own.config, key) and getattr(own.config, key) != value
    }


class PrecondCallback(TrainerCallback):
    """Early checks, hooks alive in training only, loss scale, skipped steps, logs, config files."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse bad ``--optim_args`` when the Trainer is made, not when training starts."""
        from hf_precond.integrations.arguments import config_from_arguments
        from hf_precond.integrations.names import NAMES

        if args.optim in NAMES:
            config_from_arguments(args)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Install the hooks that an earlier ``train()`` removed; write the config in use."""
        own = compat.own_optimizer(optimizer)
        if own is None:
            return
        if own.statistics is None and own.requests():
            own.attach(model)
        kept = settings_of_checkpoint(own) if state.global_step else {}
        if kept and args.process_index == 0:
            logger.warning(
                "%s: the checkpoint's %s, not what this run asks for: resuming restores them; "
                "to change one, start a new run from the weights.",
                own.config.name, ", ".join(f"{key}={value}" for key, value in sorted(kept.items())),
            )
        if kept:
            own.config = own.config.replace(**kept)
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
