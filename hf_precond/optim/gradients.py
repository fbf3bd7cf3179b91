"""The gradients that a step is given: which there are, and whether they can be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_precond.blocks.sharding import all_finite

Groups = Sequence[Mapping[str, Any]]


def gradients_of(groups: Groups) -> list[Tensor]:
    """Every gradient there is, in the order of the parameter groups."""
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def are_finite(groups: Groups) -> bool:
    """Whether no gradient holds infinities or NaN; every rank alike. Waits for the device."""
    return all_finite(gradients_of(groups))


def refuse_sparse(groups: Groups, name: str) -> None:
    """Refuse sparse gradients.

    Args:
        groups: parameter groups.
        name: the optimizer's, for the message.

    Raises:
        RuntimeError: for a sparse gradient, with what to do.
    """
    for gradient in gradients_of(groups):
        if gradient.is_sparse:
            raise RuntimeError(
                f"{name}: sparse gradients are not supported (a parameter of shape "
                f"{tuple(gradient.shape)} has one); build its nn.Embedding with sparse=False."
            )
