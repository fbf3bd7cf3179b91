"""What a step finds out about parameters, gradients and state, kept until one of them changes.

To find the parameter of every matrix, to check it, to see that its state fits and to group what is
stepped alike takes more Python than all else in a step. A :class:`Layout` keeps what came of it. A
step that finds other facts than the layout was made of (:func:`facts_of`), or state that something
else has touched since the last step, makes a new one. Only inside a step is it open: what is asked
between two steps is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor

from hf_precond.architectures.structure import Owner

Made = TypeVar("Made")
Facts = tuple[Any, ...]
States = MutableMapping[Tensor, dict[str, Any]]


class Layout:
    """What holds for parameters, gradients and state while the facts are the same.

    Args:
        facts: what it was made of; ``None`` where it serves one step only.
        groups: the parameter groups, of which no parameter is freed while it is known by its id.

    Attributes:
        weights: of the matrices and norm parameters whose layout it is while it is open.
    """

    def __init__(
        self, facts: Facts | None = None, groups: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.facts = facts
        self.open = False
        self.weights: dict[Any, Tensor] = {}
        self._groups = [(group, [*group["params"]]) for group in groups]
        self._state: list[Any] | None = None
        self._made: dict[tuple[Any, ...], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of an optimizer finds its own."""
        return type(self), ()

    def holds(self, facts: Facts | None, state: States) -> bool:
        """Whether nothing has changed since a step was finished with it.

        Args:
            facts: as they are now.
            state: the optimizer's.
        """
        known = self._state
        return None not in (facts, known) and facts == self.facts and known == _entries(state)

    def bind(self, bound: Iterable[Any]) -> None:
        """Say whose layout it is.

        Args:
            bound: matrices and norm parameters.
        """
        self.weights = {item: item.weight for item in bound}

    def begin(self) -> None:
        """Open it for a step; after one that is given up it holds no more."""
        self.open, self._state = True, None
        for item in self.weights:
            item.layout = self

    def note(self, state: States) -> None:
        """Note the state that a step has left.

        Args:
            state: the optimizer's.
        """
        self._state = _entries(state)

    def close(self) -> None:
        """Close it: what is asked for from here on is looked up."""
        self.open = False
        for item in self.weights:  # and no circle keeps the state of an optimizer that is gone
            item.layout = CLOSED

    def keep(self, name: Any, items: Iterable[Any], make: Callable[[], Made]) -> Made:
        """What was made for some items, made once.

        Args:
            name: of what is made.
            items: that live as long as the layout.
            make: makes it; it must follow from the facts.
        """
        key = (name, *map(id, items))
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


CLOSED = Layout()
"""That of matrices that no step has seen yet."""


def kept(name: Any, bound: Sequence[Any], make: Callable[[], Made]) -> Made:
    """:meth:`Layout.keep` of the layout of some matrices; made anew outside a step.

    Args:
        name: of what is made.
        bound: the matrices, or norm parameters.
        make: makes it.
    """
    if not bound or not bound[0].layout.open:
        return make()
    return bound[0].layout.keep(name, bound, make)


def facts_of(groups: Sequence[Mapping[str, Any]], owners: Sequence[Owner]) -> Facts | None:
    """What a layout follows from: comparing it costs a fraction of a microsecond a parameter.

    The parameters, in groups and as the model holds them; their dtype, device and shape; which
    train and have which kind of gradient; and whether a group has momentum, and so state.

    Args:
        groups: parameter groups.
        owners: of the parameters that are stepped.

    Returns:
        Values that can be compared; ``None`` where a module holds one under another name, or
        another one than the groups.
    """
    listed = [parameter for group in groups for parameter in group["params"]]
    try:
        held = [module._parameters[name] for _, module, name in owners]
    except KeyError:
        return None
    numbers = list(map(id, listed)), list(map(id, held))
    if not held or not set(numbers[0]).issuperset(numbers[1]):
        return None
    each = [
        (p.requires_grad, p.dtype, p.device, p.shape, g if (g := p.grad) is None else g.layout)
        for p in listed
    ]
    kinds = [(id(group), len(group["params"]), group.get("momentum", 0) != 0) for group in groups]
    return kinds, each, *numbers


def state_of(bound: Sequence[Any], state: States, name: str) -> list[Any]:
    """State of one name of several matrices.

    Args:
        bound: the matrices.
        state: the optimizer's.
        name: of the state, without the prefix of fused weights.
    """

    def places() -> list[tuple[dict[str, Any], str]]:
        return [(state[item.weight], item.prefix + name) for item in bound]

    return [held[key] for held, key in kept(("state", name), bound, places)]


def _entries(state: States) -> list[Any]:
    """Every entry of a state: its identity, and what a tensor's data can be exchanged for."""
    held = state.values()
    entries = list(chain.from_iterable(map(dict.values, held)))
    tensors = [t for t in entries if type(t) is Tensor or isinstance(t, Tensor)]
    kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
    return [id(state), *map(id, held), *map(id, entries), *kinds]
