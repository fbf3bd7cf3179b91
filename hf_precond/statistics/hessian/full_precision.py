"""Takes modules out of autocast, for the passes whose curvature is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class FullPrecision:
    """Runs modules in the precision of their weights, float32 or float64, inside autocast.

    A model with any weight of another dtype is left under autocast, which
    may be what makes its dtypes fit together.

    Args:
        model: the model the modules belong to.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.left: list[tuple[nn.Module, torch.autocast]] = []
        self._full: bool | None = None

    def expect(self) -> None:
        """Look at the weights' dtypes anew at the next :meth:`enter`; they hold for a step."""
        self._full = None

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a module's forward pass; its inputs if they are to be others.

        What autocast made in lower precision, outside of the module, is cast
        to float32.
        """
        device = next(self.model.parameters()).device.type
        if not torch.is_autocast_enabled(device) or not self._is_full():
            return None
        low = torch.get_autocast_dtype(device)
        context = torch.autocast(device, enabled=False)
        context.__enter__()
        self.left.append((module, context))

        def is_low(value: Any) -> bool:
            return isinstance(value, Tensor) and value.dtype == low

        # Containers are rebuilt only where they must be: a module may write to one.
        if not any(is_low(value) for value in tree_leaves((args, kwargs))):
            return None

        def cast(value: Any) -> Any:
            return value.float() if is_low(value) else value

        return tree_map(cast, args), tree_map(cast, kwargs)

    def leave(self, module: nn.Module) -> None:
        """After a module's forward pass, also one that failed."""
        if self.left and self.left[-1][0] is module:
            self.left.pop()[1].__exit__(None, None, None)

    def _is_full(self) -> bool:
        if self._full is None:
            allowed = (torch.float32, torch.float64)
            self._full = all(weight.dtype in allowed for weight in self.model.parameters())
        return self._full
