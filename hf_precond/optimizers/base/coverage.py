"""Whether every matrix gets the statistics of its preconditioner, and what becomes of it if not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_precond.architectures.structure import ModelStructure, Route
from hf_precond.compat.warn import warn
from hf_precond.distributed import collectives
from hf_precond.optimizers.base import messages
from hf_precond.optimizers.base.parameters import BoundMatrix

States = MutableMapping[Tensor, dict[str, Any]]

STRIKES = 2
"""Steps with statistics at which a matrix that has a gradient may lack its own."""
SHOWN = 3
"""Matrices that a warning names."""
UNOBSERVED = "unobserved"
"""State of a matrix that counts these steps; there is none where nothing is missing."""


class StatisticsCoverage:
    """Follows which matrices have a gradient and no statistics.

    A matrix that had a gradient, which was not zero, and no statistics at
    :data:`STRIKES` steps in a row that collect them is unobserved: a warning
    says so, the routing table too, and the fallback optimizer steps it until its
    statistics come. The counts lie in the state, so that a resumed run does the
    same; ranks agree, since all of them judge by summed counts.

    Args:
        needs: each matrix to the keys of the statistics that its preconditioner is made of.
        structure: whose routing is kept true.
        fallback: name of the fallback optimizer; ``None`` where an unobserved matrix still has a
            preconditioner, of its gradients.
    """

    def __init__(
        self,
        needs: Mapping[BoundMatrix, Sequence[str]],
        structure: ModelStructure,
        fallback: str | None,
    ) -> None:
        self.needs = {bound: keys for bound, keys in needs.items() if keys}
        self.structure, self.fallback = structure, fallback
        self.known: dict[str, Route] = {}  # rows of the routing table that were changed
        self.unobserved: set[BoundMatrix] = set()
        self.lacking: set[BoundMatrix] = set()  # and those that lacked statistics once

    @property
    def without_preconditioner(self) -> Collection[BoundMatrix]:
        """The matrices that the fallback optimizer steps by their raw gradients."""
        return () if self.fallback is None else self.unobserved

    def restore(self, states: States) -> None:
        """Read from the state which matrices are unobserved.

        Args:
            states: the optimizer's state.
        """
        self.lacking = {bound for bound in self.needs if _strikes(bound, states)}
        lost = {bound for bound in self.lacking if _strikes(bound, states) >= STRIKES}
        if lost != self.unobserved:
            self._note(lost, lambda bound: "")

    def forget(self) -> None:
        """Give the routing table its rows back."""
        self._note(set(), lambda bound: "")

    def judge(
        self,
        states: States,
        collected: Collection[str],
        why: Callable[[str], str],
        name: str,
    ) -> bool:
        """Take note of what was collected for one step, on every rank alike.

        Waits for the device where statistics of a matrix with a gradient are missing.

        Args:
            states: the optimizer's state; the counts in it change.
            collected: the keys for which something was collected, on any rank.
            why: says of a key why nothing was; an empty string where that is not known.
            name: the optimizer's.

        Returns:
            Whether a matrix lacked statistics that did not before, or not for long.
        """
        missing = [b for b, keys in self.needs.items() if any(k not in collected for k in keys)]
        unobserved = self.unobserved.intersection(missing)
        for bound in self.lacking.difference(missing):
            self.lacking.remove(bound)
            states[bound.weight].pop(_name(bound), None)
        others = [bound for bound in missing if bound not in unobserved]
        struck = [b for b, trains in zip(others, have_gradients(others), strict=True) if trains]
        for bound in struck:
            self.lacking.add(bound)
            strikes = states[bound.weight][_name(bound)] = _strikes(bound, states) + 1
            if strikes >= STRIKES:
                unobserved.add(bound)
        new = [bound for bound in missing if bound in unobserved - self.unobserved]

        def reason(bound: BoundMatrix) -> str:
            return next((why(key) for key in self.needs[bound] if key not in collected), "")

        if unobserved != self.unobserved:
            self._note(unobserved, reason)
        if new:
            self._warn(new, reason(new[0]), name)
        return bool(struck)

    def _warn(self, new: Sequence[BoundMatrix], why: str, name: str) -> None:
        names = [bound.matrix.name for bound in new[:SHOWN]]
        text = messages.UNOBSERVED if self.fallback is not None else messages.UNOBSERVED_FEATURES
        warn(
            text.format(
                name=name,
                count="1 matrix" if len(new) == 1 else f"{len(new)} matrices",
                names=", ".join(names) + (", …" if len(new) > SHOWN else ""),
                why=f" ({why})" if why else "",
                fallback=self.fallback,
            )
        )

    # The routing table ------------------------------------------------------------

    def _note(self, unobserved: set[BoundMatrix], why: Callable[[BoundMatrix], str]) -> None:
        """Set which matrices are unobserved, and the rows of their parameters."""
        self.unobserved = unobserved
        names = {(id(module), attribute): n for n, module, attribute in self.structure.owners}
        rows: dict[str, list[BoundMatrix]] = {}
        for bound in self.needs:
            matrix = bound.matrix
            holder = matrix.module if matrix.holder is None else matrix.holder
            for module, attribute in ((holder, matrix.weight), (matrix.module, matrix.bias)):
                name = names.get((id(module), attribute or ""))
                if name is not None:
                    rows.setdefault(name, []).append(bound)
        routes = self.structure.routing.routes
        for place, route in enumerate(routes):
            lost = [bound for bound in rows.get(route.name, ()) if bound in unobserved]
            if not lost:
                routes[place] = self.known.pop(route.name, route)
                continue
            before = self.known.setdefault(route.name, route)
            whole = len(lost) == len(rows[route.name]) and self.fallback is not None
            reason = why(lost[0])
            said = f"{before.reason}: no statistics{f', {reason}' if reason else ''}"
            treatment = self.fallback if whole and self.fallback is not None else before.treatment
            routes[place] = replace(before, treatment=treatment, reason=said)


def _name(bound: BoundMatrix) -> str:
    return f"{bound.prefix}{UNOBSERVED}"


def _strikes(bound: BoundMatrix, states: States) -> int:
    """Steps in a row at which a matrix lacked statistics."""
    return states.get(bound.weight, {}).get(_name(bound), 0)


def have_gradients(bound: Sequence[BoundMatrix]) -> list[bool]:
    """Whether each matrix has a gradient that is not zero, on any rank.

    Reads from the device, except where none of them has a gradient on a single rank.

    Args:
        bound: the same on every rank.
    """
    gradients = [item.weight.grad for item in bound]
    if not bound or (collectives.world_size() == 1 and all(g is None for g in gradients)):
        return [False] * len(bound)
    device = bound[0].weight.device
    zero = torch.zeros((), device=device)
    flags = torch.stack(
        [
            zero if gradient is None else collectives.local(gradient).any().to(zero)
            for gradient in gradients
        ]
    )
    return [flag > 0 for flag in collectives.sum_over_ranks(flags).tolist()]
