"""The routing table: every parameter, how it is treated, and why."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Route:
    """One parameter's treatment.

    Args:
        name: parameter path.
        shape: its shape.
        treatment: ``preconditioned`` and the like, the base rule's name, or
            ``frozen``.
        reason: why, in a few words.
        group: label of its parameter group (``decay``, ``no decay``,
            ``head``, …), empty before groups are made.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    reason: str
    group: str = ""


@dataclass
class RoutingTable:
    """Every parameter of a model with its treatment; prints as a table of 80 columns."""

    routes: list[Route] = field(default_factory=list)

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def __len__(self) -> int:
        return len(self.routes)

    def __getitem__(self, name: str) -> Route:
        for route in self.routes:
            if route.name == name:
                return route
        raise KeyError(name)

    def count(self) -> dict[str, int]:
        """Treatment to number of parameters tensors."""
        counts: dict[str, int] = {}
        for route in self.routes:
            counts[route.treatment] = counts.get(route.treatment, 0) + 1
        return counts

    def __str__(self) -> str:
        lines = [f"{'parameter':<42} {'shape':<12} {'treatment':<14} reason"]
        for route in self.routes:
            shape = "x".join(map(str, route.shape)) or "scalar"
            name = route.name if len(route.name) <= 42 else "…" + route.name[-41:]
            reason = route.reason + (f" [{route.group}]" if route.group else "")
            head = f"{name:<42} {shape:<12} {route.treatment:<14}"
            if len(head) + 1 + len(reason) <= 80:
                lines.append(f"{head} {reason}")
            else:
                lines += [head.rstrip(), textwrap.indent(textwrap.fill(reason, 76), "    ")]
        lines.append(", ".join(f"{n} {t}" for t, n in sorted(self.count().items())))
        return "\n".join(lines)
