"""Second moments of rows, and the stage where their sums wait for the optimizer's step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    maybe_get_bdim,
)

from hf_precond.linalg.gram import gram
from hf_precond.statistics.requests import Statistic


def weigh(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows times their weights."""
    return rows if weights is None else rows * weights.unsqueeze(-1)


def moment(
    rows: Tensor, weights: Tensor | None, *, constant: bool, out: Tensor | None = None
) -> Tensor:
    """``sum of w x̂ x̂ᵀ`` over the second-last dimension.

    Args:
        rows: ``[…, n, d]``.
        weights: ``[…, n]``, or ``None`` for ones.
        constant: put a 1 behind every row: ``[…, d + 1, d + 1]``.
        out: where to write the moment of ``[n, d]``, of any strides.
    """
    if rows.dim() == 2:
        return _flat_moment(rows, weights, constant, out)
    weighted = weigh(rows, weights)
    product = weighted.mT @ rows
    if not constant:
        return product
    size = rows.shape[-1]
    result = product.new_empty(*product.shape[:-2], size + 1, size + 1)
    result[..., :size, :size] = product
    _border(result, rows, weights, weighted.sum(-2))
    return result


def _flat_moment(
    rows: Tensor, weights: Tensor | None, constant: bool, out: Tensor | None
) -> Tensor:
    """:func:`moment` of ``[n, d]``."""
    if not constant:
        return gram(rows, weights, out=out)
    size = rows.shape[-1]
    result = rows.new_empty(size + 1, size + 1) if out is None else out
    gram(rows, weights, out=result[:size, :size])
    total = (rows.new_ones(len(rows)) if weights is None else weights) @ rows
    _border(result, rows, weights, total)
    return result


def _border(result: Tensor, rows: Tensor, weights: Tensor | None, total: Tensor) -> None:
    """Fill the row and column of the constant 1."""
    size = rows.shape[-1]
    result[..., size, :size] = total
    result[..., :size, size] = total
    corner = result[..., size, size]
    if weights is None:
        corner.fill_(rows.shape[-2])  # an assignment would copy the number from the host, and wait
    else:
        corner.copy_(weights.sum(-1))


def block_moment(
    rows: Tensor, weights: Tensor | None, *, constant: bool, blocks: int
) -> Tensor:
    """The diagonal blocks of :func:`moment`, and nothing else computed.

    Args:
        rows: ``[n, d]``.
        weights: ``[n]``, or ``None`` for ones.
        constant: put a 1 behind every row.
        blocks: their number.

    Returns:
        ``[blocks, w, w]``, ``w = ceil(columns / blocks)``, zeros beyond the
        last column.
    """
    columns = rows.shape[-1] + constant
    width = -(-columns // blocks)
    result = rows.new_zeros(blocks, width, width)
    for number in range(blocks):
        start, stop = number * width, min((number + 1) * width, columns)
        if start >= columns:
            break
        part = rows[:, start : min(stop, rows.shape[-1])]
        last = constant and stop == columns
        size = stop - start
        result[number, :size, :size] = moment(part, weights, constant=last)
    return result


def centred(rows: Tensor, weights: Tensor | None) -> Tensor:
    """``[…, n, d]`` less the (weighted) mean over each sequence of n."""
    if weights is None:
        return rows - rows.mean(-2, keepdim=True)
    total = weights.sum(-1, keepdim=True).clamp(min=1).unsqueeze(-1)
    return rows - weigh(rows, weights).sum(-2, keepdim=True) / total


def count_of(rows: int, weights: Tensor | None, like: Tensor) -> Tensor:
    """Number of rows, weighted, as a 0-d tensor; nothing is read from the device."""
    return like.new_full((), rows) if weights is None else weights.sum().to(like.dtype)


@dataclass(frozen=True)
class Part:
    """What one call of a layer adds to a collection's sum and count.

    Args:
        collection: the collection's name.
        sum: the sum.
        count: the count.
        spare: whether the sum's memory is one of :class:`Spares`.
    """

    collection: str
    sum: Tensor
    count: Tensor
    spare: bool = False


class Spares:
    """Square matrices that are needed again and again, on a CPU.

    There fresh pages cost a sixth of the product that is written to them. A
    GPU has its caching allocator.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def take(self, size: int, like: Tensor) -> Tensor:
        """An uninitialised ``[size, size]``, for the caller alone until it is given back."""
        idle = self._idle.get((size, like.dtype))
        if idle:
            return idle.pop()
        # Rows that start at a multiple of 64 bytes make products faster.
        return like.new_empty(size, -(-size // 16) * 16)[:, :size]

    def give(self, matrix: Tensor) -> None:
        """Give back what :meth:`take` gave; nobody else may hold it."""
        self._idle.setdefault((len(matrix), matrix.dtype), []).append(matrix)

    def clear(self) -> None:
        """Give the memory back."""
        self._idle.clear()


def _outside(part: Part) -> Part:
    """A part that the transforms of ``torch.func`` made, as plain tensors.

    Under ``vmap`` (gradients of single samples) it stands for one of every sample.
    """
    total, count = part.sum, part.count
    while is_functorch_wrapped_tensor(total):
        if is_batchedtensor(total):
            dim, total = maybe_get_bdim(total), get_unwrapped(total)
            samples, total = total.shape[dim], total.sum(dim)
            if is_batchedtensor(count):
                count = get_unwrapped(count).sum(maybe_get_bdim(count))
            else:
                count = count * samples
        else:
            total = get_unwrapped(total)
            count = get_unwrapped(count) if is_gradtrackingtensor(count) else count
    while is_functorch_wrapped_tensor(count):
        count = get_unwrapped(count)
    return Part(part.collection, total, count)


class StatisticsBuffer:
    """Sums and counts by collection."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.spares = Spares()
        self.owed: dict[str, Tensor] = {}
        self.lent: list[Tensor] = []
        self.epoch = 0  # counts how often it was emptied

    def add(self, part: Part) -> None:
        """Add what one call brought."""
        if is_functorch_wrapped_tensor(part.sum):
            part = _outside(part)
        if part.collection in self.sums:
            self.sums[part.collection].add_(part.sum)
            self.counts[part.collection].add_(part.count)
            if part.spare:
                self.spares.give(part.sum)
        else:
            self.sums[part.collection] = part.sum
            self.counts[part.collection] = part.count.clone()
            if part.spare:
                self.owed[part.collection] = part.sum

    def get(self, collection: str) -> Statistic | None:
        """What was added to a collection, or ``None`` when nothing was."""
        if collection not in self.sums:
            return None
        return Statistic(self.sums[collection], self.counts[collection])

    def lend(self) -> None:
        """Forget everything; whoever got it may keep it until :meth:`recycle`, if that comes."""
        self.lent = list(self.owed.values())
        self.owed.clear()
        self.clear()

    def recycle(self) -> None:
        """Use the memory of what was last lent for the next sums."""
        for matrix in self.lent:
            self.spares.give(matrix)
        self.lent = []

    def clear(self) -> None:
        """Forget everything."""
        for matrix in self.owed.values():
            self.spares.give(matrix)
        self.epoch += 1
        self.owed.clear()
        self.sums.clear()
        self.counts.clear()


def no_autocast(device: torch.device) -> torch.autocast:
    """Moments are summed in their own dtype, whatever autocast says."""
    return torch.autocast(device.type, enabled=False)
