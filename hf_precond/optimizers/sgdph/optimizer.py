"""SGD-PH: channel-wise parameters stepped by their Hessian diagonal, the rest as always."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_precond.architectures.modules import find_norms
from hf_precond.architectures.parameters import ParameterSurvey
from hf_precond.architectures.structure import ModelStructure, NormParameter
from hf_precond.compat import devices
from hf_precond.distributed import collectives
from hf_precond.optimizers.base.layout import kept
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import (
    Bound,
    BoundNorm,
    ParamView,
    Preconditioned,
    by_group,
    grouped,
)
from hf_precond.optimizers.sgdph import directions
from hf_precond.optimizers.sgdph.config import SGDPHConfig
from hf_precond.registry import register_optimizer
from hf_precond.statistics.requests import CurvatureRequest, CurvatureSource, Statistic


def norm_parameters(model: nn.Module, config: SGDPHConfig) -> ModelStructure:
    """Find the scales and shifts of norms and weight-norm scales; biases if asked for.

    Args:
        model: the model.
        config: ``include_bias``, ``reference`` and ``base``.

    Raises:
        ValueError: when there is none that trains.
    """
    survey = ParameterSurvey(model)
    if config.reference:
        from hf_precond.optimizers.sgdph.reference import vectors

        return structure_of(survey, vectors(survey), config)
    names = {survey.name_of(norm.parameter) for norm in find_norms(model)}
    if config.include_bias:
        names |= {
            name
            for name, parameter in survey.parameters.items()
            if parameter.dim() == 1 and "bias" in survey.owners[name][1]
        }
    return structure_of(survey, names, config)


@register_optimizer(
    "sgdph",
    config=SGDPHConfig,
    select=norm_parameters,
    title="SGD-PH",
    description="norm parameters by their Hessian diagonal, the rest by AdamW or SGD",
    memory="the fallback optimizer's, and one number more a norm parameter",
    start="1e-3",
)
class SGDPH(PrecondOptimizer):
    """Partial-Hessian steps for norm scales and shifts, a fallback optimizer for everything else.

    Every ``probe_interval`` steps, with H the Hessian of the training loss in
    all norm parameters together and z random signs, the same on every rank::

        ĥ ← z ∘ (H z)                    summed over micro-batches, mean over ranks
        D ← β_h D + (1 - β_h) ĥ          β_h = stat_decay
        D̂ = |D| / (1 - β_h^n)            n probes so far

    ``base="sgd"`` (the thesis)::

        v ← μ v + g
        u = v · min(τ / (D̂ + ε_c), 10)   u = v before the first probe
        p ← p - lr (u + wd p)

    ``base="adamw"``, an extension for transformers::

        u = clip(m̂ / min(γ D̂ + ε, 20 (√v̂ + ε)), -1, 1)   AdamW's before the first probe
        p ← p - lr (u + wd p)

    with AdamW's m̂, so the learning rate of AdamW serves all parameters: at the
    default γ = 0.1 between a tenth and a half of the entries are clipped, and
    u is once to three times AdamW's direction in rms. The clip is Sophia's
    (Liu et al., 2023, arXiv 2305.14342). The minimum keeps every entry at a
    twentieth of AdamW's step or more: where a norm's input is almost constant,
    as at the zero queries of a new BLIP-2, H is singular and D̂ without bound.
    A probe that finds less than a hundredth of D̂ in a parameter (a ten
    thousandth under ``base="sgd"``) starts its average anew: such a point is
    forgotten when it is left.

    ``E[z ∘ Hz]`` is the diagonal of H, and every single z gives it exactly
    where H is diagonal; the variance of entry c is the sum of the squared
    off-diagonal entries of row c. ``probe="ones"`` gives row sums instead,
    which are the diagonal only where H is diagonal. ``probe="exact"`` costs a
    product for every channel and is for small models.

    ``reference=True`` (with ``base="sgd"``, ``probe="ones"``) reproduces the
    published code; see :class:`~hf_precond.optimizers.sgdph.reference.SGDPHReference`.

    The products need the loss. Under ``Trainer`` and Accelerate loops it is
    seen where ``Accelerator.backward`` gets it; in a plain loop::

        with optimizer.curvature_context():
            loss = loss_function(model(x), y)
            optimizer.probe(loss)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    A loss without a second derivative (TRL's fused log-probabilities, CTC,
    GradCache, fused kernels) is probed by differences of gradients: under a
    Trainer by itself, where ``compute_loss`` is run again, two passes a product;
    elsewhere ``optimizer.probe(function)`` takes the place of ``probe(loss)``.

    Under autocast the forward passes of the steps that are probed run in
    float32, on accelerators those in bfloat16 as they are
    (``probe_autocast``). Weights kept in bfloat16 or float16 are probed in
    their own precision; averages are float32 always.

    Signs of trouble: ``norm_clipped`` in :meth:`diagnostics` near 1 (the
    curvature is too small to matter: raise ``gamma``), ``norm_update_rms``
    far below AdamW's (lower it), ``dropped_probes`` growing (the products
    overflow).

    Args:
        params: parameters, pairs of names and parameters, or groups, as for any
            torch optimizer.
        structure: ``norms`` are the channel-wise parameters, where it was read already (then
            with ``config``); by default it is read off the model.
        config: a config, in the place of fields, or changed by them.
        optimizer_dict: what some trainers call ``params``.
        attach_to: the model; without it, call :meth:`attach` before the first
            step. ``hf_precond.create_optimizer`` makes groups too.
        **fields: of the config.

    Raises:
        ValueError: a trainable norm parameter is in no parameter group.
        RuntimeError: at a step whose probe is due and that saw no loss.

    Source: Ying Sun, "Designing effective preconditioned optimizers for deep
    neural network training", PolyU 2024; Sun, Yong and Zhang, "SGD with Partial
    Hessian for Deep Neural Networks Optimization", arXiv 2403.02681.
    """

    config: SGDPHConfig

    def __new__(
        cls, params: Any = None, structure: Any = None, config: Any = None, **fields: Any
    ) -> SGDPH:
        """Choose ``SGDPHReference`` for a config with ``reference=True``."""
        if cls is SGDPH and fields.get("reference", getattr(config, "reference", False)):
            from hf_precond.optimizers.sgdph.reference import SGDPHReference

            return super().__new__(SGDPHReference)
        return super().__new__(cls)

    # Curvature --------------------------------------------------------------------

    def requests(self) -> Sequence[CurvatureRequest]:
        """The Hessian diagonal of every channel-wise parameter."""
        probe, autocast = self.config.probe, self.config.probe_autocast
        norms = [bound.norm for bound in self.bound]
        return [CurvatureRequest(n.name, n, probe, autocast=autocast) for n in norms]

    def due(self, step: int) -> bool:
        """Every ``probe_interval`` steps."""
        return step % self.config.probe_interval == 0

    def curvature_context(self) -> AbstractContextManager[None]:
        """A context for forward and backward of a plain loop.

        On the steps that are due, what runs inside can be differentiated
        twice (attention runs by torch's MATH kernel); it costs nothing on
        the others.
        """
        source = cast(CurvatureSource | None, self.statistics)
        return nullcontext() if source is None else source.context()

    def probe(
        self, loss: Tensor | Callable[[], Tensor], scale: Tensor | float | None = None
    ) -> None:
        """Collect the Hessian-vector products of a loss, before its ``backward()``.

        Call it once a micro-batch with the very loss that ``backward`` gets
        (divided by the number of micro-batches, before any loss scaler). It
        returns at once when no probe is due. ``zero_grad()`` between this call
        and :meth:`step` forgets the products.

        Args:
            loss: a scalar with its graph; or, where the graph cannot be
                differentiated twice, a function of no arguments that runs
                the model and returns the loss: then products are central
                differences of gradients (poor on small batches of networks
                with ReLU, whose kinks they count as curvature).
            scale: the loss scale of float16 training: the products are
                computed on ``scale * loss`` and divided by it.

        Raises:
            RuntimeError: the graph cannot be differentiated twice.
        """
        if self.statistics is not None:
            cast(CurvatureSource, self.statistics).observe(loss, scale=scale)

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        """Put the probes into the running averages."""
        ranks = collectives.world_size()
        probed = [bound for bound in self.bound if bound.norm.name in statistics]
        dropped: dict[str, Tensor] = {}
        for alike in grouped(probed, lambda bound: (bound.weight.dtype, bound.weight.device)):
            views = [self.view(bound) for bound in alike]
            for view in views:
                directions.allocate(view, self.config.base)
            names = [bound.norm.name for bound in alike]
            # A rank that did not reach the parameter adds zero, as to its gradient.
            estimates = torch._foreach_div([statistics[name].sum for name in names], ranks)
            present = torch.stack([statistics[name].count for name in names]) > 0
            flags = self.average(views, estimates, present)
            dropped |= zip(names, flags.unbind(), strict=True)
        self.count_dropped("dropped_probes", dropped)
        self.count("probes")

    def average(
        self, views: Sequence[ParamView], estimates: Sequence[Tensor], present: Tensor
    ) -> Tensor:
        """Average estimates into D; see ``directions.average_probes``.

        Args:
            views: the parameters.
            estimates: ĥ of each, shaped like the parameter.
            present: whether any rank collected it, ``[len(views)]``.

        Returns:
            1 where a present estimate was not finite and dropped, else 0, ``[len(views)]``.
        """
        decay, forget = self.config.stat_decay, directions.FORGET[self.config.base]
        return directions.average_probes(views, estimates, present, decay, forget)

    # Directions -------------------------------------------------------------------

    def uses_fallback(self, bound: Bound) -> bool:
        """``False``: no channel-wise parameter does."""
        return False

    def allocate(self, bound: BoundNorm) -> None:
        """Make the state of a parameter that has a gradient, where it is missing."""
        if bound.weight.grad is not None:
            directions.allocate(self.view(bound), self.config.base)

    def precondition(self, ready: Sequence[BoundNorm]) -> Iterable[Preconditioned]:
        """Directions of the channel-wise parameters, by their curvature."""
        for batch, views in kept("batches", ready, partial(self._batches_of, ready)):
            for view in views:
                assert view.param.grad is not None
                view.grad = view.param.grad
            directions.update_moments(views, self.config.base)
            if self.config.base == "adamw":
                joined, _ = directions.adamw_directions(views, self.config)
            else:
                joined = directions.sgd_directions(views, self.multipliers(views))
            for view in views:
                view.grad = view.param  # no memory is held until the next step
            for bound, direction in zip(batch, directions.split(joined, views), strict=True):
                yield Preconditioned(bound, direction, "direction", (direction, None))

    def _batches_of(
        self, ready: Sequence[BoundNorm]
    ) -> list[tuple[list[BoundNorm], list[ParamView]]]:
        """Parameters of one group, dtype and device, with their views."""

        def kind(bound: BoundNorm) -> tuple[Any, ...]:
            return bound.group, bound.weight.dtype, bound.weight.device

        return [(batch, [self.view(b) for b in batch]) for batch in grouped(ready, kind)]

    def multipliers(self, views: Sequence[ParamView]) -> Tensor:
        """What ``base="sgd"`` multiplies the momentum by.

        Args:
            views: parameters of one group and dtype.

        Returns:
            One number an entry, all views end to end, ``[entries]``.
        """
        return directions.sgd_multipliers(views, self.config)

    def view(self, bound: BoundNorm) -> ParamView:
        """A channel-wise parameter with its state; an empty gradient where it has none.

        Args:
            bound: the parameter.
        """
        parameter = bound.weight
        grad = torch.empty(0) if parameter.grad is None else parameter.grad
        group = self.param_groups[bound.group]
        return ParamView(parameter, grad, self.state[parameter], "", group)

    def report(self) -> dict[str, float]:
        """What the last step of the norm parameters was.

        ``norm_curvature_rms``, of D. For ``base="adamw"``: ``norm_update_rms``,
        of u; ``norm_update_over_adamw``, its ratio to AdamW's; and
        ``norm_clipped``, the share of clipped entries. For ``base="sgd"``:
        ``norm_multiplier`` of the momentum, mean, and ``norm_capped``, the
        share of entries at the cap.
        """
        values: dict[str, float] = {}
        batches = by_group([v for bound in self.bound if "curvature" in (v := self.view(bound))])
        if not batches:
            return values
        curvatures = [directions.joined(batch, "curvature") for batch in batches]
        values["norm_curvature_rms"] = float(_rms(curvatures))
        if self.config.base == "sgd":
            multipliers = torch.cat([self.multipliers(batch).cpu().double() for batch in batches])
            values["norm_multiplier"] = float(multipliers.mean())
            values["norm_capped"] = float((multipliers >= directions.CAP).double().mean())
            return values
        updates, plain = zip(
            *(directions.adamw_directions(batch, self.config) for batch in batches), strict=True
        )
        values["norm_update_rms"] = float(_rms(updates))
        values["norm_update_over_adamw"] = float(_rms(updates) / _rms(plain))
        clipped = [(u.abs() == 1).cpu().double() for u in updates]
        values["norm_clipped"] = float(torch.cat(clipped).mean())
        return values


def _rms(tensors: Iterable[Tensor]) -> Tensor:
    wide = [tensor.to(devices.widest(tensor.device)) for tensor in tensors]
    return torch.cat(wide).square().mean().sqrt()


def structure_of(
    survey: ParameterSurvey, names: Collection[str], config: SGDPHConfig
) -> ModelStructure:
    """The parameters of these names that train, in model order.

    Raises:
        ValueError: when there is none.
    """
    norms = [
        NormParameter(name, *survey.owners[name])
        for name, parameter in survey.parameters.items()
        if name in names and parameter.requires_grad
    ]
    if not norms:
        frozen = sorted({name.split(".")[-2] for name in names if "." in name})
        saved = f" (with peft: modules_to_save={frozen})" if frozen else ""
        raise ValueError(
            "sgdph: this model has no norm layer with parameters that train; unfreeze them"
            f"{saved}, set include_bias=True to treat biases as channel-wise parameters, or choose "
            "afopt, adamr or nkfac."
        )
    reasons = {norm.name: survey.describe(norm.name) for norm in norms}
    return survey.structure(config, reasons, norms=norms)
