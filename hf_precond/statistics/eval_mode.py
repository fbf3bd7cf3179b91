"""Layers that train in evaluation mode, whose passes bring no second moments."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable

from torch import Tensor

ALL = (
    "no second moment was collected since the last step: the model ran in evaluation mode "
    "(from_pretrained returns it so), whose passes do not count, and its layers are stepped "
    "without a preconditioner of theirs; call model.train() before the training loop."
)
SOME = (
    "{count} layers ({first}, …) had gradients since the last step from passes in evaluation mode "
    "only, which do not count: they are stepped without a preconditioner of theirs, or with an old "
    "one; call train() on them too, and switch dropout off by its p."
)


class EvalModeMonitor:
    """Notes the layers through whose passes in evaluation mode a gradient went."""

    def __init__(self) -> None:
        self.layers: dict[str, list[str]] = {}

    def watch(self, layer: str, collections: Iterable[str], output: Tensor) -> None:
        """Note a layer if the gradient of a call's output comes.

        Args:
            layer: its name.
            collections: what is collected from its calls in training mode.
            output: of the call.
        """
        names = list(collections)
        output.register_hook(lambda _: self.layers.__setitem__(layer, names))

    def warn(self, staged: Container[str]) -> None:
        """Say of which layers nothing was staged.

        Args:
            staged: names of the collections of which something was.
        """
        missed = [
            layer
            for layer, names in self.layers.items()
            if not any(name in staged for name in names)
        ]
        if missed:
            some = SOME.format(count=len(missed), first=missed[0])
            warnings.warn(some if staged else ALL, stacklevel=3)

    def forget(self) -> None:
        """Begin anew."""
        self.layers.clear()
