"""Kronecker factors of a layer: running averages, damped inverses, the block that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.linalg.factorization import spd_inverse
from hf_precond.linalg.inverses import largest_eigenvalue, newton_step, spd_block_inverse
from hf_precond.linalg.matrix_functions import pack, packed_size, unpack
from hf_precond.linalg.products import Precision, averaging_weight, matmul
from hf_precond.optimizers.base.parameters import BoundMatrix, allocate
from hf_precond.optimizers.nkfac.config import WELL_CONDITIONED
from hf_precond.statistics.moments import rows_of, update_moments
from hf_precond.statistics.requests import MomentRequest

Side = Literal["output", "input"]
Solver = Literal["newton", "exact"]
Count = Callable[[str, int], None]

FLOOR = 1e-4
"""Smallest damping of a factor of unit Frobenius norm (the authors' value)."""

GRADIENT_SCALE = 2.0**20
"""What output gradients are multiplied by before they are squared, since the unit norm takes it out
again: float32 then holds the squares of gradients from 1e-25 to 1e13."""

TINY = 1e-12
"""Norms below this, or above its inverse, may have lost squares to float32's range."""

MAX_ERROR = 0.5
"""Largest rms eigenvalue error of a previous inverse that Newton's step may start from."""

PIECE = 2**18
"""Entries of an inverse that are converted at once on a CPU: they stay in its cache."""

NEWTON_SIZES = {"cpu": math.inf, "cuda": 128}
"""The size from which Newton's step costs less than the exact inverse, by device: never on a CPU
(measured in examples/benchmarks/nkfac.md); on a GPU, which runs products far faster than
factorisations, from here on (not measured yet)."""


@dataclass(frozen=True, eq=False)
class KroneckerFactor:
    """One factor of a layer: L of its output gradients, or R of its inputs.

    Its state lies in the optimizer's state of the layer's weight, each name
    behind the side (``output_factor``): ``factor`` (the running average, a
    packed triangle, ``[n (n + 1) / 2]``), ``inverse`` (of the damped factor,
    ``[n, n]``; in float16 times the damping, so that no eigenvalue exceeds 1),
    ``updates`` (statistics averaged so far, a 0-d tensor) and ``refreshes``
    (inverses computed so far, a number).

    Of a stack of experts each of these is one an expert (``[count, n, n]``, …), and
    a factor may be that of one of them.

    Args:
        bound: the layer.
        side: ``output`` or ``input``.
        states: the optimizer's state, by parameter.
        expert: whose it is in a stack of experts; ``None`` for all of them.
    """

    bound: BoundMatrix
    side: Side
    states: dict[Tensor, dict[str, Any]]
    expert: int | None = None

    @cached_property
    def size(self) -> int:
        """n: ``out`` or ``in(+1)``."""
        matrix = self.bound.matrix
        return matrix.shape[0] if self.side == "output" else matrix.columns

    @cached_property
    def name(self) -> str:
        """Key of its statistic, and its name in messages."""
        own = f"{self.bound.matrix.name}.{self.side}"
        return own if self.expert is None else f"{own}[{self.expert}]"

    def of_experts(self) -> list[KroneckerFactor]:
        """Itself; of a stack of experts the factor of each."""
        stack = self.bound.matrix.stack
        return [replace(self, expert=e) for e in range(stack[0])] if stack else [self]

    def request(self, rows: int | None, scale: float = GRADIENT_SCALE) -> MomentRequest:
        """The second moment that it averages.

        Args:
            rows: the config's ``stat_rows``.
            scale: of output gradients.
        """
        rows = rows_of(rows, self.bound.weight)
        if self.side == "input":
            return MomentRequest(self.name, "input", self.bound.matrix, rows=rows)
        return MomentRequest(self.name, "output_grad", self.bound.matrix, rows=rows, scale=scale)

    def allocate(self, dtype: torch.dtype, inverse_dtype: torch.dtype) -> None:
        """Make the state where it is missing: a factor of zeros, the identity for its inverse.

        Args:
            dtype: the factor's.
            inverse_dtype: its inverse's.
        """
        state, n, device = self.states[self.bound.weight], self.size, self.bound.weight.device
        stack, name = self.bound.matrix.stack, self._key("inverse")
        if name not in state:
            state[name] = torch.zeros((*stack, n, n), dtype=inverse_dtype, device=device)
            state[name].diagonal(dim1=-2, dim2=-1).fill_(1.0)
            state[self._key("refreshes")] = [0] * stack[0] if stack else 0
        elif inverse_dtype != state[name].dtype:
            self._convert(inverse_dtype)
        allocate(state, name, (*stack, n, n), inverse_dtype, device)
        name = self._key("factor")
        if name in state and state[name].dim() == 2 + len(stack):  # release 0.1 kept whole matrices
            state[name] = pack(state[name])
        allocate(state, name, (*stack, packed_size(n)), dtype, device)
        allocate(state, self._key("updates"), stack, torch.int64, device)

    def _convert(self, dtype: torch.dtype) -> None:
        """Keep an inverse in another dtype from now on."""
        inverse = self["inverse"]
        if dtype == torch.float16:
            inverse = inverse.to(self.bound.dtype)
            inverse = inverse / largest_eigenvalue(inverse)[..., None, None]
        self["inverse"] = inverse.to(dtype)

    def whole(self) -> Tensor:
        """The factor as a matrix, ``[n, n]``, in the dtype of the mathematics."""
        factor = self["factor"].to(self.bound.dtype)
        return factor if factor.dim() == 2 + len(self.bound.matrix.stack) else unpack(factor)

    def forget_other_size(self) -> None:
        """Drop the state of a factor that had another size."""
        state = self.states.get(self.bound.weight, {})
        held = state.get(self._key("inverse"))
        if held is not None and held.shape[-1] != self.size:
            for name in ("factor", "inverse", "updates", "refreshes"):
                state.pop(self._key(name), None)

    def __getitem__(self, name: str) -> Any:
        value = self._held[self._key(name)]
        return value if self.expert is None else value[self.expert]

    def __setitem__(self, name: str, value: Any) -> None:
        if self.expert is None:
            self._held[self._key(name)] = value
        else:
            self._held[self._key(name)][self.expert] = value

    @cached_property
    def _held(self) -> dict[str, Any]:
        """The state of its layer: a factor lasts as long as a step's layout, or an expression."""
        return self.states[self.bound.weight]

    @property
    def is_refreshed(self) -> bool:
        """Whether it has an inverse; in a stack of experts, whether any has one."""
        refreshes = self["refreshes"]
        return any(refreshes) if isinstance(refreshes, list) else bool(refreshes)

    def _key(self, name: str) -> str:
        return f"{self.bound.prefix}{self.side}_{name}"


def average_unit_moments(
    factors: Sequence[Tensor], updates: Sequence[Tensor], sums: Sequence[Tensor], decay: float
) -> Tensor:
    """``A ← b A + (1 - b) S / ‖S‖_F`` in place, ``b = min(decay, 1 - 1/k)`` at the k-th update.

    The average has no start-up bias. The unit norm takes out the loss's scale
    and the number of rows. A sum that is not finite, or zero (no rows, no
    gradient) or close to it, says nothing of A's shape: it changes and counts nothing. On a
    GPU a few kernels for all, and nothing is read from it.

    Args:
        factors: A of each, ``[n, n]`` or packed, changed in place.
        updates: k of each, 0-d tensors, changed in place.
        sums: S of each, sums of outer products, ``[n, n]``.
        decay: in [0, 1).

    Returns:
        Per factor 1 where S was not finite, else 0: ``[len(factors)]``.
    """
    average = _average_on_device if devices.is_accelerator(sums[0]) else _average_on_host
    return average(factors, updates, sums, decay)


def _average_on_device(
    factors: Sequence[Tensor], updates: Sequence[Tensor], sums: Sequence[Tensor], decay: float
) -> Tensor:
    total = torch.stack(list(sums))
    largest = total.diagonal(dim1=-2, dim2=-1).amax(-1)
    smallest = _smallest(total)
    total /= largest.clamp(min=smallest)[:, None, None]  # so that squares stay within float32
    norm = torch.linalg.vector_norm(total, dim=(-2, -1))
    empty = largest < smallest
    norm.masked_fill_(empty, torch.nan)
    total = pack(total) if factors[0].dim() == 1 else total
    total /= norm.view(-1, *[1] * (total.dim() - 1))
    return update_moments(factors, updates, total, decay) * ~empty


def _average_on_host(
    factors: Sequence[Tensor], updates: Sequence[Tensor], sums: Sequence[Tensor], decay: float
) -> Tensor:
    """Here reading a number is free, and each pass over a matrix that it saves is not."""
    dropped = torch.zeros(len(factors), dtype=torch.int64)
    for index, (factor, count, total) in enumerate(zip(factors, updates, sums, strict=True)):
        norm, largest = float(torch.linalg.vector_norm(total)), total.diagonal().amax()
        if largest < _smallest(total):
            continue
        if not TINY < norm < 1 / TINY:
            total = _near_one(total, largest)
            norm = float(torch.linalg.vector_norm(total))
        if not math.isfinite(norm):
            dropped[index] = 1
            continue
        count += 1
        keep = averaging_weight(int(count), decay)
        total = pack(total) if factor.dim() == 1 else total
        factor.copy_(factor.to(total.dtype).mul_(keep).add_(total, alpha=(1 - keep) / norm))
    return dropped


def _smallest(total: Tensor) -> float:
    """The largest entry below which digits of a sum are lost: subnormal numbers have few."""
    return torch.finfo(total.dtype).tiny * 2.0**12


def _near_one(total: Tensor, largest: Tensor) -> Tensor:
    """Sums scaled by a power of two, so that the squares of their entries stay within float32.

    No entry exceeds the diagonal's.

    Args:
        total: ``[…, n, n]``.
        largest: entry of each diagonal, ``[…]``.
    """
    exponent = devices.kernel(torch.frexp, largest)[1]
    half = exponent // 2  # the whole power may be out of float32's range
    first, second = (
        torch.exp2(-part.to(total.dtype))[..., None, None] for part in (half, exponent - half)
    )
    return (total * first).mul_(second)


def shift_of(factors: Tensor, damping: float) -> Tensor:
    """``max(1e-4, damping · λmax(A))``, ``[…]``."""
    # One vector will do for large factors, where the products are what it costs.
    columns = 4 if factors.shape[-1] <= 512 else 1
    return (damping * largest_eigenvalue(factors, columns=columns)).clamp(min=FLOOR)


def damp(factors: Tensor, damping: float, shift: Tensor | None = None) -> Tensor:
    """``A + λ I``, ``[…, n, n]``; λ is ``shift``, by default that of :func:`shift_of`."""
    shift = shift_of(factors, damping) if shift is None else shift
    damped = factors.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return damped


def cheaper_solver(size: int, device: torch.device) -> Solver:
    """The cheaper solver of a factor of ``size`` that has an inverse to start from."""
    smallest = NEWTON_SIZES.get(device.type, NEWTON_SIZES["cuda"])
    return "newton" if size >= smallest else "exact"


def invert(
    matrices: Tensor,
    previous: Tensor,
    newton_steps: int,
    damping: float,
    count: Count,
    precision: Precision = "highest",
) -> tuple[Tensor, list[int]]:
    """Inverses of symmetric positive definite matrices that have changed a little.

    By ``newton_steps`` Newton steps from the previous inverse where that is a
    start: its rms eigenvalue error is at most :data:`MAX_ERROR`. Exact
    elsewhere, and for ``newton_steps`` 0. On a GPU the host waits once a batch,
    to know which matrices these are.

    Args:
        matrices: A, ``[b, n, n]``.
        previous: the previous inverses, ``[b, n, n]``.
        newton_steps: 0 for exact inverses.
        damping: at most the smallest eigenvalue over the largest.
        count: called with the name of a counter and a number.
        precision: of the products of Newton's steps.

    Returns:
        The inverses, ``[b, n, n]``, and the indices of the matrices that could
        not be inverted and have their previous inverse.
    """
    if newton_steps == 0:
        return _exact_inverses(matrices, previous, damping, count)
    inverses, error = newton_step(matrices, previous, precision)
    for _ in range(newton_steps - 1):
        inverses, _ = newton_step(matrices, inverses, precision)
    astray = (~(error <= MAX_ERROR)).nonzero().flatten()
    if not len(astray):
        return inverses, []
    count("newton_restarts", len(astray))
    exact, failed = _exact_inverses(matrices[astray], previous[astray], damping, count)
    inverses[astray] = exact
    return inverses, astray[failed].tolist()


def _exact_inverses(
    matrices: Tensor, previous: Tensor, damping: float, count: Count
) -> tuple[Tensor, list[int]]:
    """By blocks where the damping bounds the condition; by Cholesky elsewhere or if that fails."""
    if damping >= WELL_CONDITIONED or matrices.dtype == torch.float64:
        inverses = spd_block_inverse(matrices)
        wrong = (~torch.isfinite(inverses.diagonal(dim1=-2, dim2=-1)).all(-1)).nonzero().flatten()
        if not len(wrong):
            return inverses, []
    else:
        inverses, wrong = torch.empty_like(matrices), torch.arange(len(matrices))
    inverses[wrong], failed = spd_inverse(
        matrices[wrong], previous[wrong], lambda retry: count(f"inverse_{retry}", 1)
    )
    return inverses, wrong[failed].tolist()


def recovery(norms: Tensor, found: Tensor) -> Tensor:
    """What directions are multiplied by to have the gradients' norms; 1 where they are zero.

    Args:
        norms: of the gradients.
        found: of the directions, shaped like ``norms``.
    """
    return torch.where(found > 0, norms / found, 1.0)


@dataclass(frozen=True)
class KroneckerBlock:
    """``L ⊗ R``, acting on ``[W | b]`` (rows stacked) as ``L X R``; also those of several experts.

    Args:
        output: L, ``[…, out, out]``, symmetric; ``None`` for the identity.
        input: R, ``[…, in(+1), in(+1)]``, symmetric; ``None`` for the identity.
    """

    output: Tensor | None
    input: Tensor | None

    def of_experts(self, run: tuple[int, int], dtype: torch.dtype) -> KroneckerBlock:
        """Those of some experts of a stack.

        Args:
            run: the first and the last (exclusive) of them.
            dtype: what they are converted to.
        """
        sides = (None if s is None else s[slice(*run)].to(dtype) for s in (self.output, self.input))
        return KroneckerBlock(*sides)

    def apply(self, matrix: Tensor, precision: Precision = "highest") -> Tensor:
        """``L X R``, ``[out, in(+1)]``; X itself where both are the identity."""
        if self.output is not None:
            matrix = _product(self.output, matrix, precision)
        return matrix if self.input is None else _product(self.input, matrix, precision, right=True)


def _product(
    symmetric: Tensor, matrix: Tensor, precision: Precision, right: bool = False
) -> Tensor:
    """``A X``, or ``X A``, in the dtype of X; A in float16 is converted piece by piece."""
    size = symmetric.shape[-1]
    if symmetric.dtype == matrix.dtype:
        a, b = (matrix, symmetric) if right else (symmetric, matrix)
        return matmul(a, b, precision)
    if size * size <= PIECE:
        return _product(symmetric.to(matrix.dtype), matrix, precision, right)
    result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    rows = max(1, PIECE // size)
    for start in range(0, size, rows):
        place = slice(start, start + rows)
        piece = symmetric[place].to(matrix.dtype)
        if right:
            matmul(matrix, piece.mT, precision, out=result[:, place])
        else:
            matmul(piece, matrix, precision, out=result[place])
    return result
