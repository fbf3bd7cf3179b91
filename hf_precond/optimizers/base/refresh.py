"""Refreshes that ranks share among themselves, in_parts where they fail, and failures in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.distributed import collectives
from hf_precond.linalg.factorization import Cause, cause
from hf_precond.optimizers.base.messages import IN_A_ROW

Item = TypeVar("Item")
Number = float | Tensor

KINDS = ("factor", "out_of_memory", "solver")
"""How a refresh fails: its factor has no decomposition, or computing it was interrupted."""

MAX_FAILURES = 3
"""Refreshes of one preconditioner in a row that may fail before training stops."""
MAX_DROPPED = 10
"""The same for statistics of one layer, gradients and steps."""
LIMITS = dict.fromkeys(("statistic", "gradient", "momentum", "step"), MAX_DROPPED)


class Counters(dict[str, int]):
    """Counts by name; those that only a device knows are kept there, in :attr:`on_device`."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: dict[str, Tensor] = {}

    def add(self, name: str, by: int | Tensor = 1) -> None:
        """Add a number, or a tensor on its device, to a counter.

        Args:
            name: the counter's name.
            by: what is added.
        """
        if isinstance(by, Tensor):
            self.on_device[name] = by + self.on_device.get(name, 0)
        else:
            self[name] = self.get(name, 0) + by


