"""The memory of an optimizer's state, and what a step takes above it, counted on a device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from hf_precond.cost.counting import OperationCounter, _tensors


class MemoryCounter(OperationCounter):
    """Follows, besides the kernels, the storages that are made and freed while it is active.

    Attributes:
        live: bytes of the storages that were made under this mode and are not freed.
        peak: the most that one activation has held above what it began and what it ended with:
            temporaries, not the state that a first step leaves.
    """

    def __init__(self, kind: str = "cuda", number: float = 1) -> None:
        super().__init__(kind, number)
        self.live = self.peak = 0.0
        self._known: set[int] = set()
        self._began = self._most = 0.0

    def __enter__(self) -> Any:
        """Begin an activation."""
        self._began = self._most = self.live
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End it, and note its peak."""
        super().__exit__(*error)
        self.peak = max(self.peak, self._most - max(self._began, self.live))

    def made(self, result: Any) -> None:
        """Note the storages of new tensors.

        Args:
            result: a tensor, or several.
        """
        for tensor in _tensors(result):
            storage: Any = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or tensor.device.type != self.device.type:
                continue
            size = storage.nbytes()
            self._known.add(key)
            self.live += size
            self._most = max(self._most, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: float) -> None:
        self._known.discard(key)
        self.live -= size

    @staticmethod
    def state_of(optimizer: Any) -> int:
        """Bytes of the tensors of an optimizer's state.

        Args:
            optimizer: one of torch's, or of this package's.
        """
        return sum(
            value.numel() * value.element_size()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
