"""``PrecondCallback``, which connects an optimizer of this package with the training loop."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from hf_precond.compat.transformers_internals import has_added
from hf_precond.integrations.arguments import (
    IN_TRAINING,
    config_from_arguments,
    lr_follows,
    own_optimizer,
)
from hf_precond.registry import get_info, list_optimizers

# Prefix of the optimizer's diagnostics among the Trainer's logs.
PREFIX = "optim_"

logger = logging.getLogger(__name__)


def logged_diagnostics(optimizer: Any) -> dict[str, float]:
    """The diagnostics of an optimizer under their names in the logs.

    Diagnostics of single layers, ``kind/layer``, are summed up by the worst layer:
    the smallest ``entropy`` and ``entropy_min``, the largest of every other kind,
    NaN where there is one.

    Args:
        optimizer: any optimizer, wrapped or not, or ``None``.

    Returns:
        Name to value; empty for an optimizer of another package.
    """
    own = own_optimizer(optimizer)
    if own is None:
        return {}
    by_kind: dict[str, list[float]] = {}
    for name, value in own.logged().items():
        by_kind.setdefault(name.partition("/")[0], []).append(value)
    worst = {}
    for kind, values in by_kind.items():
        extreme = min if kind.startswith("entropy") else max
        worst[PREFIX + kind] = math.nan if any(map(math.isnan, values)) else extreme(values)
    return worst


def is_logged(args: Any, state: Any, step: int) -> bool:
    """Whether a step will be logged; the log at the end of an epoch is not foreseen.

    Args:
        args: the training arguments.
        state: the Trainer's state.
        step: the step's number, from 1.
    """
    if step == 1 and getattr(args, "logging_first_step", False):
        return True
    every = int(getattr(state, "logging_steps", 0) or 0)
    strategy = getattr(args, "logging_strategy", "steps")
    return strategy == "steps" and every > 0 and step % every == 0


def restored_settings(own: Any) -> dict[str, Any]:
    """The settings that loading a checkpoint has changed.

    torch restores the parameter groups, learning rate and weight decay
    included, and the Trainer its schedule, whatever the new run asks for.

    Args:
        own: an optimizer of this package, after its state was loaded.

    Returns:
        Field to restored value, where the config has another value.
    """
    from hf_precond.architectures.groups import DECAY, NO_DECAY

    restored: dict[str, Any] = {}
    for group in own.param_groups:
        # Groups of the body only: a head has its own learning rate, and so may a script's groups.
        if group.get("name") not in (DECAY, NO_DECAY):
            continue
        restored |= {key: group[key] for key in ("betas", "eps", "momentum") if key in group}
        if "initial_lr" in group:  # the scheduler's peak; lr is its current value
            restored["lr"] = float(group["initial_lr"])
        if group["name"] == DECAY:
            restored["weight_decay"] = group["weight_decay"]
    return {
        key: value
        for key, value in restored.items()
        if hasattr(own.config, key) and getattr(own.config, key) != value
    }


@contextmanager
def during_training(trainer: Any) -> Iterator[None]:
    """What ``Trainer.train`` runs inside: the optimizer hears of the steps and sees the losses.

    Args:
        trainer: the Trainer.
    """
    token = IN_TRAINING.set(trainer)
    try:
        with recorded_losses(trainer):
            yield
    finally:
        IN_TRAINING.reset(token)


@contextmanager
def recorded_losses(trainer: Any) -> Iterator[None]:
    """Show an optimizer that needs the loss every call of ``compute_loss``, subclasses' too.

    Args:
        trainer: the Trainer; its method is restored at the end.
    """
    original, own = trainer.compute_loss, vars(trainer)
    before = {name: own[name] for name in ("compute_loss",) if name in own}

    @functools.wraps(original)
    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        optimizer = own_optimizer(trainer.optimizer)
        record = getattr(getattr(optimizer, "statistics", None), "record", None)
        if record is None or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        return record(trainer, original, args, kwargs)

    trainer.compute_loss = compute_loss
    try:
        yield
    finally:
        if own.get("compute_loss") is compute_loss:
            del trainer.compute_loss
            own.update(before)


def _warn_of_fields_of_ours(optim: Any, args: Any) -> None:
    """Warn of ``--optim_args`` that another package's optimizer cannot know, and ours do."""
    text = args.optim_args
    if not isinstance(text, str) or getattr(args, "process_index", False):
        return
    keys = {piece.partition("=")[0].strip() for piece in text.split(",")}
    owners = {name: _own_fields(name) & keys for name in list_optimizers()}
    known = [name for name, fields in owners.items() if fields]
    if known:
        optim = getattr(optim, "value", optim)
        logger.warning(
            "--optim_args %s: %s does not take %s; write --optim %s, which does.",
            text, optim, ", ".join(sorted(set().union(*owners.values()))), " or ".join(known),
        )  # fmt: skip


