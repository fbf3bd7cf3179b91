"""The gradients and parameters that an optimizer is given, and whether they can be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_precond.architectures.structure import Owner
from hf_precond.distributed.collectives import all_finite
from hf_precond.optimizers.base.parameters import BoundMatrix, Position, position_of

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


UNFROZEN = (
    "{name}: {count} parameters ({first}, …) were frozen when the optimizer was made, have "
    "gradients now and are in none of its parameter groups: it does not train them. Call "
    "optimizer.add_param_group({{'params': […]}}) and then optimizer.attach(model), or make the "
    "optimizer before layers are frozen."
)

STEPS = 2
"""Steps in which another optimizer would show that it trains them (AdamR moves none at first)."""
TIED = (
    "{name} has become {other} since the optimizer was made (tie_weights): a tied weight is "
    "stepped otherwise. Tie the weights before, or build a new optimizer now."
)


class ParamGroupValidator:
    """Looks at every step whether the model trains what the parameter groups do not hold.

    Modules are kept, no parameters.

    Args:
        owners: of the model's parameters.
        slots: ``id`` of every parameter of the groups to its place.
    """

    def __init__(self, owners: Sequence[Owner], positions: Mapping[int, Position]) -> None:
        found = [(owner, _held(owner)) for owner in owners]
        self.stepped = [owner for owner, p in found if p is not None and id(p) in positions]
        self.frozen = [owner for owner, p in found if p is not None and not p.requires_grad]
        self.seen: dict[str, list[tuple[float, float]]] = {}  # of what was unfrozen, by step

    def check(
        self, positions: Mapping[int, Position], bound: Sequence[BoundMatrix], name: str
    ) -> None:
        """Refuse parameters that were replaced or tied; warn once of those that were unfrozen.

        Args:
            slots: as they are now.
            placed: the matrices that are preconditioned.
            name: the optimizer's.

        Raises:
            RuntimeError: see :func:`~hf_precond.optimizers.base.parameters.position_of`; or a
                matrix has become the weight of two layers, whose gradient is
                a sum that the statistics of neither describe.
        """
        known: dict[int, str] = {}
        for owner in self.stepped:
            parameter = _held(owner)
            if parameter is None or not _trains(parameter):
                continue
            position_of(owner[0], parameter, positions)
            other = known.setdefault(id(parameter), owner[0])
            if other != owner[0] and any(item.weight is parameter for item in bound):
                raise RuntimeError(TIED.format(name=owner[0], other=other))
        self._warn_of_unfrozen(positions, name)

    def _warn_of_unfrozen(self, positions: Mapping[int, Position], name: str) -> None:
        """Warn once of those that had gradients and that nobody changed for :data:`STEPS`."""
        found = [(owner, _held(owner)) for owner in self.frozen]
        new = [(o, p) for o, p in found if p is not None and _trains(p) and id(p) not in positions]
        # Another optimizer may hold them. Their versions do not tell: fused kernels count none up.
        seen = {owner[0]: [*self.seen.get(owner[0], ()), _print(p)] for owner, p in new}
        moved = {key for key, prints in seen.items() if prints[-1] != prints[0]}
        missing = [key for key, prints in seen.items() if len(prints) > STEPS and key not in moved]
        done = moved | set(missing)
        self.frozen = [owner for owner in self.frozen if owner[0] not in done]
        self.seen = {key: prints for key, prints in seen.items() if key not in done}
        if missing:
            message = UNFROZEN.format(name=name, count=len(missing), first=missing[0])
            warnings.warn(message, stacklevel=2)


def _held(owner: Owner) -> Tensor | None:
    """The parameter as its module holds it now; ``None`` where it holds none of that name."""
    _, module, attribute = owner
    return module._parameters.get(attribute)


def _print(parameter: Tensor) -> tuple[float, float]:
    """Numbers that change with this rank's entries; read from the device at few steps only."""
    local: Tensor = getattr(parameter, "_local_tensor", parameter).detach().double()
    return float(local.sum()), float(local.square().sum())


def _trains(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.grad is not None
