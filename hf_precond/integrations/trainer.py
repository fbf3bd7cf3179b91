"""``Trainer`` and ``Seq2SeqTrainer`` with what a callback cannot add.

The stock Trainers log the diagnostics and write ``optimizer_config.json`` too:
:class:`~hf_precond.integrations.callback.PrecondCallback` is among their callbacks.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from hf_precond.config.base import OptimizerConfig
from hf_precond.integrations.arguments import config_in_use, own_optimizer
from hf_precond.integrations.checkpoints import damage, last_checkpoint
from hf_precond.integrations.model_card import TAG, add_section


class PrecondTrainerMixin:
    """What is added to a Trainer class, before which this stands among the bases.

    - ``train(resume_from_checkpoint=True)`` resumes from the newest checkpoint
      that is whole, not from one that a killed run left half-written;
    - a section of the model card with the optimizer's settings;
    - :attr:`optimizer_config`, and ``optimizer_config.json`` wherever
      ``save_model`` saves (the stock Trainer: in ``output_dir`` and its
      checkpoints).

    With an optimizer of another package only the first of these holds.
    """

    args: Any
    optimizer: Any
    model: Any

    @property
    def optimizer_config(self) -> OptimizerConfig | None:
        """The config of the optimizer in use, or to be used; ``None`` for another package's."""
        return config_in_use(self)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, but a checkpoint that is not whole is not resumed from.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or ``True`` for the
                newest one that is whole. Default ``None``: start anew.
            *args: as for ``Trainer.train``.
            **kwargs: the same.

        Returns:
            What ``Trainer.train`` returns.

        Raises:
            ValueError: the checkpoint is not whole; nothing has been loaded.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True
        elif isinstance(resume_from_checkpoint, str) and os.path.isdir(resume_from_checkpoint):
            problem = damage(resume_from_checkpoint)
            if problem is not None:
                raise ValueError(f"{problem} Resume from an earlier checkpoint.")
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.save_model``, with ``optimizer_config.json`` beside the weights.

        Args:
            output_dir: the folder. Default ``None``: that of the arguments.
            *args: as for ``Trainer.save_model``.
            **kwargs: the same.
        """
        config = self.optimizer_config
        if config is not None and self.args.should_save:
            config.save_pretrained(output_dir or self.args.output_dir)
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.create_model_card``, with a section and a tag for the optimizer.

        Args:
            *args: as for ``Trainer.create_model_card``.
            **kwargs: the same.
        """
        config = self.optimizer_config
        if config is not None and len(args) < 3:
            tags = kwargs.get("tags") or []
            kwargs["tags"] = [tags] if isinstance(tags, str) else list(tags)
            if TAG not in kwargs["tags"]:
                kwargs["tags"].append(TAG)
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        card = os.path.join(self.args.output_dir, "README.md")
        if config is not None and self.is_world_process_zero() and os.path.exists(card):  # type: ignore[attr-defined]
            add_section(card, config, own_optimizer(self.optimizer))


class PrecondTrainer(PrecondTrainerMixin, Trainer):
    """:class:`transformers.Trainer` with :class:`PrecondTrainerMixin`."""


class PrecondSeq2SeqTrainer(PrecondTrainerMixin, Seq2SeqTrainer):
    """:class:`transformers.Seq2SeqTrainer` with :class:`PrecondTrainerMixin`."""
