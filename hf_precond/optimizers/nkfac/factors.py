"""Kronecker-factored curvature of a layer: its two factors, their running averages, the block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_precond.linalg.products import Precision, matmul
from hf_precond.optimizers.base.parameters import BoundMatrix, fit
from hf_precond.statistics.requests import MomentRequest

Side = Literal["input", "output"]
TINY = 1e-12
"""Norms below this, or above its inverse, may have lost squares to float32's range."""


@dataclass(frozen=True)
class Factor:
    """One factor of one layer: ``R`` of its inputs or ``L`` of its output gradients.

    Its state sits in the optimizer's state of the layer's weight: ``factor``
    (the running average, ``[n, n]``), ``inverse`` (of the damped factor,
    ``[n, n]``), ``updates`` (statistics averaged so far, a 0-d tensor) and
    ``refreshes`` (inverses made so far, a number), each name behind the side.

    Args:
        placed: the layer.
        side: ``input`` or ``output``.
    """

    bound: BoundMatrix
    side: Side

    @property
    def size(self) -> int:
        """n: ``in(+1)`` or ``out``."""
        matrix = self.bound.matrix
        return matrix.columns if self.side == "input" else matrix.shape[0]

    @property
    def key(self) -> str:
        """Name of the statistic, and of the factor in messages."""
        return f"{self.bound.matrix.name}.{self.side}"

    def request(self, rows: int) -> MomentRequest:
        """The second moment that this factor averages, of at most ``rows`` rows (0 for all)."""
        kind: Literal["input", "output_grad"] = "input" if self.side == "input" else "output_grad"
        return MomentRequest(self.key, kind, self.bound.matrix, rows=rows)

    def name(self, what: str) -> str:
        """The name of a piece of its state."""
        return f"{self.bound.prefix}{self.side}_{what}"

    def allocate(self, state: dict[str, Any], dtype: torch.dtype) -> None:
        """Make the state where it is missing: no factor yet, the identity for its inverse."""
        size, device = self.size, self.bound.weight.device
        if self.name("factor") in state:
            fit(state, self.name("factor"), (size, size), dtype, device)
            fit(state, self.name("inverse"), (size, size), self.bound.dtype, device)
            fit(state, self.name("updates"), (), torch.int64, device)
            return
        state[self.name("factor")] = torch.zeros(size, size, dtype=dtype, device=device)
        state[self.name("inverse")] = torch.eye(size, dtype=self.bound.dtype, device=device)
        state[self.name("updates")] = torch.zeros((), dtype=torch.int64, device=device)
        state[self.name("refreshes")] = 0


def factors_of(bound: BoundMatrix, max_dim: int) -> list[Factor]:
    """The factors that a layer has: of each side of its weight that is at most ``max_dim`` wide."""
    sides: tuple[Side, Side] = ("output", "input")
    widths = zip(sides, bound.matrix.shape, strict=True)
    return [Factor(bound, side) for side, width in widths if width <= max_dim]


def average_unit_moments(
    moments: Sequence[Tensor], updates: Sequence[Tensor], totals: Sequence[Tensor], decay: float
) -> Tensor:
    """``A ← b A + (1 - b) S / ‖S‖_F`` in place, ``b = min(decay, 1 - 1/k)``, k counting updates.

    The first update sets A, the second averages two, and so on until the decay
    rules: no start-up bias. The unit norm takes the loss's scale and the
    number of rows out. A sum that is not finite, or zero (no rows, no
    gradient), says nothing of A's shape: it changes and counts nothing. No
    host synchronisation; on a GPU a few kernels for all.

    Args:
        moments: A of each factor, all ``[n, n]`` of one dtype, changed in place.
        updates: k so far of each, 0-d tensors, changed in place.
        totals: S of each, sums of outer products, ``[n, n]``.
        decay: in [0, 1).

    Returns:
        Per factor 1 where S was not finite, else 0: ``[len(moments)]``.
    """
    if not totals[0].is_cuda:
        each = zip(moments, updates, totals, strict=True)
        return torch.stack([_average_alone(*one, decay) for one in each])
    total = torch.stack(list(totals))
    kept = torch.stack(list(moments)).to(total.dtype)
    counts = torch.stack(list(updates))
    largest = total.diagonal(dim1=-2, dim2=-1).amax(-1)
    dropped = _average_on_device(kept, counts, total, largest, decay)
    torch._foreach_copy_(list(moments), list(kept.unbind()))
    torch._foreach_copy_(list(updates), list(counts.unbind()))
    return dropped


