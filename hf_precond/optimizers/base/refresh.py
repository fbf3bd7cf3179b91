"""A refresh whose pieces are computed each by one rank, and known to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hf_precond.distributed import collectives
from hf_precond.linalg.factorization import Cause, cause
from hf_precond.optimizers.base.failures import FailureRecord

Item = TypeVar("Item")
Number = float | Tensor
KINDS = ("factor", "out_of_memory", "solver")
"""How a piece can fail: its factor has no decomposition, or computing it broke off."""


class ShardedRefresh(Generic[Item]):
    """What is due at one refresh, and which rank computes what.

    The costliest piece goes first, to the rank with the least to do. Every
    rank must name the same pieces in the same order. What the owner finds on
    the way (failures, counts) is told to all in one sum, so that counters,
    and a stop after too many failures in a row, are the same everywhere.

    Args:
        items: the pieces.
        costs: cost of each, any unit.
        device: where the sum over ranks runs.
        counters: names that :meth:`count` may be called with.
        numbers: how many numbers of its own each piece has (:meth:`put`).
        shared: whether ranks share the pieces out; every rank computes all of
            them otherwise.
    """

    def __init__(
        self,
        items: Sequence[Item],
        costs: Sequence[float],
        device: torch.device,
        counters: Sequence[str] = (),
        numbers: int = 0,
        shared: bool = True,
    ) -> None:
        self.items, self.device = list(items), device
        self._shared = shared and collectives.world_size() > 1
        self._places = {id(item): place for place, item in enumerate(self.items)}
        ranks = None if self._shared else 1
        self._owners = collectives.owners(costs, ranks)
        size = len(self.items)
        self._counters = {name: len(KINDS) * size + n for n, name in enumerate(counters)}
        self._numbers = len(KINDS) * size + len(counters)
        # Numbers of the host stay there: one rank on a CPU pays nothing for all this.
        self._values: list[Number] = [0.0] * (self._numbers + numbers * size)

    def mine(self) -> list[Item]:
        """The pieces that this rank computes."""
        return [item for item, owner in self._owned() if self._is_mine(owner)]

    def others(self) -> list[Item]:
        """The pieces that other ranks compute."""
        return [item for item, owner in self._owned() if not self._is_mine(owner)]

    def attempt(
        self, work: Callable[[Sequence[Item]], None], items: Sequence[Item]
    ) -> None:
        """Compute some of this rank's pieces in one batch, and where that fails one by one.

        Pieces that fail on their own too keep the preconditioner they have.

        Args:
            work: as for :func:`in_parts`.
            items: pieces of one shape.
        """
        for item, why in in_parts(work, items):
            self._values[self._flag(why, item)] = 1.0

    def fail(self, items: Sequence[Item], failed: Tensor | Sequence[bool]) -> None:
        """Say of which pieces a factor could not be decomposed."""
        for item, flag in zip(items, _numbers(failed), strict=True):
            place = self._flag("factor", item)
            before = self._values[place]
            if isinstance(flag, Tensor) and isinstance(before, Tensor):
                flag = torch.maximum(before, flag)
            self._values[place] = flag if isinstance(flag, Tensor) else flag or before

    def count(self, name: str, by: Number = 1) -> None:
        """Add to a counter."""
        on_gpu = isinstance(by, Tensor) and by.is_cuda
        self._values[self._counters[name]] += by if on_gpu else float(by)

    def put(self, number: int, items: Sequence[Item], values: Tensor) -> None:
        """Set a number of some of this rank's pieces."""
        for item, value in zip(items, _numbers(values), strict=True):
            self._values[self._own(number, item)] = value

    def number(self, number: int, item: Item) -> Number:
        """A number of a piece, wherever it was computed; a 0-d tensor where that is a GPU."""
        return self._values[self._own(number, item)]

    def interrupted(self, item: Item) -> Number:
        """1 where computing a piece broke off, else 0; after :meth:`share` wherever it was."""
        flags = [self._values[self._flag(kind, item)] for kind in KINDS[1:]]
        return flags[0] + flags[1]

    def share(self, results: Callable[[Item], Sequence[Tensor]]) -> None:
        """Give everybody the results of every piece, and what was found on the way.

        Args:
            results: the tensors that hold a piece's result; neighbours in
                memory, in their order, are sent without a copy.
        """
        if not self._shared:
            return
        collectives.share([results(item) for item in self.items], self._owners)
        known = [0.0 if isinstance(value, Tensor) else value for value in self._values]
        numbers = torch.tensor(known, dtype=torch.float64, device=self.device)
        for place, value in enumerate(self._values):
            if isinstance(value, Tensor):
                numbers[place] = value
        self._values = _numbers(collectives.total(numbers))

    def report(
        self,
        failures: FailureRecord,
        name: Callable[[Item], str],
        count: Callable[[str, int | Tensor], None],
        zeros: bool = False,
    ) -> None:
        """Hand failures and counts to the optimizer. Nothing is read from a GPU.

        Interrupted pieces count as ``refresh_out_of_memory`` and
        ``refresh_solver``.

        Args:
            failures: what counts failures in a row.
            name: an item's name, for the message.
            count: the optimizer's counter.
            zeros: name counters that counted nothing too.

        Raises:
            RuntimeError: see :meth:`FailureRecord.note`.
        """
        counts = {key: self._values[place] for key, place in self._counters.items()}
        for kind in KINDS[1:]:
            flags = [self._values[self._flag(kind, item)] for item in self.items]
            counts[f"refresh_{kind}"] = sum(flags)
        for key, value in counts.items():
            if isinstance(value, Tensor):
                count(key, value.to(torch.int64))
            elif value or (zeros and key in self._counters):
                count(key, int(value))
        for kind in KINDS:
            for item in self.items:
                flag = self._values[self._flag(kind, item)]
                if isinstance(flag, Tensor):
                    failures.watch(kind, [name(item)], flag[None])
                else:
                    failures.note(kind, name(item), bool(flag))

    def _is_mine(self, owner: int) -> bool:
        return not self._shared or collectives.is_mine(owner)

    def _owned(self) -> list[tuple[Item, int]]:
        return list(zip(self.items, self._owners, strict=True))

    def _flag(self, kind: str, item: Item) -> int:
        return KINDS.index(kind) * len(self.items) + self._places[id(item)]

    def _own(self, number: int, item: Item) -> int:
        return self._numbers + number * len(self.items) + self._places[id(item)]


def in_parts(
    work: Callable[[Sequence[Item]], None], items: Sequence[Item], last: bool = False
) -> list[tuple[Item, Cause]]:
    """``work(items)``; where that fails by :func:`cause`, once more with each item on its own.

    Args:
        work: changes what it changes at its end, so that it can be called
            again for some of the items when it has failed.
        items: equal pieces of work.
        last: whether this is the last attempt already.

    Returns:
        The items that failed on their own too, and why.
    """
    try:
        work(items)
        return []
    except RuntimeError as error:
        found = cause(error)
        if found is None:
            raise
    # Only here are the frames of the failed attempt, and what they held, gone.
    if found == "out_of_memory" and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if last:
        return [(item, found) for item in items]
    return [failed for item in items for failed in in_parts(work, [item], last=True)]


def _numbers(values: Tensor | Sequence[bool]) -> list[Number]:
    """Each value: on the host where it is there, else as a 0-d tensor."""
    if not isinstance(values, Tensor):
        return [float(value) for value in values]
    if values.is_cuda:
        return list(values.to(torch.float64).unbind())
    return [float(value) for value in values.tolist()]
