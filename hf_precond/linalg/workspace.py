"""Memory for intermediate results that is kept from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Workspace:
    """Scratch tensors on a CPU, by role and shape.

    Fresh pages cost a CPU more than the elementwise work done in them; a GPU
    has its caching allocator, so there every tensor is a new one. A copy
    starts empty.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}

    def take(self, role: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of any values; the next call of the same role and shape returns it again.

        On a CPU, where only a triangle of some products is written, the rest
        is never what other programs or NaN left in fresh memory.
        """
        if not like.is_cpu:
            return like.new_empty(shape)
        key = (role, tuple(shape), like.dtype)
        if key not in self._held:
            self._held[key] = like.new_zeros(shape)
        return self._held[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": {}}
