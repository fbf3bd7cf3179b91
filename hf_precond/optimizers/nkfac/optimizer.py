"""NKFAC: Kronecker-factored curvature whose inverses follow by Newton's iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg.inverses import without_last
from hf_precond.linalg.products import float32_products
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import (
    BoundMatrix,
    Preconditioned,
    grouped,
    in_batches,
    split_stack,
    stacked_gradients,
)
from hf_precond.optimizers.base.refresh import ShardedRefresh
from hf_precond.optimizers.nkfac import factors as kronecker
from hf_precond.optimizers.nkfac import inverses, reference
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.optimizers.nkfac.factors import Factor, KroneckerBlock, factors_of
from hf_precond.optimizers.nkfac.inverses import batches, choose_solver, stacked
from hf_precond.statistics.requests import MomentRequest, Statistic

COUNTERS = ("newton_inverses", "exact_inverses", *inverses.COUNTERS)
BATCH = 1 << 25
"""Elements that are handled in one batch on a GPU: bounds the memory of temporaries."""
FLOOR = 1e-4
"""Smallest damping of a factor of unit Frobenius norm (the authors' value)."""


class NKFAC(PrecondOptimizer):
    """K-FAC with unit-norm factors, lazily refreshed inverses and the gradient's own norm.

    For a layer with weight and bias ``[W | b]`` (``[out, in + 1]``), inputs a
    (a 1 behind them) and output gradients δ, one row a token or position::

        R ← EMA of  Σ a aᵀ / ‖Σ a aᵀ‖_F         every stat_interval steps
        L ← EMA of  Σ δ δᵀ / ‖Σ δ δᵀ‖_F
        R̂ ≈ (R + λ_R I)⁻¹,  L̂ ≈ (L + λ_L I)⁻¹   every inverse_interval steps,
            λ = max(1e-4, damping · λmax)
        Ĝ = L̂ [∇W | ∇b] R̂                        every step
        G̃ = Ĝ ‖G‖_F / ‖Ĝ‖_F                      jointly over weight and bias

    and the base rule (AdamW, SGD with momentum, AdamR) takes G̃ for the
    gradient; its weight decay is decoupled. The averages start without bias,
    ``A ← b A + (1 - b) ·``, ``b = min(stat_decay, 1 - 1/k)`` at the k-th, and
    count an optimizer step once however many micro-batches it has. The unit
    norms take out the loss's scale and the batch's size. λmax is estimated by
    power iteration.

    The first three inverses of a factor, and all of every
    ``exact_interval``-th refresh, are exact. The others take ``newton_steps``
    scaled and safeguarded Newton steps from the previous inverse
    (:func:`~hf_precond.linalg.inverses.newton_step`) where that is cheaper, and
    are exact too elsewhere (``solver="auto"``), and where the previous
    inverse is off by more than half, ``‖I - cBA‖_F > √n/2``. A side wider
    than ``max_dim`` has no factor. Kept per layer in float32:
    ``2 · 4 · (n_in² + n_out²)`` bytes.

    ``reference=True`` reproduces the authors' published code: NKFAC with
    ``base="sgd"`` (weight decay coupled), AdaNKFAC with ``base="adamw"``
    (weight decay inside the bias-corrected step); see
    :mod:`~hf_precond.optimizers.nkfac.reference`.

    Start from the learning rate of the base rule. Signs of trouble:
    ``newton_restarts`` of :meth:`diagnostics` at every refresh (the curvature
    changes faster than it is followed: lower ``inverse_interval``), a loss
    that jumps after a refresh (raise ``damping``), ``statistics_dropped``
    growing (activations or gradients overflow).

    Args:
        param_groups: as for any torch optimizer.
        blocks: ``matrices`` are linear layers and convolutions.
        config: the fields.

    Source: Ying Sun, "Designing effective preconditioned optimizers for deep
    neural network training", PolyU 2024; Martens and Grosse, "Optimizing
    neural networks with Kronecker-factored approximate curvature", 2015.
    """

    config: NKFACConfig

    # What it needs, and keeps ---------------------------------------------------

    def factors(self, bound: BoundMatrix) -> list[Factor]:
        """The factors of a layer."""
        return self._factors[bound]

    def requests(self) -> Sequence[MomentRequest]:
        """The second moments of every factor."""
        rows = self.config.stat_rows
        return [factor.request(rows) for bound in self.bound for factor in self.factors(bound)]

    def due(self, step: int) -> bool:
        """Every ``stat_interval`` steps."""
        return step % self.config.stat_interval == 0

    def allocate(self, bound: BoundMatrix) -> None:
        """Make the factors' state, where it is missing."""
        for factor in self.factors(bound):
            dtype = self.config.factor_dtype(bound.weight.dtype)
            factor.allocate(self.state[bound.weight], dtype)

    def _read(self, factor: Factor, what: str) -> Any:
        return self.state[factor.bound.weight][factor.name(what)]

    # Statistics -------------------------------------------------------------------

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        """One update of every factor that has a statistic."""
        factors = [factor for bound in self.bound for factor in self.factors(bound)]
        found = [(f, statistics[f.key].sum, statistics[f.key].count)
                 for f in factors if f.key in statistics]  # fmt: skip
        lost: dict[str, Tensor] = {}
        for alike in grouped(found, lambda one: (one[0].size, one[1].dtype, one[1].device)):
            for part in in_batches(alike, alike[0][1].numel(), BATCH):
                names = [factor.key for factor, _, _ in part]
                lost |= zip(names, self._average(part).unbind(), strict=True)
        self.count_dropped("statistics_dropped", lost)

    def _average(self, found: Sequence[tuple[Factor, Tensor, Tensor]]) -> Tensor:
        """Update factors of one size by sums and counts; per factor, whether its sum was lost."""
        moments = [self._read(factor, "factor") for factor, _, _ in found]
        updates = [self._read(factor, "updates") for factor, _, _ in found]
        decay = self.config.stat_decay
        if not self.config.reference:
            totals = [total for _, total, _ in found]
            return kronecker.average_unit_moments(moments, updates, totals, decay)
        means = [total / count if f.side == "input" else total for f, total, count in found]
        each = zip(moments, updates, means, strict=True)
        return torch.stack([reference.average_moment(*one, decay) for one in each])

    # Inverses ---------------------------------------------------------------------

    def refresh(self) -> None:
        """New inverses, every ``inverse_interval`` steps, each rank its share of them."""
        if self.steps % self.config.inverse_interval:
            return
        seen = self._seen([f for bound in self.bound for f in self.factors(bound)])
        if not seen:
            return
        costs = [float(factor.size) ** 3 for factor in seen]
        device = self._read(seen[0], "inverse").device
        pieces = ShardedRefresh(seen, costs, device, COUNTERS)

        def work(factors: Sequence[Factor]) -> None:
            self._refresh_batch(factors, pieces)

        with float32_products(tf32=False):
            for batch in grouped(pieces.mine(), self._kind):
                size, _, device, _ = self._kind(batch[0])
                for part in batches(len(batch), size, device):
                    pieces.attempt(work, batch[part])
        pieces.share(lambda factor: [self._read(factor, "inverse")])
        pieces.report(self.failures, lambda factor: factor.key, self.count)
        for factor in seen:
            self.state[factor.bound.weight][factor.name("refreshes")] += 1

    def _seen(self, factors: list[Factor]) -> list[Factor]:
        """Those that have had a statistic: one reading from the device while any has had none."""
        new = [factor for factor in factors if not self._read(factor, "refreshes")]
        if self.config.reference or not new:
            return factors
        counts = torch.stack([self._read(factor, "updates") for factor in new]).tolist()
        unseen = {factor.key for factor, updates in zip(new, counts, strict=True) if not updates}
        return [factor for factor in factors if factor.key not in unseen]

    def _kind(self, factor: Factor) -> tuple[Any, ...]:
        """What the factors of one batch have in common."""
        inverse = self._read(factor, "inverse")
        return factor.size, inverse.dtype, inverse.device, self._newton_steps(factor)

    def _newton_steps(self, factor: Factor) -> int:
        """Newton steps of a factor's refresh that is due; 0 for an exact inverse."""
        config, inverse = self.config, self._read(factor, "inverse")
        if config.reference:
            exact = reference.is_exact(self.steps, config.inverse_interval, config.exact_interval)
            return 0 if exact else config.newton_steps
        number = self.steps // config.inverse_interval
        if self._read(factor, "refreshes") < 3 or number % config.exact_interval == 0:
            return 0
        solver = config.solver
        if solver == "auto":
            solver = choose_solver(factor.size, inverse.device)
        return config.newton_steps if solver == "newton" else 0

    def _refresh_batch(self, factors: Sequence[Factor], pieces: ShardedRefresh[Factor]) -> None:
        """New inverses of factors of one kind."""
        _, dtype, _, newton_steps = self._kind(factors[0])
        moments = stacked([self._read(factor, "factor") for factor in factors], dtype)
        held = [self._read(factor, "inverse") for factor in factors]
        previous = stacked(held, dtype)
        if self.config.reference:
            matrices = reference.damped(moments, self.config.damping, FLOOR)
            found = reference.inverted(
                matrices, previous, newton_steps == 0, self.config.newton_steps
            )
        else:
            damping = self.config.damping
            matrices = inverses.damped(moments, damping, FLOOR)
            found, kept = inverses.invert(matrices, previous, newton_steps, pieces.count, damping)
            pieces.fail(factors, kept)
        torch._foreach_copy_(held, list(found.unbind()))
        pieces.count("newton_inverses" if newton_steps else "exact_inverses", len(factors))

    # Directions -------------------------------------------------------------------

    def precondition(self, bound: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """``L̂ G R̂`` of the gradient's norm, for the base rule."""
        recovered: Callable[[Tensor, Tensor], Tensor] = (
            reference.norm_recovered if self.config.reference else kronecker.norm_recovered
        )
        ready = [item for item in bound if self.factors(item)]
        for batch in self._batches(ready):
            blocks = [self.preconditioner(item) for item in batch]
            gradients = _gradients(batch)
            found = [
                block.apply(gradient, self.config.precision)
                for block, gradient in zip(blocks, gradients, strict=True)
            ]
            directions = stacked(found, gradients.dtype)
            if any(block.output is not None or block.input is not None for block in blocks):
                directions = recovered(gradients, directions)
            parts = split_stack(batch, directions)
            for item, direction, part in zip(batch, directions, parts, strict=True):
                yield Preconditioned(item, direction, parts=part)

    def _batches(self, bound: Sequence[BoundMatrix]) -> Iterator[Sequence[BoundMatrix]]:
        """Layers of one shape that are preconditioned together; on a CPU each in the cache."""
        for alike in grouped(bound, self._shape):
            weight = alike[0].weight
            together = weight.is_cuda and not self.config.reference
            yield from in_batches(alike, weight.numel(), BATCH if together else 0)

    def _shape(self, bound: BoundMatrix) -> tuple[Any, ...]:
        matrix, weight = bound.matrix, bound.weight
        seen = [bool(self._read(factor, "refreshes")) for factor in self.factors(bound)]
        kind = any(seen), bound.bias_rests
        return matrix.shape, matrix.columns, kind, weight.dtype, weight.device

    def preconditioner(self, bound: BoundMatrix) -> KroneckerBlock:
        """``L̂ ⊗ R̂`` of a layer; the identity for a side without an inverse yet."""
        found = {
            factor.side: self._read(factor, "inverse")
            for factor in self.factors(bound)
            if self._read(factor, "refreshes")
        }
        inputs = found.get("input")
        if inputs is not None and bound.bias_rests:
            inputs = without_last(inputs)
        return KroneckerBlock(found.get("output"), inputs)

    def curvature(self, bound: BoundMatrix) -> KroneckerBlock:
        """``L ⊗ R`` of a layer, undamped, each of about unit Frobenius norm."""
        found = {factor.side: self._read(factor, "factor") for factor in self.factors(bound)}
        return KroneckerBlock(found.get("output"), found.get("input"))

    # Beside the state -----------------------------------------------------------------

    def _bind(self) -> None:
        super()._bind()
        self._factors = {item: factors_of(item, self.config.max_dim) for item in self.bound}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_factors": self._factors}


def _gradients(batch: Sequence[BoundMatrix]) -> Tensor:
    """Gradients of layers of one shape, ``[n, out, in(+1)]``; not to be written to."""
    if len(batch) > 1:
        return stacked_gradients(batch)
    gradient = batch[0].gradient()
    assert gradient is not None
    return gradient.unsqueeze(0)
