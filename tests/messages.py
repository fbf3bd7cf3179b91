"""What the package raises and warns with, read from its source without importing it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hf_precond"
SAID = {"warnings.warn", "logger.warning", "warn"}
GAP = "\0"
PLACEHOLDER = re.compile(r"\{[^{}]*\}|%[sdr]")


def literal(node: ast.AST) -> str | None:
    """The text of a string in source, what varies in it as a gap; ``None`` for other things."""
    if isinstance(node, ast.Constant):
        return PLACEHOLDER.sub(GAP, node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else GAP for v in node.values)
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = literal(node.left), literal(node.right)
        return None if sides == (None, None) else "".join(s or GAP for s in sides)
    return None


def messages(path: Path) -> Iterator[str]:
    """The texts of a file's errors and warnings, and of its constants that are sentences."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from filter(None, map(literal, node.exc.args[:1]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in SAID:
            yield from filter(None, map(literal, node.args[:1]))
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            values = [statement.value]
            if isinstance(statement.value, ast.Dict):
                values = statement.value.values
            texts = filter(None, map(literal, values))
            yield from (text for text in texts if len(text.split()) > 6)


def leading_words(message: str, least: int = 4, most: int = 6) -> str:
    """The first words of a message behind which nothing varies; empty where there are too few."""
    parts = [" ".join(part.split()) for part in message.split(GAP)]
    parts = [part.strip(" :;,.()") for part in parts]
    known = [part for part in parts if len(part.split()) >= least]
    return " ".join(known[0].split()[:most]).rstrip(":;,.()") if known else ""
