"""Call something as soon as a module is imported, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as the other finders do, and acts once they have been executed."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}
        self.lock = threading.RLock()
        self.searching = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        under_way = self.searching.__dict__.setdefault("names", set())
        if name not in self.waiting or name in under_way:
            return None
        under_way.add(name)
        try:
            spec = self._others(name, path, target)
        finally:
            under_way.discard(name)
        loader = None if spec is None else spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return spec
        execute = loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == name:
                loader.__dict__.pop("exec_module", None)
                self.act(module)

        try:
            loader.exec_module = execute_and_act  # type: ignore[method-assign]
        except AttributeError:
            return None
        return spec

    def _others(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec = find(name, path, target)
            if spec is not None:
                return spec
        return None

    def act(self, module: ModuleType) -> None:
        with self.lock:
            actions = self.waiting.pop(module.__name__, [])
            if not self.waiting and self in sys.meta_path:
                sys.meta_path.remove(self)
        for action in actions:
            action(module)

    def add(self, name: str, action: Action) -> None:
        with self.lock:
            actions = self.waiting.setdefault(name, [])
            if action not in actions:
                actions.append(action)
            if self not in sys.meta_path:
                sys.meta_path.insert(0, self)


_FINDER = _Finder()


def when_imported(name: str, action: Action) -> None:
    """Call ``action(module)`` now if module ``name`` is imported, else when it has been.

    The action is called once, in the importing thread, before the module's
    importer sees it. Asking twice for the same action waits once.

    Args:
        name: full module name.
        action: takes the module; what it raises, the import raises.
    """
    if name in sys.modules:
        # Not sys.modules[name]: another thread may be in the middle of importing it.
        action(importlib.import_module(name))
    else:
        _FINDER.add(name, action)
