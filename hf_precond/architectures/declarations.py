"""What users declare of modules of their own models, and which modules they mean."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

from torch import nn

from hf_precond.architectures.modules import class_names


@dataclass(frozen=True)
class Declaration:
    """What is said of some modules.

    Args:
        target: their class, its name, or a pattern of their paths.
    """

    target: str | type[nn.Module]

    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether the module at ``path`` is meant."""
        if isinstance(self.target, type):
            return isinstance(module, self.target)
        if self.target in class_names(module):
            return True
        parts, patterns = path.split("."), self.target.split(".")
        return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


DeclarationT = TypeVar("DeclarationT", bound=Declaration)


class Declarations(Generic[DeclarationT]):
    """Those of one kind; of several that mean one module the latest holds."""

    def __init__(self) -> None:
        self._held: list[DeclarationT] = []

    def add(self, declaration: DeclarationT) -> DeclarationT:
        """Keeps a declaration, and returns it."""
        self._held.append(declaration)
        return declaration

    def forget(self, declaration: DeclarationT) -> None:
        """Undoes :meth:`add`."""
        self._held.remove(declaration)

    def of(self, path: str, module: nn.Module) -> DeclarationT | None:
        """The latest that means the module at ``path``."""
        return next((d for d in reversed(self._held) if d.matches(path, module)), None)