def _average_alone(moment: Tensor, updates: Tensor, total: Tensor, decay: float) -> Tensor:
    # No entry exceeds the diagonal's; divided by it, the squares stay within float32.
    largest = total.diagonal().amax()
    kept = moment.to(total.dtype)
    dropped = _average_on_host(kept, updates, total, largest, decay)
    moment.copy_(kept)
    return dropped


def _average_on_device(
    kept: Tensor, updates: Tensor, total: Tensor, largest: Tensor, decay: float
) -> Tensor:
    """Without reading a number back; ``[…, n, n]``, updates and largest ``[…]``."""
    total = total / largest[..., None, None]
    norm = torch.linalg.vector_norm(total, dim=(-2, -1))
    usable = torch.isfinite(norm)
    updates += usable
    keep = torch.clamp(1 - 1 / updates.clamp(min=1).to(total.dtype), max=decay)
    weight = torch.where(usable, 1 - keep, 0.0)[..., None, None]
    unit = torch.where(usable[..., None, None], total.div_(norm[..., None, None]), kept)
    kept.lerp_(unit, weight)
    return (~usable & (largest != 0)).to(torch.int64)


def _average_on_host(
    kept: Tensor, updates: Tensor, total: Tensor, largest: Tensor, decay: float
) -> Tensor:
    """Where reading a number is free and a pass over a matrix is not."""
    norm = float(torch.linalg.vector_norm(total))
    if not TINY < norm < 1 / TINY:
        total = total / largest
        norm = float(torch.linalg.vector_norm(total))
    if not math.isfinite(norm):
        return torch.tensor(int(largest != 0))
    updates += 1
    keep = min(decay, 1 - 1 / int(updates))
    kept.mul_(keep).add_(total, alpha=(1 - keep) / norm)
    return torch.tensor(0)


def norm_recovered(gradient: Tensor, direction: Tensor) -> Tensor:
    """``direction`` scaled to the Frobenius norm of ``gradient``, in place; ``[…, out, in]``."""
    wanted, found = (
        torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
        for matrix in (gradient, direction)
    )
    return direction.mul_(torch.where(found > 0, wanted / found, 1.0))


@dataclass(frozen=True)
class KroneckerBlock:
    """``L ⊗ R``, acting on ``[W | b]`` (rows stacked) as ``L X R``.

    Args:
        output: L, ``[out, out]``, symmetric; ``None`` for the identity.
        input: R, ``[in(+1), in(+1)]``, symmetric; ``None`` for the identity.
    """

    output: Tensor | None
    input: Tensor | None

    def apply(self, matrix: Tensor, precision: Precision = "highest") -> Tensor:
        """``L X R``, ``[out, in(+1)]``; X itself where both are the identity."""
        if self.output is not None:
            matrix = matmul(self.output, matrix, precision)
        if self.input is not None:
            matrix = matmul(matrix, self.input, precision)
        return matrix

    def to_matrix(self, out: int, columns: int) -> Tensor:
        """The block as a dense matrix, ``[out · columns, out · columns]``.

        Args:
            out: rows of the layer's matrix.
            columns: its columns, the bias included.
        """
        known = self.output if self.output is not None else self.input
        like = torch.empty(0) if known is None else known
        left, right = (
            torch.eye(size, dtype=like.dtype, device=like.device) if given is None else given
            for size, given in ((out, self.output), (columns, self.input))
        )
        return torch.kron(left, right)
