"""Which projections of an attention are called with a tensor of their own."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

Leaves = frozenset[str]
"""What a value may be: parameters of the forward (``=name``), or texts of expressions."""


def called_apart(module: nn.Module, query: str, key: str, value: str) -> frozenset[str]:
    """``"k"`` where k is called with another tensor than q, ``"v"`` with another than k.

    Read off the source of the module's forward: keys of a pooled input
    (Segformer), values without the position embedding (DETR), bottlenecks
    (MobileBERT). Two that are the same unless the caller gives a second tensor
    (``key_value_states``) are taken for the same: there the module's name
    tells whether it is a cross-attention.

    Args:
        module: the attention.
        query, key, value: attributes that hold the projections.
    """
    return _called_apart(inspect.unwrap(type(module).forward), query, key, value)


@functools.cache
def _called_apart(forward: Callable[..., Any], query: str, key: str, value: str) -> frozenset[str]:
    try:
        source = textwrap.dedent(inspect.getsource(forward))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return frozenset()
    if not isinstance(function, ast.FunctionDef):
        return frozenset()
    values = _Values(function)
    q, k, v = (values.given_to(name) for name in (query, key, value))
    return frozenset(
        role for role, one, other in (("k", q, k), ("v", k, v)) if _differ(one, other)
    )


def _differ(one: Leaves, other: Leaves) -> bool:
    """Whether two values differ in more than what the caller may give."""
    if not one or not other or one == other:
        return False
    return not one & other or any(not leaf.startswith("=") for leaf in one ^ other)


class _Values:
    """What the names in a function may stand for, by the line."""

    def __init__(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        self.parameters = {argument.arg for argument in every}
        self.calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        self.assigned: dict[str, list[tuple[int, ast.expr | str]]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)
            elif isinstance(node, ast.AugAssign):
                self._note(node.target, node.lineno, ast.unparse(node))
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._note(node.target, node.lineno, node.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Tuple):
            self._note(target, value.lineno, value)
            return
        for place, part in enumerate(target.elts):
            self._note(part, value.lineno, f"{ast.unparse(value)}[{place}]")

    def _note(self, target: ast.expr, line: int, value: ast.expr | str) -> None:
        if isinstance(target, ast.Name):
            self.assigned.setdefault(target.id, []).append((line, value))

    def given_to(self, attribute: str) -> Leaves:
        """What ``self.attribute`` may be called with."""
        found: Leaves = frozenset()
        for call in self.calls:
            if call.args and ast.unparse(call.func) == f"self.{attribute}":
                found |= self._leaves(call.args[0], call.lineno)
        return found

    def _leaves(self, value: ast.expr | str, line: int) -> Leaves:
        """What an expression on a line may be; a name is what was assigned to it before."""
        if isinstance(value, str):
            return frozenset({value})
        if isinstance(value, ast.IfExp):
            return self._leaves(value.body, line) | self._leaves(value.orelse, line)
        if not isinstance(value, ast.Name):
            return frozenset({ast.unparse(value)})
        found = frozenset({f"={value.id}"} if value.id in self.parameters else ())
        for before, assigned in self.assigned.get(value.id, ()):
            if before < line:
                found |= self._leaves(assigned, before)
        return found or frozenset({value.id})