class FailureRecord:
    """Counts failures in a row by name, and stops training where there are too many.

    On a CPU an outcome is judged at once. What only an accelerator knows is
    counted there and copied to the host without waiting; it is judged at the
    first :meth:`check` that finds the copy done. A copy of an optimizer starts
    counting anew.
    """

    def __init__(self) -> None:
        self._on_host: dict[tuple[str, str], int] = {}  # of those whose last attempt failed
        self._on_device: dict[tuple[str, str], Tensor] = {}
        self._changed = False
        self._copies: list[tuple[list[tuple[str, str]], Tensor, Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def note(self, kind: str, name: str, failed: bool) -> None:
        """Record the outcome of an attempt that the host knows.

        Args:
            kind: a key of :data:`~hf_precond.optimizers.base.messages.IN_A_ROW`.
            name: the matrix, for the message.
            failed: whether it failed.

        Raises:
            RuntimeError: too many in a row, with advice.
        """
        failures = self._on_host.pop((kind, name), 0) + 1
        if failed:
            self._on_host[kind, name] = failures
            self._judge(kind, name, failures)

    @property
    def is_clear(self) -> bool:
        """Whether nothing that the host knows of has failed at its last attempt."""
        return not self._on_host

    def watch(self, kind: str, names: Sequence[str], failed: Tensor) -> None:
        """Record outcomes that may be on a device, without waiting for it.

        Args:
            kind: a key of :data:`~hf_precond.optimizers.base.messages.IN_A_ROW`.
            names: the matrices.
            failed: ``[len(names)]``, not zero where it failed.

        Raises:
            RuntimeError: see :meth:`note`.
        """
        if failed.device.type == "cpu":
            flags = failed.tolist()
            if not self.is_clear or any(flags):
                for name, flag in zip(names, flags, strict=True):
                    self.note(kind, name, bool(flag))
            return
        keys = [(kind, name) for name in names]
        found = failed.detach().ne(0).to(torch.int64)
        for key in keys:
            if key not in self._on_device or self._on_device[key].device != found.device:
                self._on_device[key] = torch.zeros((), dtype=found.dtype, device=found.device)
        counts = [self._on_device[key] for key in keys]
        torch._foreach_add_(counts, 1)
        torch._foreach_mul_(counts, list(found.unbind()))
        self._changed = True

    def check(self) -> None:
        """Judge what has reached the host, and send what has changed since.

        Raises:
            RuntimeError: see :meth:`note`.
        """
        copies, self._copies = self._copies, []
        for keys, values, done in copies:
            if not done.query():
                self._copies.append((keys, values, done))
                continue
            for (kind, name), failures in zip(keys, values.tolist(), strict=True):
                self._judge(kind, name, failures)
        if not self._changed or self._copies:
            return
        self._changed = False
        places: dict[torch.device, list[tuple[str, str]]] = {}
        for key, count in self._on_device.items():
            places.setdefault(count.device, []).append(key)
        for keys in places.values():
            counts = torch.stack([self._on_device[key] for key in keys])
            self._copies.append((keys, *devices.copied_to_host(counts)))

    def _judge(self, kind: str, name: str, failures: int) -> None:
        limit = LIMITS.get(kind, MAX_FAILURES)
        if failures >= limit:
            raise RuntimeError(f"{name}: {IN_A_ROW[kind].format(limit=limit)}")


def in_parts(
    work: Callable[[Sequence[Item]], None], items: Sequence[Item], alone: bool = False
) -> list[tuple[Item, Cause]]:
    """``work(items)``; where that is interrupted, once more with each item on its own.

    Args:
        work: changes what it changes at its end, so that it can be called
            again for some of the items when it has failed.
        items: equal pieces of work.
        alone: whether this is the second attempt.

    Returns:
        The items that failed on their own too, and why.
    """
    try:
        work(items)
        return []
    except RuntimeError as error:
        reason = cause(error)
        if reason is None:
            raise
    # Only here are the frames of the failed attempt, and the memory they held, gone.
    if reason == "out_of_memory":
        devices.empty_cache()
    if alone:
        return [(item, reason) for item in items]
    return [failed for item in items for failed in in_parts(work, [item], alone=True)]


class ShardedRefresh(Generic[Item]):
    """The items that are due at one refresh, and which rank computes which.

    The costliest item goes first, to the rank with the least to do. Every rank
    must name the same items in the same order. Failures, counts and numbers
    are summed over the ranks, so that counters, and a stop after too many
    failures in a row, are the same everywhere.

    Args:
        items: what is refreshed.
        costs: cost of each, any unit.
        device: where the sum over ranks runs.
        counters: names that :meth:`count` may be called with.
        numbers: how many numbers of its own each item has (:meth:`put`).
        shared: whether ranks share the items; every rank computes all of them
            otherwise.
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
        self._owners = collectives.assign_owners(costs, None if self._shared else 1)
        # Numbers of the host stay there: one rank on a CPU pays nothing for the bookkeeping.
        rows = (*KINDS, *range(numbers))
        self._values: dict[Any, list[Number]] = {row: [0.0] * len(self.items) for row in rows}
        self._counts: dict[str, Number] = dict.fromkeys(counters, 0.0)

    def mine(self) -> list[Item]:
        """The items that this rank computes."""
        owned = zip(self.items, self._owners, strict=True)
        return [item for item, rank in owned if not self._shared or rank == collectives.rank()]

    def attempt(self, work: Callable[[Sequence[Item]], None], items: Sequence[Item]) -> None:
        """Compute some of this rank's items in one batch, and where that fails one by one.

        Items that fail on their own too keep the preconditioner they have.

        Args:
            work: as for :func:`in_parts`.
            items: items of one shape.
        """
        for item, reason in in_parts(work, items):
            self._values[reason][self._places[id(item)]] = 1.0

    def fail(self, items: Sequence[Item], failed: Tensor | Sequence[bool]) -> None:
        """Say of which items a factor could not be decomposed."""
        row = self._values["factor"]
        for item, flag in zip(items, _numbers(failed), strict=True):
            before = row[self._places[id(item)]]
            if isinstance(flag, Tensor) and isinstance(before, Tensor):
                flag = torch.maximum(before, flag)
            row[self._places[id(item)]] = flag if isinstance(flag, Tensor) else flag or before

    def count(self, name: str, by: Number = 1) -> None:
        """Add to a counter."""
        on_device = isinstance(by, Tensor) and by.device.type != "cpu"
        self._counts[name] += by if on_device else float(by)

    def put(self, number: int, items: Sequence[Item], values: Tensor) -> None:
        """Set a number of some of this rank's items."""
        for item, value in zip(items, _numbers(values), strict=True):
            self._values[number][self._places[id(item)]] = value

    def number(self, number: int, item: Item) -> Number:
        """A number of an item, whichever rank computed it; a 0-d tensor on an accelerator."""
        return self._values[number][self._places[id(item)]]

    def interrupted(self, item: Item) -> Number:
        """1 where computing an item was interrupted, else 0; after :meth:`share` on any rank."""
        place = self._places[id(item)]
        return self._values["out_of_memory"][place] + self._values["solver"][place]

    def share(self, results: Callable[[Item], Sequence[Tensor]]) -> None:
        """Send everybody the results of every item, the failures and the counts.

        Args:
            results: the tensors that hold an item's result; neighbours in
                memory, in their order, are sent without a copy.
        """
        if not self._shared:
            return
        collectives.broadcast_results([results(item) for item in self.items], self._owners)
        rows = [*self._values.values(), list(self._counts.values())]
        values = [value for row in rows for value in row]
        known = [0.0 if isinstance(value, Tensor) else value for value in values]
        numbers = torch.tensor(known, dtype=devices.widest(self.device), device=self.device)
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                numbers[place] = value
        values = _numbers(collectives.sum_over_ranks(numbers))
        size = len(self.items)
        for place, row in enumerate(self._values):
            self._values[row] = values[place * size : (place + 1) * size]
        tail = values[len(self._values) * size :]
        self._counts = dict(zip(self._counts, tail, strict=True))

    def report(
        self,
        failures: FailureRecord,
        name: Callable[[Item], str],
        count: Callable[[str, int | Tensor], None],
        zeros: bool = False,
    ) -> None:
        """Hand failures and counts to the optimizer. Nothing is read from a device.

        Interrupted items count as ``refresh_out_of_memory`` and ``refresh_solver``.

        Args:
            failures: the optimizer's record.
            name: an item's name, for the message.
            count: the optimizer's counter.
            zeros: name counters that counted nothing too.

        Raises:
            RuntimeError: see :meth:`FailureRecord.note`.
        """
        counts = dict(self._counts)
        counts |= {f"refresh_{kind}": sum(self._values[kind]) for kind in KINDS[1:]}
        for key, value in counts.items():
            if isinstance(value, Tensor):
                count(key, value.to(torch.int64))
            elif value or (zeros and key in self._counts):
                count(key, int(value))
        for kind in KINDS:
            flags = self._values[kind]
            if failures.is_clear and {*map(type, flags)} == {float} and not any(flags):
                continue
            flagged = list(zip(self.items, flags, strict=True))
            for item, flag in flagged:
                if not isinstance(flag, Tensor):
                    failures.note(kind, name(item), bool(flag))
            known = [(name(item), flag) for item, flag in flagged if isinstance(flag, Tensor)]
            if known:
                names, unknown = zip(*known, strict=True)
                failures.watch(kind, names, torch.stack(unknown))


def _numbers(values: Tensor | Sequence[bool]) -> list[Number]:
    """Each value: a number where the host knows it, else a 0-d tensor."""
    if not isinstance(values, Tensor):
        return [float(value) for value in values]
    if values.device.type != "cpu":
        return list(values.to(devices.widest(values.device)).unbind())
    return [float(value) for value in values.tolist()]
