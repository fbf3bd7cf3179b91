"""The gradients and parameters that an optimizer is given, and whether they can be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def only_allocates(groups: Groups) -> bool:
    """Whether this is a step of zero gradients and lr 0, by which checkpointing makes state."""
    rates = [group["lr"] for group in groups]
    # To look at a rate that is a tensor may wait for a GPU: only before the first step.
    if any((groups[0]["step"] and isinstance(rate, Tensor)) or rate != 0 for rate in rates):
        return False
    return not any(bool(gradient.count_nonzero()) for gradient in gradients_of(groups))


def refuse_complex(parameters: Iterable[Tensor], name: str) -> None:
    """Refuse complex parameters.

    Args:
        parameters: of a parameter group.
        name: the optimizer's, for the message.

    Raises:
        ValueError: for a complex one, with what to do.
    """
    for parameter in parameters:
        if parameter.is_complex():
            raise ValueError(
                f"{name}: complex parameters are not supported (shape {tuple(parameter.shape)}); "
                "store real and imaginary parts as two tensors."
            )


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