def _own_fields(name: str) -> set[str]:
    """The fields that an optimizer has beside those that any optimizer may have."""
    shared = {"lr", "weight_decay", "betas", "eps", "momentum", "nesterov"}
    try:
        return {field.name for field in dataclasses.fields(get_info(name).config_cls)} - shared
    except Exception:  # a plugin that does not import is no reason to stop another optimizer
        return set()


class PrecondCallback(TrainerCallback):
    """Connect an optimizer of this package with the training loop.

    The callback is among the default callbacks of every ``Trainer``. It checks
    ``--optim_args`` again, keeps the optimizer's hooks installed during training
    only, hands over the loss scale, drops the statistics of skipped steps, adds
    the diagnostics to the logs and writes ``optimizer_config.json`` into
    ``output_dir`` and its checkpoints. With other optimizers it does nothing.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse bad ``--optim_args`` that a script has set since its arguments were made."""
        if has_added(args):
            config_from_arguments(args)
        elif getattr(args, "optim_args", None):
            _warn_of_fields_of_ours(getattr(args, "optim", None), args)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Attach an optimizer that was made without a model; write the config in use.

        One that the parameters of layers were added to is attached again. Hooks that an earlier
        ``train()`` removed are installed again.

        Raises:
            ValueError: parameters train that did not when the optimizer was made.
        """
        own = own_optimizer(optimizer)
        if own is None:
            return
        own.refuse_joined()
        if not own.attached or own.joined or (own.statistics is None and own.requests()):
            # It may know more than the Trainer's model: a loss with parameters around it.
            own.attach(model if own.structure.model is None else own.structure.model)
        if state.global_step and not own.steps and args.process_index == 0:
            logger.warning(
                "%s: training goes on at step %d without the optimizer's state, which the "
                "checkpoint lacks (save_only_model leaves it out): the optimizer starts anew, at a "
                "learning rate of %g.",
                own.config.name,
                state.global_step,
                own.config.lr,
            )
        restored = restored_settings(own) if state.global_step else {}
        before = own.config
        if restored:
            own.config = own.config.replace(**restored)
        if "lr" in restored and lr_follows(args):
            rate = restored.pop("lr")
            if args.process_index == 0:
                logger.warning(
                    "%s: the learning rate goes on from the checkpoint's %g; a training that "
                    "starts with the present version and steps would take %g.",
                    own.config.name, rate, before.lr,
                )  # fmt: skip
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
        """Set the loss scale of the next passes, from the scaler in accelerate's wrapper."""
        from hf_precond.compat.torch_internals import loss_scale

        own = own_optimizer(optimizer)
        if own is not None and state is not None and is_logged(args, state, state.global_step + 1):
            own.expect_log()
        if own is not None and own.statistics is not None:
            own.statistics.loss_scale = loss_scale(getattr(optimizer, "scaler", None))

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Drop the statistics of a step that the loss scaler skipped."""
        own = own_optimizer(optimizer)
        skipped = getattr(optimizer, "step_was_skipped", False)
        if skipped and own is not None and own.statistics is not None:
            own.statistics.drop()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add the diagnostics to the training logs, before the reporting callbacks see them."""
        if logs is None or "loss" not in logs:
            return
        diagnostics = logged_diagnostics(optimizer)
        logs.update(diagnostics)
        if diagnostics and state.log_history:
            state.log_history[-1].update(diagnostics)

    def on_save(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Write the config beside the checkpoint that was just saved."""
        own = own_optimizer(optimizer)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if own is not None and args.should_save and checkpoint.is_dir():
            own.config.save_pretrained(checkpoint)

    def on_train_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Remove the hooks: the trained model is left as it was given."""
        own = own_optimizer(optimizer)
        if own is not None:
            own.close()
