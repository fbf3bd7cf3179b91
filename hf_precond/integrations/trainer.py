"""``Trainer`` and ``Seq2SeqTrainer`` with what a callback cannot do.

They are a convenience: with the stock Trainers, too, the diagnostics are logged and
``optimizer_config.json`` is written, by
:class:`~hf_precond.integrations.callback.PrecondCallback`.
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
    """What ``PrecondTrainer`` adds to ``Trainer``; put it before a Trainer class.

    - ``train(resume_from_checkpoint=True)`` resumes from the newest complete
      checkpoint, not from one that a killed run left half-written;
    - the model card has a section with the optimizer's settings;
    - :attr:`optimizer_config`, and ``optimizer_config.json`` wherever
      ``save_model`` saves, not only in ``output_dir`` and its checkpoints.

    With an optimizer of another package only the first of these holds.
    """

    args: Any
    optimizer: Any
    model: Any

    @property
    def optimizer_config(self) -> OptimizerConfig | None:
        """The config of the optimizer; ``None`` with an optimizer of another package."""
        return config_in_use(self)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as ``Trainer.train``.

        Args:
            resume_from_checkpoint: ``True`` is the newest complete checkpoint.
            *args: as for ``Trainer.train``.
            **kwargs: as for ``Trainer.train``.

        Returns:
            What ``Trainer.train`` returns.

        Raises:
            ValueError: the checkpoint is incomplete; nothing has been loaded.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True
        elif isinstance(resume_from_checkpoint, str) and os.path.isdir(resume_from_checkpoint):
            problem = damage(resume_from_checkpoint)
            if problem is not None:
                raise ValueError(f"{problem} Resume from an earlier checkpoint.")
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save, as ``Trainer.save_model``, with ``optimizer_config.json`` beside the weights.

        Args:
            output_dir: the folder, by default that of the training arguments.
            *args: as for ``Trainer.save_model``.
            **kwargs: as for ``Trainer.save_model``.
        """
        config = self.optimizer_config
        if config is not None and self.args.should_save:
            config.save_pretrained(output_dir or self.args.output_dir)
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card, as ``Trainer.create_model_card``, with a section on the optimizer.

        Args:
            *args: as for ``Trainer.create_model_card``.
            **kwargs: as for ``Trainer.create_model_card``.
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
