"""What the training loop and the optimizer tell each other.

``PrecondCallback`` is among the default callbacks of every Trainer, and does
nothing unless the optimizer is one of this package's.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from hf_precond.compat.transformers_internals import is_added
from hf_precond.integrations.arguments import config_from_arguments, own_optimizer

# Prefix of the optimizer's diagnostics among the Trainer's logs.
PREFIX = "optim_"

logger = logging.getLogger(__name__)


def logged_diagnostics(optimizer: Any) -> dict[str, float]:
    """The optimizer's diagnostics under the names they have in the logs; empty for others'.

    What there is of every layer, ``kind/layer``, is one line of the logs for all
    of them: the least ``entropy`` and ``entropy_min``, the largest of every other
    kind, NaN where there is one.

    Args:
        optimizer: any optimizer, wrapped or not, or ``None``.
    """
    own = own_optimizer(optimizer)
    if own is None:
        return {}
    by_kind: dict[str, list[float]] = {}
    for name, value in own.diagnostics().items():
        by_kind.setdefault(name.partition("/")[0], []).append(value)
    worst = {}
    for kind, values in by_kind.items():
        extreme = min if kind.startswith("entropy") else max
        worst[PREFIX + kind] = math.nan if any(map(math.isnan, values)) else extreme(values)
    return worst


def restored_settings(own: Any) -> dict[str, Any]:
    """Fields that an optimizer has from its checkpoint and whose values its config gives otherwise.

    torch restores the parameter groups, learning rate and weight decay
    included, and the Trainer its schedule, whatever the new run says.

    Args:
        own: an optimizer of this package, whose state was loaded.
    """
    from hf_precond.architectures.parameters import DECAY, NO_DECAY

    restored: dict[str, Any] = {}
    for group in own.param_groups:
        # The body's groups by their names: a head has its own rate, others are a script's own.
        if group.get("name") not in (DECAY, NO_DECAY):
            continue
        restored |= {key: group[key] for key in ("betas", "eps", "momentum") if key in group}
        if "initial_lr" in group:  # set by a scheduler that counts from it
            restored["lr"] = float(group["initial_lr"])
        if group["name"] == DECAY:
            restored["weight_decay"] = group["weight_decay"]
    return {
        key: value
        for key, value in restored.items()
        if hasattr(own.config, key) and getattr(own.config, key) != value
    }


class PrecondCallback(TrainerCallback):
    """Early checks, hooks alive in training only, loss scale, skipped steps, logs, config files."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses bad ``--optim_args`` when the Trainer is made, not when training starts."""
        if is_added(args.optim):
            config_from_arguments(args)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Installs the hooks that an earlier ``train()`` removed; writes the config in use."""
        own = own_optimizer(optimizer)
        if own is None:
            return
        if own.statistics is None and own.requests():
            own.attach(model)
        restored = restored_settings(own) if state.global_step else {}
        if restored:
            own.config = own.config.replace(**restored)
        if restored and args.process_index == 0:
            logger.warning(
                "%s: the checkpoint's %s, not what this run asks for: resuming restores them; "
                "to change one, start a new run from the weights.",
                own.config.name,
                ", ".join(f"{key}={value}" for key, value in sorted(restored.items())),
            )
        if args.should_save:
            own.config.save_pretrained(args.output_dir)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Sets the loss scale of the passes to come, from the scaler in accelerate's wrapper."""
        from hf_precond.compat.torch_internals import loss_scale

        own = own_optimizer(optimizer)
        if own is not None and own.statistics is not None:
            own.statistics.loss_scale = loss_scale(getattr(optimizer, "scaler", None))

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Drops the statistics of a step that the loss scaler skipped."""
        own = own_optimizer(optimizer)
        skipped = getattr(optimizer, "step_was_skipped", False)
        if skipped and own is not None and own.statistics is not None:
            own.statistics.drop()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Adds the diagnostics to the training logs, before the reporting callbacks see them."""
        if logs is None or "loss" not in logs:
            return
        diagnostics = logged_diagnostics(optimizer)
        logs.update(diagnostics)
        if diagnostics and state.log_history:
            state.log_history[-1].update(diagnostics)

    def on_save(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Writes the config beside the checkpoint that was just saved."""
        own = own_optimizer(optimizer)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if own is not None and args.should_save and checkpoint.is_dir():
            own.config.save_pretrained(checkpoint)

    def on_train_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Removes the hooks: the trained model is left as it was given."""
        own = own_optimizer(optimizer)
        if own is not None:
            own.close()
