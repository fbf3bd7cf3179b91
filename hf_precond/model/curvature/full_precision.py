"""Takes modules out of autocast, for the passes whose curvature is wanted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


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

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a module's forward pass; its inputs if they are to be others.

        What autocast made in lower precision, outside of the module, is cast
        to float32.
        """
        weights = list(self.model.parameters())
        device = weights[0].device.type
        if not torch.is_autocast_enabled(device) or not _full(weights):
            return None
        low = torch.get_autocast_dtype(device)
        context = torch.autocast(device, enabled=False)
        context.__enter__()
        self.left.append((module, context))

        def cast(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.dtype == low else value

        return tree_map(cast, args), tree_map(cast, kwargs)

    def leave(self, module: nn.Module) -> None:
        """After a module's forward pass, also one that failed."""
        if self.left and self.left[-1][0] is module:
            self.left.pop()[1].__exit__(None, None, None)


def _full(weights: Iterable[Tensor]) -> bool:
    return all(weight.dtype in (torch.float32, torch.float64) for weight in weights)
