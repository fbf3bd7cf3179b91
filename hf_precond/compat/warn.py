"""Warnings that show the user's line."""

from __future__ import annotations

import sys
import warnings

INSIDE = frozenset({"hf_precond", "torch", "transformers", "accelerate", "peft", "contextlib"})
"""Packages whose frames lie between the user's line and ours."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` in the name of the innermost line outside these packages.

    Args:
        message: what is wrong, and the remedy.
        category: of the warning.
    """
    here = sys._getframe(1)
    frame = here
    while _package(frame.f_globals) in INSIDE:
        if frame.f_back is None:
            frame = here
            break
        frame = frame.f_back
    names = frame.f_globals
    warnings.warn_explicit(
        message, category, frame.f_code.co_filename, frame.f_lineno,
        module=names.get("__name__"), registry=names.setdefault("__warningregistry__", {}),
    )  # fmt: skip


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
