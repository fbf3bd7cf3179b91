"""Registers the optimizers in processes that a launched script starts.

Python imports this file when such a process starts. Nothing else is imported
until the process imports transformers. The ``sitecustomize`` that stood on the
path before is run as well. ``HF_PRECOND=0`` leaves a process alone.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))


class RegisterBefore:
    """A finder that finds nothing, and registers the names before a module is imported.

    Args:
        name: the module.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        """Register the names when it is the module's turn; other finders find it."""
        if name != self.name or self not in sys.meta_path:
            return
        meta_path: list[Any] = sys.meta_path
        meta_path.remove(self)
        if importlib.util.find_spec("hf_precond") is None:  # a checkout that is not installed
            sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(FOLDER))))
        try:
            from hf_precond.cli import mistakes

            mistakes.install()
        except Exception as error:  # another environment's Python, say: the process goes on
            print(f"hf_precond: no --optim names in this process: {error!r}", file=sys.stderr)


def _run_the_other() -> None:
    """Run the ``sitecustomize`` that this one hides."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != FOLDER]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    if os.environ.get("HF_PRECOND", "0") not in ("", "0"):
        finders: list[Any] = sys.meta_path
        finders.insert(0, RegisterBefore("transformers"))
    _run_the_other()
