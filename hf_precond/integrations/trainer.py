"""``Trainer`` and ``Seq2SeqTrainer`` with what a callback cannot do.

They are a convenience: with the stock Trainers, too, the diagnostics are logged and
``optimizer_config.json`` is written, by
:class:`~hf_precond.integrations.callback.PrecondCallback`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from hf_precond.config.base import OptimizerConfig
from hf_precond.integrations.arguments import config_in_use, own_optimizer
from hf_precond.integrations.model_card import TAG, add_section

logger = logging.getLogger(__name__)


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
            repository = getattr(self, "hub_model_id", None) or self.args.hub_model_id
            add_section(card, config, own_optimizer(self.optimizer), repository)


class PrecondTrainer(PrecondTrainerMixin, Trainer):
    """:class:`transformers.Trainer` with :class:`PrecondTrainerMixin`."""


class PrecondSeq2SeqTrainer(PrecondTrainerMixin, Seq2SeqTrainer):
    """:class:`transformers.Seq2SeqTrainer` with :class:`PrecondTrainerMixin`."""


# Checkpoints that a killed run left behind ----------------------------------------


_FOLDER = re.compile(r"checkpoint-(\d+)")
TRAINER_STATE = "trainer_state.json"
TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "optimizer_[0-9]*")
"""Where a Trainer saves the optimizer's state; the last are folders of sharded trainings."""
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args).*")
"""Files of a checkpoint that hold tensors, and none of the model's."""


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a run.

    ``transformers.trainer_utils.get_last_checkpoint`` returns the newest
    folder, which is incomplete if the run was killed while it saved.

    Args:
        output_dir: the run's folder, which holds ``checkpoint-…``.

    Returns:
        The checkpoint's path; ``None`` if there is none.
    """
    root = Path(output_dir)
    numbered = [
        (int(match[1]), path)
        for path in (root.iterdir() if root.is_dir() else ())
        if path.is_dir() and (match := _FOLDER.fullmatch(path.name))
    ]
    newest = [path for _, path in sorted(numbered, reverse=True)]
    # A run with save_only_model saves no state of the optimizer at all.
    with_state = any(_has(path, OPTIMIZER_STATES) for path in newest)
    for path in newest:
        problem = damage(path)
        if problem is None and with_state and not _has(path, OPTIMIZER_STATES):
            problem = f"{path}: it has no state of the optimizer."
        if problem is None:
            return str(path)
        logger.warning("%s It is passed over.", problem)
    return None


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def damage(checkpoint: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint cannot be resumed from.

    A Trainer writes ``trainer_state.json`` last. Of the other files only the
    table of contents is read, which shows whether the file is complete. A
    checkpoint has weights, and where it has the optimizer's state it has the
    scheduler's and the random generators' too.

    Args:
        checkpoint: a folder ``checkpoint-…``.

    Returns:
        A sentence; ``None`` for a complete checkpoint.
    """
    folder = Path(checkpoint)
    state = folder / TRAINER_STATE
    if not state.is_file():
        return f"{folder}: it has no {TRAINER_STATE}, which is saved last."
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return f"{state}: it ends too early."
    saved = [path for path in folder.rglob("*") if path.suffix in TENSORS]
    if not any(not NO_WEIGHTS.match(path.name) for path in saved):
        return f"{folder}: it has no weights."
    for name in ("scheduler.pt", "rng_state*.pth"):
        if _has(folder, OPTIMIZER_STATES) and not _has(folder, (name,)):
            return f"{folder}: it has no {name}, without which the rest would go on otherwise."
    for path in sorted(folder.iterdir()):
        if path.suffix in (".pt", ".pth", ".bin") and not _is_whole_archive(path):
            return f"{path}: it ends too early."
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            return f"{path}: it ends too early."
    return None


def _is_whole_archive(path: Path) -> bool:
    """Whether a file of ``torch.save`` has its table of contents, which is at its end.

    A file in the format of torch before 1.6 has none and counts as complete.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start and start != b"PK":
            return True
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file is as long as its header demands."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False
