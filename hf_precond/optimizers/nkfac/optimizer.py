"""NKFAC: Kronecker-factored curvature whose inverses follow by Newton's iteration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.hidden import ROUTER, experts_of
from hf_precond.architectures.modules import find_matrices, is_layer
from hf_precond.architectures.parameters import ParameterSurvey, add_reason
from hf_precond.architectures.structure import LayerMatrix, ModelStructure
from hf_precond.compat import devices
from hf_precond.linalg.factorization import RETRIES
from hf_precond.linalg.inverses import without_last
from hf_precond.linalg.matrix_functions import unpack
from hf_precond.linalg.products import Precision, float32_products
from hf_precond.optimizers.base.layout import kept, state_of
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import (
    BoundMatrix,
    Preconditioned,
    grouped,
    in_batches,
)
from hf_precond.optimizers.base.refresh import ShardedRefresh
from hf_precond.optimizers.nkfac import factors as kronecker
from hf_precond.optimizers.nkfac.config import WELL_CONDITIONED, NKFACConfig
from hf_precond.optimizers.nkfac.factors import (
    Count,
    KroneckerBlock,
    KroneckerFactor,
    Side,
    average_unit_moments,
)
from hf_precond.registry import register_optimizer
from hf_precond.statistics.requests import MomentRequest, Statistic

COUNTERS = (
    "newton_inverses", "exact_inverses", "newton_restarts", *(f"inverse_{r}" for r in RETRIES)
)  # fmt: skip
GPU_BATCH = 2**25
"""Entries that are handled in one batch on a GPU: bounds the memory of temporaries."""
INVERSE_BATCH = {"cpu": 2**20, "cuda": 2**26}
"""Entries of the factors inverted in one batch: more gain nothing, and cost memory."""

EXPERT_WIDTH = 8
"""Width of a side of experts that has a factor, over the other side, at most: so that the factors
of many narrow experts hold at most 16 numbers a weight, and two."""


def layer_matrices(model: nn.Module, config: NKFACConfig) -> ModelStructure:
    """Find the linear layers and convolutions of a model, the bias joined, fused weights whole.

    Left to the fallback optimizer: embeddings, tied weights (their gradient is
    a sum of several uses), the projections of ``nn.MultiheadAttention`` (which
    calls no layer that could be read), layers with both sides wider than
    ``max_dim``.

    Args:
        model: the model.
        config: ``max_dim`` and ``base``.

    Raises:
        ValueError: when no layer is left.
    """
    survey = ParameterSurvey(model)
    hidden = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    matrices: list[LayerMatrix] = []
    preconditioned: dict[str, str] = {}
    reasons = dict.fromkeys(survey.routers, ROUTER)
    stacks = dict(experts_of(survey))
    own = {matrix.weight_parameter: matrix for matrix in stacks}
    for found in find_matrices(model):
        matrix, module = own.get(found.weight_parameter, found), found.module
        name = survey.name_of(matrix.weight_parameter)
        layer = is_layer(module) and matrix.of_layer
        if (not layer and not matrix.stack) or name in {*survey.tied, *survey.routers}:
            continue
        widest = widest_side(matrix, config.max_dim)
        wide = [side for side in matrix.shape if side > widest]
        if module in hidden:
            reasons[name] = "nn.MultiheadAttention calls no layer whose gradient could be read"
        elif len(wide) == 2:
            reasons[name] = f"both sides wider than max_dim={config.max_dim}"
        else:
            matrices.append(matrix)
            limit = "" if widest < config.max_dim else f" (max_dim={config.max_dim})"
            one_sided = f", one side only{limit}" if wide else ""
            names = survey.matrix_names(matrix)
            what = stacks[matrix] if matrix.stack else survey.describe(name)
            add_reason(preconditioned, names, what + one_sided)
    if not matrices:
        raise ValueError(
            "nkfac: this model has no linear layer or convolution that trains, is not tied and is "
            f"at most max_dim={config.max_dim} wide on a side; unfreeze one, raise max_dim, or "
            "choose adamr."
        )
    return survey.structure(config, preconditioned, reasons, matrices=matrices)


def widest_side(matrix: LayerMatrix, max_dim: int) -> int:
    """The widest side of a weight that has a factor.

    Args:
        matrix: the weight; of experts no side has one that is much wider than the other.
        max_dim: the config's.
    """
    return min(max_dim, EXPERT_WIDTH * min(matrix.shape)) if matrix.stack else max_dim


@register_optimizer(
    "nkfac",
    config=NKFACConfig,
    select=layer_matrices,
    description="K-FAC, each inverse by Newton's iteration from the one before",
    memory="¾m² + ¾n² (in float32's size), and the fallback's",
    start="1e-3",
)
class NKFAC(PrecondOptimizer):
    """K-FAC with unit-norm factors, lazily refreshed inverses and the gradient's own norm.

    For a layer with weight and bias ``[W | b]`` (``[out, in + 1]``), inputs a
    (a 1 behind them) and output gradients δ, one row a token or position::

        R ← EMA of  Σ a aᵀ / ‖Σ a aᵀ‖_F         every stat_interval steps
        L ← EMA of  Σ δ δᵀ / ‖Σ δ δᵀ‖_F
        R̂ ≈ (R + λ_R I)⁻¹,  L̂ ≈ (L + λ_L I)⁻¹   with the first statistics, then every
            inverse_interval steps, λ = max(1e-4, damping · λmax)
        Ĝ = L̂ [∇W | ∇b] R̂                        every step
        G̃ = Ĝ ‖G‖_F / ‖Ĝ‖_F                      jointly over weight and bias

    and the fallback optimizer (AdamW, SGD with momentum, AdamR) takes G̃ for
    the gradient; its weight decay is decoupled. The averages start without
    bias, ``A ← b A + (1 - b) ·``, ``b = min(stat_decay, 1 - 1/k)`` at the k-th,
    and count an optimizer step once however many micro-batches it has. The
    unit norms take out the loss's scale and the batch's size. λmax is
    estimated by power iteration.

    The first three inverses of a factor, and all of every
    ``exact_interval``-th refresh, are exact. The others take ``newton_steps``
    scaled and safeguarded Newton steps from the previous inverse
    (:func:`~hf_precond.linalg.inverses.newton_step`) where that is cheaper,
    and are exact too elsewhere (``solver="auto"``), and where the previous
    inverse is off by more than half, ``‖I - cBA‖_F > √n/2``. A side wider
    than ``max_dim`` has no factor. Kept per layer, by default:
    ``3 · (n_in² + n_out²)`` bytes, a packed triangle and an inverse in float16
    (see :class:`~hf_precond.optimizers.nkfac.config.NKFACConfig`); with
    ``state_dtype="float32"`` twice as much. The rounding turns a direction by
    a cosine of 1 - 1e-5 on MiniLM, one statistic more by 1 - 2e-3. On an
    accelerator a step needs memory for two batches of :data:`GPU_BATCH` entries,
    or two layers, over AdamW or SGD.

    ``reference=True`` reproduces the authors' published code: NKFAC with
    ``base="sgd"`` (weight decay coupled), AdaNKFAC with ``base="adamw"``
    (weight decay inside the bias-corrected step); see
    :class:`~hf_precond.optimizers.nkfac.reference.NKFACReference`.

    Start from the learning rate of the fallback optimizer. Signs of trouble:
    ``newton_restarts`` of :meth:`diagnostics` at every refresh (the curvature
    changes faster than it is followed: lower ``inverse_interval``), a loss
    that jumps after a refresh (raise ``damping``), ``statistics_dropped``
    growing (activations or gradients overflow).

    Args:
        params: parameters, pairs of names and parameters, or groups, as for any
            torch optimizer.
        structure: ``matrices`` are linear layers and convolutions, where it was read already (then
            with ``config``); by default it is read off the model.
        config: a config, in the place of fields, or changed by them.
        optimizer_dict: what some trainers call ``params``.
        attach_to: the model; without it, call :meth:`attach` before the first
            step. ``hf_precond.create_optimizer`` makes groups too.
        **fields: of the config.

    Source: Ying Sun, "Designing effective preconditioned optimizers for deep
    neural network training", PolyU 2024; Martens and Grosse, "Optimizing
    neural networks with Kronecker-factored approximate curvature", 2015.
    """

    config: NKFACConfig
    arrived: Sequence[KroneckerFactor] = ()  # had a statistic at this step, and no inverse so far

    def __new__(
        cls, params: Any = None, structure: Any = None, config: Any = None, **fields: Any
    ) -> NKFAC:
        """Choose ``NKFACReference`` for a config with ``reference=True``."""
        if cls is NKFAC and fields.get("reference", getattr(config, "reference", False)):
            from hf_precond.optimizers.nkfac.reference import NKFACReference

            return super().__new__(NKFACReference)
        return super().__new__(cls)

    # Statistics -------------------------------------------------------------------

    def factors(self, bound: BoundMatrix) -> list[KroneckerFactor]:
        """The factors of a layer: one for each side of its weight that ``max_dim`` allows.

        Args:
            bound: the layer's matrix.
        """
        return kept("factors", [bound], partial(self._factors, bound))

    def _factors(self, bound: BoundMatrix) -> list[KroneckerFactor]:
        sides: tuple[Side, Side] = ("output", "input")
        widest = widest_side(bound.matrix, self.config.max_dim)
        return [
            KroneckerFactor(bound, side, self.state)
            for side, width in zip(sides, bound.matrix.shape, strict=True)
            if width <= widest
        ]

    def all_factors(self) -> list[KroneckerFactor]:
        """The factors of all layers."""
        return [factor for bound in self.bound for factor in self.factors(bound)]

    def requests(self) -> Sequence[MomentRequest]:
        """The second moments of every factor."""
        return [factor.request(self.config.stat_rows) for factor in self.all_factors()]

    def due(self, step: int) -> bool:
        """Every ``stat_interval`` steps."""
        return step % self.config.stat_interval == 0

    def attach(self, model: nn.Module) -> None:
        """Read ``model`` again; the factor of an input that got or lost its bias starts anew.

        Args:
            model: the model, whose parameters this optimizer holds.

        Raises:
            RuntimeError: the optimizer was not built by ``create_optimizer``.
        """
        super().attach(model)
        for factor in self.all_factors():
            factor.forget_other_size()

    def allocate(self, bound: BoundMatrix) -> None:
        """Make the factors' state, where it is missing."""
        kept = self.config.factor_dtype(bound.weight.dtype)
        halves = self.config.halves(bound.weight.dtype)
        for factor in self.factors(bound):
            factor.allocate(kept, kept if halves else bound.dtype)

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        """Average the new second moments into the factors that have one."""
        seen: list[KroneckerFactor] = []
        answers: dict[KroneckerFactor, Statistic] = {}
        for factor in self.all_factors():
            if factor.name in statistics:
                own = factor.of_experts()
                seen += own
                answers |= zip(own, _of_experts(factor, statistics[factor.name]), strict=True)
        self.arrived = [factor for factor in seen if not factor["refreshes"]]
        dropped: dict[str, Tensor] = {}
        for alike in grouped(seen, lambda f: (f.size, f.bound.dtype, f.bound.weight.device)):
            limit = GPU_BATCH if devices.is_accelerator(alike[0].bound.weight) else 0
            for batch in in_batches(alike, alike[0].size ** 2, limit):
                flags = self.average(batch, [answers[factor] for factor in batch])
                dropped |= zip([factor.name for factor in batch], flags.unbind(), strict=True)
        self.count_dropped("statistics_dropped", dropped)

    def average(
        self, factors: Sequence[KroneckerFactor], statistics: Sequence[Statistic]
    ) -> Tensor:
        """Average a statistic into each factor; see :func:`average_unit_moments`.

        Args:
            factors: of one size, dtype and device.
            statistics: one a factor.

        Returns:
            1 where a statistic was not finite and dropped, else 0, ``[len(factors)]``.
        """
        return average_unit_moments(
            [factor["factor"] for factor in factors],
            [factor["updates"] for factor in factors],
            [statistic.sum for statistic in statistics],
            self.config.stat_decay,
        )

    # Inverses ---------------------------------------------------------------------

    def refresh(self) -> None:
        """New inverses, every ``inverse_interval`` steps; each rank computes its share.

        A factor whose first statistics come later (of a layer behind a gate that was zero, say)
        gets its first inverse with them.
        """
        regular = self.steps % self.config.inverse_interval == 0
        whole = self.all_factors() if regular else ()
        every = [own for factor in whole for own in factor.of_experts()]
        due = self.factors_to_invert(every if regular else self.arrived)
        self.arrived = ()
        if not due:
            return

        def kind(factor: KroneckerFactor) -> tuple[Any, ...]:
            bound = factor.bound
            return factor.size, bound.dtype, bound.weight.device, self.newton_steps(factor)

        costs = [float(factor.size) ** 3 for factor in due]
        sharded = ShardedRefresh(due, costs, due[0].bound.weight.device, COUNTERS)
        with float32_products("highest", due[0].bound.weight):
            for alike in grouped(sharded.mine(), kind):
                limit = INVERSE_BATCH.get(alike[0].bound.weight.device.type, INVERSE_BATCH["cuda"])
                for batch in in_batches(alike, alike[0].size ** 2, limit):
                    sharded.attempt(partial(self._invert, sharded), batch)
        sharded.share(lambda factor: [factor["inverse"]])
        sharded.report(self.failures, lambda factor: factor.name, self.count)
        for factor in due:
            factor["refreshes"] += 1

    def factors_to_invert(self, factors: Sequence[KroneckerFactor]) -> Sequence[KroneckerFactor]:
        """The factors that have had a statistic: the device is read while any has had none.

        Args:
            factors: those to be refreshed.
        """
        new = [factor for factor in factors if not factor["refreshes"]]
        if not new:
            return factors
        updates = torch.stack([factor["updates"] for factor in new]).tolist()
        empty = {factor.name for factor, count in zip(new, updates, strict=True) if not count}
        return [factor for factor in factors if factor.name not in empty]

    def newton_steps(self, factor: KroneckerFactor) -> int:
        """How many Newton steps a factor's inverse takes at this refresh.

        Args:
            factor: the factor.

        Returns:
            At least 1, or 0 for an exact inverse.
        """
        config = self.config
        number = self.steps // config.inverse_interval
        if factor["refreshes"] < 3 or number % config.exact_interval == 0:
            return 0
        solver = config.solver
        if solver == "auto":
            solver = kronecker.cheaper_solver(factor.size, factor["inverse"].device)
        return config.newton_steps if solver == "newton" else 0

    def invert(
        self, factors: Tensor, previous: Tensor, newton_steps: int, count: Count
    ) -> tuple[Tensor, list[int]]:
        """Damped inverses, as :func:`~hf_precond.optimizers.nkfac.factors.invert`.

        Args:
            factors: ``[b, n, n]``.
            previous: the inverses of the refresh before, ``[b, n, n]``; in float16
                these, and those returned, are multiplied by the damping.
            newton_steps: from the previous inverses; 0 for exact ones.
            count: ``count(name, by)`` adds to a counter.

        Returns:
            The inverses, ``[b, n, n]``, and the indices of those that failed and are the
            previous ones.
        """
        damping = self.config.damping
        shift = kronecker.shift_of(factors, damping)
        matrices = kronecker.damp(factors, damping, shift)
        scaled, scale = previous.dtype == torch.float16, shift[:, None, None]
        previous = previous.to(factors.dtype)
        if scaled:
            previous /= scale
        # Newton's products lose to TF32 what the next step corrects; not at larger conditions.
        auto = self.config.precision == "auto" and damping >= WELL_CONDITIONED
        precision: Precision = "auto" if auto else "highest"
        inverses, failed = kronecker.invert(
            matrices, previous, newton_steps, damping, count, precision
        )
        return inverses.mul_(scale) if scaled else inverses, failed

    def _invert(
        self, sharded: ShardedRefresh[KroneckerFactor], batch: Sequence[KroneckerFactor]
    ) -> None:
        """New inverses of factors of one kind."""
        newton_steps = self.newton_steps(batch[0])
        held = [factor["inverse"] for factor in batch]
        previous = torch.stack(held)
        factors = unpack(torch.stack([f["factor"] for f in batch]).to(batch[0].bound.dtype))
        inverses, failed = self.invert(factors, previous, newton_steps, sharded.count)
        sharded.fail([batch[index] for index in failed], [True] * len(failed))
        torch._foreach_copy_(held, list(inverses.unbind()))
        sharded.count("newton_inverses" if newton_steps else "exact_inverses", len(batch))

    # Preconditioned gradients -----------------------------------------------------

    def precondition(self, ready: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """``L̂ G R̂`` at the gradient's norm, for the fallback optimizer."""
        sides, stacks = kept("sides", ready, partial(self._sides, ready))
        yield from self._precondition_experts(stacks)
        refreshes = [state_of(b, self.state, f"{side}_refreshes") for side, b in sides.items()]
        inverted = tuple([number > 0 for numbers in refreshes for number in numbers])
        for alike in kept(("alike", inverted), ready, partial(self._alike, ready)):
            if devices.is_accelerator(alike[0].weight):
                from hf_precond.optimizers.nkfac import stacked

                for batch in in_batches(alike, alike[0].weight.numel(), GPU_BATCH):
                    yield from stacked.precondition(self, batch)
                continue
            for bound in alike:  # each one stays in the cache
                gradient = bound.gradient()
                assert gradient is not None
                direction = self.preconditioner(bound).apply(gradient)
                norms = torch.linalg.vector_norm(gradient)
                direction *= self.recovery(norms, torch.linalg.vector_norm(direction))
                yield Preconditioned(bound, direction)

    def _sides(
        self, ready: Sequence[BoundMatrix]
    ) -> tuple[dict[Side, list[BoundMatrix]], list[BoundMatrix]]:
        """The layers that have a factor on each side, and the stacks of experts."""
        sides: dict[Side, list[BoundMatrix]] = {"output": [], "input": []}
        for factor in [f for b in ready if not b.matrix.stack for f in self.factors(b)]:
            sides[factor.side].append(factor.bound)
        return sides, [bound for bound in ready if bound.matrix.stack]

    def _alike(self, ready: Sequence[BoundMatrix]) -> list[list[BoundMatrix]]:
        """Layers of one kind that have an inverse, on the same sides."""

        def inverted(bound: BoundMatrix) -> list[Side]:
            return [factor.side for factor in self.factors(bound) if factor.is_refreshed]

        def kind(bound: BoundMatrix) -> tuple[Any, ...]:
            size = (bound.matrix.shape, bound.matrix.columns)
            place = bound.weight.dtype, bound.weight.device
            return *size, *place, bound.bias_rests, *inverted(bound)

        return grouped([b for b in ready if not b.matrix.stack and inverted(b)], kind)

    def _precondition_experts(self, stacks: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """The same of every expert, in runs that bound the temporaries."""
        from hf_precond.optimizers.base import experts

        for bound in stacks:
            if not any(factor.is_refreshed for factor in self.factors(bound)):
                continue
            block, assembly = self.preconditioner(bound), experts.Assembly()
            size = bound.matrix.shape[0] * bound.matrix.columns
            for run in experts.runs(bound, size, GPU_BATCH):
                gradients = experts.gradients(bound, run)
                own = block.of_experts(run, bound.dtype)
                directions = own.apply(gradients, self.config.precision)
                norms = (
                    torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
                    for matrices in (gradients, directions)
                )
                whole = assembly.add(bound, run, directions * self.recovery(*norms))
                if whole is not None:
                    yield Preconditioned(bound, whole)

    recovery = staticmethod(kronecker.recovery)

    def preconditioner(self, bound: BoundMatrix) -> KroneckerBlock:
        """``L̂ ⊗ R̂`` of a layer; the identity for a side without an inverse yet.

        Those in float16 are multiplied by their damping: the direction is the same.

        Args:
            bound: the layer's matrix.
        """
        inverses = {f.side: f["inverse"] for f in self.factors(bound) if f.is_refreshed}
        inputs = inverses.get("input")
        if inputs is not None and bound.bias_rests:
            inputs = without_last(inputs.to(bound.dtype))
        return KroneckerBlock(inverses.get("output"), inputs)

    def curvature(self, bound: BoundMatrix) -> KroneckerBlock:
        """``L ⊗ R`` of a layer, undamped, each of about unit Frobenius norm.

        Args:
            bound: the layer's matrix.
        """
        averages = {factor.side: factor.whole() for factor in self.factors(bound)}
        return KroneckerBlock(averages.get("output"), averages.get("input"))


def _of_experts(factor: KroneckerFactor, statistic: Statistic) -> list[Statistic]:
    """A statistic; that of each expert of a stack."""
    if not factor.bound.matrix.stack:
        return [statistic]
    pairs = zip(statistic.sum.unbind(), statistic.count.unbind(), strict=True)
    return [Statistic(*pair) for pair in pairs]
