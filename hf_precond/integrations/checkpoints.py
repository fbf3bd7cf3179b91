"""Which checkpoints of a killed run are complete."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

_FOLDER = re.compile(r"checkpoint-(\d+)")
TRAINER_STATE = "trainer_state.json"


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
    for _, path in sorted(numbered, reverse=True):
        if damage(path) is None:
            return str(path)
    return None


def damage(checkpoint: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint cannot be resumed from.

    A Trainer writes ``trainer_state.json`` last. Of the other files only the
    table of contents is read, which shows whether the file is complete.

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
