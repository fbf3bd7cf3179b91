"""SGD-PH: channel-wise parameters stepped by their Hessian diagonal, the rest by a base rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor

from hf_precond.distributed import collectives
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
from hf_precond.statistics.requests import CurvatureRequest, CurvatureSource, Statistic


class SGDPH(PrecondOptimizer):
    """Partial-Hessian steps for norm scales and shifts, a base rule for everything else.

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

        u = clip(m̂ / (γ D̂ + ε), -1, 1)   AdamW's step before the first probe
        p ← p - lr (u + wd p)

    with AdamW's m̂, so the learning rate of AdamW serves all parameters: at the
    default γ = 0.1 between a tenth and a half of the entries are clipped, and
    u is once to three times AdamW's direction in rms. The clip is Sophia's
    (Liu et al., 2023, arXiv 2305.14342).

    ``E[z ∘ Hz]`` is the diagonal of H, and every single z gives it exactly
    where H is diagonal; the variance of entry c is the sum of the squared
    off-diagonal entries of row c. ``probe="ones"`` gives row sums instead,
    which are the diagonal only where H is diagonal. ``probe="exact"`` costs a
    product for every channel and is for small models.

    ``reference=True`` (with ``base="sgd"``, ``probe="ones"``) reproduces the
    published code: all one-dimensional parameters but the last, one of them
    probed at each step in turn, ``D`` the average of ``|row sums|`` with the
    momentum's decay, ``u = τ (1 - μⁿ) v / (D + ε_c)``. Tensors take their turn
    in model order, which is the published order for one parameter group; the
    published code decays biases and norms too, so pass ``model.parameters()``
    as the one group to have its weight decay.

    The products need the loss. Under ``Trainer`` and Accelerate loops it is
    seen where ``Accelerator.backward`` gets it; in a plain loop::

        with optimizer.curvature_context():
            loss = loss_function(model(x), y)
            optimizer.probe(loss)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Under autocast the forward passes of the steps that are probed run in
    float32 (``probe_autocast`` leaves them). Weights kept in bfloat16 or
    float16 are probed in their own precision; averages are float32 always.

    Signs of trouble: ``norm_clipped`` in :meth:`diagnostics` near 1 (the
    curvature is too small to matter: raise ``gamma``), ``norm_update_rms``
    far below AdamW's (lower it), ``dropped_probes`` growing (the products
    overflow).

    Args:
        param_groups: as for any torch optimizer.
        blocks: ``norms`` are the channel-wise parameters.
        config: the validated config.

    Raises:
        ValueError: a trainable norm parameter is in no parameter group.
        RuntimeError: at a step whose probe is due and that saw no loss.

    Source: Ying Sun, "Designing effective preconditioned optimizers for deep
    neural network training", PolyU 2024; Sun, Yong and Zhang, "SGD with Partial
    Hessian for Deep Neural Networks Optimization", arXiv 2403.02681.
    """

    config: SGDPHConfig

    def requests(self) -> Sequence[CurvatureRequest]:
        """One request a channel-wise parameter."""
        if not self.config.reference:
            return [
                CurvatureRequest(
                    c.norm.name, c.norm, self.config.probe, autocast=self.config.probe_autocast
                )
                for c in self.bound
            ]
        cycle = len(self.bound)
        # The authors never use the curvature of the last one, so it is not probed.
        return [
            CurvatureRequest(c.norm.name, c.norm, self.config.probe, cycle, turn, autocast=True)
            for turn, c in enumerate(self.bound[:-1])
        ]

    def due(self, step: int) -> bool:
        """Every ``probe_interval`` steps; in reference mode all but the last of a cycle."""
        if self.config.reference:
            return step % len(self.bound) != len(self.bound) - 1
        return step % self.config.probe_interval == 0

    def curvature_context(self) -> AbstractContextManager[None]:
        """Around forward and backward of a plain loop.

        On the steps that are due, what runs inside can be differentiated
        twice (attention runs by torch's MATH kernel); it costs nothing on
        the others.
        """
        source = cast(CurvatureSource | None, self.statistics)
        return nullcontext() if source is None else source.context()

    def probe(
        self, loss: Tensor | Callable[[], Tensor], scale: Tensor | float | None = None
    ) -> None:
        """Stage the Hessian-vector products of a loss, before its ``backward()``.

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
        decay = self.config.momentum if self.config.reference else self.config.stat_decay
        names = [c.norm.name for c in self.bound if c.norm.name in statistics]
        views = [self._view(c) for c in self.bound if c.norm.name in statistics]
        for view in views:
            directions.allocate(view, self.config.base)
        lost: dict[str, Tensor] = {}
        found = zip(names, views, strict=True)
        for alike in grouped(found, lambda one: (one[1].param.dtype, one[1].param.device)):
            staged = [statistics[name] for name, _ in alike]
            # A rank that did not reach the parameter adds zero, as to its gradient.
            dropped = directions.average_probes(
                [view for _, view in alike],
                torch._foreach_div([statistic.sum for statistic in staged], ranks),
                torch.stack([statistic.count for statistic in staged]) > 0,
                decay,
                absolute=self.config.reference,
            )
            lost |= zip((name for name, _ in alike), dropped.unbind(), strict=True)
        self.count_dropped("dropped_probes", lost)
        self.count("probes")

    def precondition(self, ready: Sequence[BoundNorm]) -> Iterable[Preconditioned]:
        """Directions of the channel-wise parameters by their curvature."""
        stepped = {id(bound) for bound in self._stepped()}
        views = {bound: self._view(bound) for bound in ready if id(bound) in stepped}
        for view in views.values():
            directions.allocate(view, self.config.base)
        directions.advance_moments(list(views.values()), self.config.base)
        bound_of = {id(view): bound for bound, view in views.items()}
        for batch in by_group(list(views.values())):
            for view, direction in zip(batch, self._directions(batch), strict=True):
                yield Preconditioned(bound_of[id(view)], direction, "direction")

    def allocate(self, bound: BoundNorm) -> None:
        """Make the state of a parameter that has a gradient, where it is missing."""
        if bound.weight.grad is not None and not self.uses_fallback(bound):
            directions.allocate(self._view(bound), self.config.base)

    def uses_fallback(self, bound: Bound) -> bool:
        """The authors' last parameter only."""
        return bound not in self._stepped()

    def _stepped(self) -> list[BoundNorm]:
        """The parameters that are stepped by their curvature."""
        return self.bound[:-1] if self.config.reference else self.bound

    def _directions(self, batch: Sequence[ParamView]) -> list[Tensor]:
        if self.config.base == "adamw":
            joined, _ = directions.adamw_directions(batch, self.config)
            return directions.apart(joined, batch)
        return directions.sgd_directions(batch, self.config, self._cycle())

    def _cycle(self) -> int | None:
        """The authors' n at the step under way; ``None`` outside reference mode."""
        return (self.steps + 1) // len(self.bound) + 1 if self.config.reference else None

    def _view(self, bound: BoundNorm) -> ParamView:
        parameter = bound.weight
        grad = torch.empty(0) if parameter.grad is None else parameter.grad
        group = self.param_groups[bound.group]
        return ParamView(parameter, grad, self.state[parameter], "", group)

    def diagnostics(self) -> dict[str, float]:
        """Counters, and of the last step of the norm parameters:

        ``norm_curvature_rms``: of D̂. ``base="adamw"``: ``norm_update_rms``,
        of u; ``norm_update_over_adamw``, its ratio to AdamW's; and
        ``norm_clipped``, the share of clipped entries. ``base="sgd"``:
        ``norm_multiplier`` of the momentum, mean, and ``norm_capped``.
        """
        values = super().diagnostics()
        with torch.no_grad():
            views = [self._view(channel) for channel in self.bound]
            values.update(self._norm_diagnostics([x for x in views if "curvature" in x]))
        return values

    def _norm_diagnostics(self, views: Sequence[ParamView]) -> dict[str, float]:
        if not views:
            return {}
        curvature = torch.cat([view["curvature"].double().reshape(-1) for view in views])
        values = {"norm_curvature_rms": float(curvature.square().mean().sqrt())}
        if self.config.base == "sgd":
            multipliers = torch.cat(
                [
                    directions.sgd_multipliers(batch, self.config, self._cycle()).double()
                    for batch in by_group(views)
                ]
            )
            values["norm_multiplier"] = float(multipliers.mean())
            values["norm_capped"] = float((multipliers >= directions.CAP).double().mean())
            return values
        pairs = [directions.adamw_directions(batch, self.config) for batch in by_group(views)]
        u = torch.cat([pair[0].double() for pair in pairs])
        plain = torch.cat([pair[1].double() for pair in pairs])
        values["norm_update_rms"] = float(u.square().mean().sqrt())
        ratio = u.square().mean() / plain.square().mean()
        values["norm_update_over_adamw"] = float(ratio.sqrt())
        values["norm_clipped"] = float((u.abs() == 1).double().mean())
        return values
