"""A channel-wise parameter of a norm layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(eq=False)
class NormParameter:
    """A scale or shift of a norm, read from its module at the time of use.

    Args:
        name: parameter path.
        module: the module that holds it.
        attribute: the attribute that holds it.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> Tensor:
        """The parameter as the module holds it now."""
        return getattr(self.module, self.attribute)
