"""Text for a terminal: its width, names that are cut, tables, and what is not logged."""

from __future__ import annotations

import contextlib
import logging
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence


def terminal_width() -> int:
    """Columns of the terminal, between 60 and 160; 80 where there is none (in a pipe)."""
    return min(160, max(60, shutil.get_terminal_size((80, 24)).columns))


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 79 columns.

    Args:
        text: the paragraph.
    """
    return textwrap.fill(text, 79)


def distinct(names: Iterable[str], width: int) -> dict[str, str]:
    """Names cut to ``width`` columns, at their start or in the middle, so that none become alike.

    Args:
        names: the names.
        width: columns.

    Returns:
        Name to cut name; every name whole where no cut keeps all of them apart.
    """
    names = list(dict.fromkeys(names))
    for start in (0, *range(width // 3, width - 1), *range(width // 3, 0, -1)):
        end = width - 1 - start
        cut = {n: n if len(n) <= width else f"{n[:start]}…{n[len(n) - end :]}" for n in names}
        if len(set(cut.values())) == len(names):
            return cut
    return {name: name for name in names}


def table(rows: Sequence[Sequence[str]], width: int) -> str:
    """Rows under a heading: the first column to the left and cut, the others to the right.

    Args:
        rows: texts, the heading first.
        width: columns of the whole.

    Returns:
        The lines.
    """
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(12, width - sum(columns[1:]) - 2 * len(columns[1:]))
    names = distinct([row[0] for row in rows], min(room, columns[0]))
    first = max(map(len, names.values()))
    lines = [
        f"{names[row[0]]:<{first}}  "
        + "  ".join(f"{cell:>{size}}" for cell, size in zip(row[1:], columns[1:], strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """Inside, the package logs errors alone."""
    log = logging.getLogger("hf_precond")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
