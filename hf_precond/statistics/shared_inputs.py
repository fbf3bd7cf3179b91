"""Layers that are called with one and the same tensor have one input moment, computed once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_precond.statistics.buffer import Part


@dataclass
class _Known:
    tensor: weakref.ref[Tensor]
    version: int
    part: Part


class SharedInputs:
    """The last input moments of a pass, by where and how they were taken.

    q, k and v of an attention, or gate and up of an MLP, get the same tensor
    one after the other. :meth:`forget` before anything is staged: what was
    handed out is then changed in place.
    """

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}

    def part(self, name: str, kind: Any, inputs: Tensor, compute: Callable[[], Part]) -> Part:
        """The moment of ``inputs``, under a name of its own.

        Args:
            name: the collection's.
            kind: hashable: what two layers must have in common besides the tensor.
            inputs: what the layer was called with.
            compute: computes the part.
        """
        known = self._known.get(kind)
        if known is not None and known.tensor() is inputs and known.version == inputs._version:
            return Part(name, known.part.sum.clone(), known.part.count)
        part = compute()
        self._known[kind] = _Known(weakref.ref(inputs), inputs._version, part)
        return part

    def forget(self) -> None:
        """Hand out nothing that was computed before."""
        self._known.clear()
