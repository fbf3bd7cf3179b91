"""The step that all optimizers of this package share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.structure import ModelStructure, RoutingTable
from hf_precond.compat.torch_internals import loss_scale
from hf_precond.config.base import OptimizerConfig
from hf_precond.distributed import collectives
from hf_precond.distributed.collectives import like
from hf_precond.linalg.products import compute_dtype, without_autocast
from hf_precond.optimizers.base import validation
from hf_precond.optimizers.base.failures import FailureRecord
from hf_precond.optimizers.base.fallback import (
    FallbackOptimizer,
    descend,
    group_defaults,
    make_fallback,
)
from hf_precond.optimizers.base.parameters import (
    BoundMatrix,
    ParamView,
    Position,
    Preconditioned,
    fused_rests,
)
from hf_precond.optimizers.base.validation import ParamGroupValidator
from hf_precond.state.checkpoint import complete, forget_empty, restoring
from hf_precond.state.identity import KEY, added_route, identity, refuse_other, relabelled
from hf_precond.statistics import requests
from hf_precond.statistics.requests import (
    Request,
    Statistic,
    StatisticsSource,
    open_statistics,
    request_shape,
)


class PrecondOptimizer(torch.optim.Optimizer):
    """Commit statistics, refresh preconditioners, precondition, base rule, tick.

    A subclass says which statistics it needs (:meth:`requests`, :meth:`due`),
    what it does with them (:meth:`commit`), when and how its preconditioners
    are refreshed (:meth:`refresh`) and what a gradient becomes
    (:meth:`precondition`); all other parameters go through the base rule.

    A statistic that is not finite is dropped and counted; a refresh that fails
    keeps the preconditioner there is; either stops training when it goes on
    (:mod:`hf_precond.optimizers.base.failures`). A gradient that is not finite enters the
    weights and the base rule's moments as in torch's optimizers, and no
    preconditioner; ``skip_nonfinite=True`` leaves its step out.

    Args:
        param_groups: as for any torch optimizer.
        blocks: what was found in the model.
        config: the validated config.

    Raises:
        TypeError: built from parameters and fields alone, as torch's optimizers are.
        ValueError: for complex parameters.
        RuntimeError: at a step, for sparse gradients and for too many failures
            in a row, with advice.
    """

    finishes = False
    """Whether :meth:`precondition` yields finished directions (the base rule keeps no state)."""

    rates: Sequence[Any] = ()  # of the last step, by group: a scheduler may have spoken since

    def __init__(
        self,
        param_groups: Iterable[Any],
        structure: ModelStructure | None = None,
        config: OptimizerConfig | None = None,
        **fields: Any,
    ) -> None:
        if fields or not isinstance(structure, ModelStructure) or not isinstance(config, OptimizerConfig):
            name = type(self).__name__
            raise TypeError(
                f"{name}(param_groups, blocks, config) needs what was found in the model; build it "
                f"with hf_precond.create_optimizer(model, {name.lower()!r}, lr=…)."
            )
        self.config = config
        self.structure = structure
        self.statistics: StatisticsSource | None = None
        self.counters: dict[str, int] = {}
        self.device_counters: dict[str, Tensor] = {}
        self.failures = FailureRecord()
        self.scaler: torch.amp.GradScaler | None = None
        self.fallback: FallbackOptimizer = self.make_fallback()
        super().__init__(param_groups, group_defaults(config))
        self._bind()
        self._open()

    # What a subclass says -------------------------------------------------

    def make_fallback(self) -> FallbackOptimizer:
        """The rule for parameters without a preconditioner, and under one."""
        return make_fallback(getattr(self.config, "base", "adamw"), self.config)

    def requests(self) -> Sequence[Request]:
        """The statistics this optimizer needs from the model."""
        return ()

    def due(self, step: int) -> bool:
        """Whether the passes before step number ``step`` (from 0) are to be collected."""
        return False

    def allocate(self, bound: BoundMatrix) -> None:
        """Make all state of one matrix that this class keeps itself, where it is missing."""

    def commit(self, statistics: Mapping[str, Statistic]) -> None:
        """Put this step's statistics, summed over ranks, into running moments."""

    def refresh(self) -> None:
        """Recompute the preconditioners that are due at step :attr:`steps`."""

    def precondition(self, bound: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """The gradients of these matrices (each has one), preconditioned.

        A matrix left out goes through the base rule with its raw gradient.
        """
        return ()

    def step_others(self, views: Sequence[ParamView]) -> None:
        """Step every leaf that is not a finished direction, by the base rule."""
        self.fallback.update(views)

    def allocate_fallback(self, views: Sequence[ParamView]) -> None:
        """Make the base rule's state of these leaves, where it is missing."""
        self.fallback.allocate_all(views)

    # The step ---------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps taken so far; the number of the step under way while in :meth:`step`."""
        return self.param_groups[0]["step"]

    @property
    def _first(self) -> Tensor:
        return next(parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with without_autocast(self._first.device):  # a step is often written inside it
            self._step()
        return loss

    def _step(self) -> None:
        validation.refuse_sparse(self.param_groups, self.config.name)
        self.locate(self.positions())
        for bound in self.bound:
            self.allocate(bound)
        if validation.only_allocates(self.param_groups):
            self.allocate_fallbacks()
            return
        if self.config.skip_nonfinite and self._skips():
            return
        self._commit_staged()
        self.refresh()
        self.failures.check()
        rates = [group["lr"] for group in self.param_groups]
        self.rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        self._apply()
        for group in self.param_groups:
            group["step"] += 1
        self._announce()

    def allocate_fallbacks(self) -> None:
        """Make the base rule's state of everything that has a gradient and is stepped by it."""
        self.allocate_fallback(self._raw_views(set(self.bound) if self.finishes else set(), {}))

    def _skips(self) -> bool:
        """Whether this step is left out because a gradient is not finite; every rank alike."""
        skips = not validation.are_finite(self.param_groups)
        self.failures.note("step", self.config.name, skips)
        if skips:
            self.count("skipped_steps")
            if self.statistics is not None:
                self.statistics.drop()
        return skips

    def _apply(self) -> None:
        ready = [bound for bound in self.bound if bound.weight.grad is not None]
        done: set[BoundMatrix] = set()
        finished: list[ParamView] = []
        others: list[ParamView] = []
        gathered: dict[Tensor, Tensor] = {}
        for item in self.precondition(ready):
            # A finished direction needs no state: an empty one must not appear in self.state.
            state = {} if item.finished else self.state
            views = item.bound.views(item.matrix, self.param_groups, state, gathered, item.parts)
            (finished if item.finished else others).extend(views)
            done.add(item.bound)
        others.extend(self._raw_views(done, gathered))
        if others:
            self.step_others(others)
        if finished:
            descend(finished)
        for parameter, whole in gathered.items():
            parameter.copy_(like(parameter, whole))

    def _raw_views(
        self, done: set[BoundMatrix], gathered: dict[Tensor, Tensor]
    ) -> list[ParamView]:
        """Everything with a gradient outside ``done``, to be stepped by its raw gradient."""
        taken = {position for bound in done for position in (bound.weight_position, bound.bias_position)}
        views: list[ParamView] = []
        for bound in self.bound + self._rest:
            if bound.matrix.rows is not None:
                taken |= {bound.weight_position, bound.bias_position}
                if bound not in done:
                    views += bound.raw_views(self.param_groups, self.state, gathered)
        views.extend(
            ParamView(parameter, parameter.grad, self.state[parameter], "", group)
            for number, group in enumerate(self.param_groups)
            for index, parameter in enumerate(group["params"])
            if parameter.grad is not None and (number, index) not in taken
        )
        return views

    def _commit_staged(self) -> None:
        if self.statistics is None or not self.due(self.steps):
            return
        staged = self.statistics.take()
        if collectives.world_size() > 1:
            dtype, device = compute_dtype(self._first.dtype), self._first.device
            shapes = {request.key: request_shape(request) for request in self.requests()}
            staged = requests.all_reduce_statistics(staged, shapes, dtype, device)
        self.commit(staged)
        self.statistics.recycle()

    # Binding to parameter groups and to the model ----------------------------

    def positions(self) -> dict[int, Position]:
        """``id`` of every parameter held now to its group and index; not to be kept."""
        return {
            id(parameter): (number, index)
            for number, group in enumerate(self.param_groups)
            for index, parameter in enumerate(group["params"])
        }

    def locate(self, positions: Mapping[int, Position]) -> None:
        """Find what is preconditioned again in parameter groups that may have changed."""
        for bound in self.bound + self._rest:
            bound.locate(positions)
        self.watched.check(positions, self.bound, self.config.name)

    def _bind(self) -> None:
        """Find every matrix's place in the parameter groups."""
        positions = self.positions()
        self.watched = ParamGroupValidator(self.structure.owners, positions)
        self.bound: list[BoundMatrix] = []
        for matrix in self.structure.matrices:
            position = positions.get(id(matrix.weight_parameter))
            if position is None:
                raise ValueError(
                    f"{matrix.name}: its weight is in none of the parameter groups; pass every "
                    "trainable parameter of the model, or build with create_optimizer(model, …)."
                )
            bias = matrix.bias_parameter
            bias_position = None if bias is None else positions.get(id(bias))
            self.bound.append(BoundMatrix(matrix, position, bias_position))
        self._rest = fused_rests(self.bound)

    def _open(self) -> None:
        requests = self.requests()
        structure = self.structure
        if requests and structure.open is not None:
            self.statistics = structure.open(requests)
        elif requests and structure.model is not None:
            self.statistics = open_statistics(structure.model, requests)
        if self.scaler is not None:
            self.attach_scaler(self.scaler)
        self._announce()

    def _announce(self) -> None:
        if self.statistics is not None:
            self.statistics.enable(self.due(self.steps), self.steps)

    def attach_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Tell the loss scaler of a float16 loop without a ``Trainer``.

        Statistics of output gradients are then taken without the loss scale.
        ``optimizer.zero_grad()`` (not ``model.zero_grad()``) drops those of a
        step that the scaler skipped.
        """
        self.scaler = scaler
        if self.statistics is not None:
            self.statistics.loss_scale = partial(loss_scale, scaler)

    def attach(self, model: nn.Module) -> None:
        """Read ``model`` (whose parameters this optimizer holds) and install the hooks.

        A deep copy of an optimizer has none until this is called.
        """
        if self.structure.find is None:
            raise RuntimeError(
                "attach: these blocks were made by hand; build the optimizer with "
                "create_optimizer(model, …) instead."
            )
        self.close()
        self.structure = self.structure.find(model)
        self.structure.routing = relabelled(self.routing, model, self.param_groups)
        self._bind()
        self._open()

    def close(self) -> None:
        """Remove every hook. The optimizer can still step, with the preconditioners it has."""
        if self.statistics is not None:
            self.statistics.close()
            self.statistics = None

    # What torch optimizers have -----------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; without a block of theirs they go through the base rule."""
        param_group.setdefault("step", self.param_groups[0]["step"] if self.param_groups else 0)
        super().add_param_group(param_group)
        validation.refuse_complex(self.param_groups[-1]["params"], self.config.name)
        for parameter in self.param_groups[-1]["params"] if hasattr(self, "bound") else []:
            self.routing.routes.append(added_route(len(self.param_groups) - 1, parameter))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the statistics staged for a step that did not come."""
        super().zero_grad(set_to_none)
        if self.statistics is not None:
            self.statistics.drop()

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer, with what tells a checkpoint of another model or optimizer.

        Once there is state, every parameter has an entry.
        """
        own = identity(self.config, self.param_groups, self.routing)
        forget_empty(self.state)
        return complete(super().state_dict()) | {KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`'s output; every tensor keeps its own dtype.

        Raises:
            ValueError: the state is of another model or optimizer, was saved
                with other fields, or is not whole; nothing has been loaded.
        """
        own = identity(self.config, self.param_groups, self.routing)
        with restoring(self, lambda given: refuse_other(given, own)):
            super().load_state_dict(state_dict)
        forget_empty(self.state)
        if self.statistics is not None:
            self.statistics.drop()  # of a step that was given up
        self._announce()

    def __getstate__(self) -> dict[str, Any]:
        own = ("config", "structure", "fallback", "counters", "device_counters", "failures", "bound")
        state: dict[str, Any] = super().__getstate__()
        return state | {name: self.__dict__[name] for name in (*own, "_rest", "watched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("statistics", None)
        self.__dict__.setdefault("scaler", None)

    # What a person sees ---------------------------------------------------------

    @property
    def routing(self) -> RoutingTable:
        """Every parameter, how it is treated, and why."""
        return self.structure.routing

    def count(self, name: str, by: int | Tensor = 1) -> None:
        """Add to a counter that :meth:`diagnostics` shows; a tensor is added on its device."""
        if isinstance(by, Tensor):
            held = self.device_counters.get(name)
            self.device_counters[name] = by.clone() if held is None else held + by
        else:
            self.counters[name] = self.counters.get(name, 0) + by

    def count_dropped(self, counter: str, dropped: Mapping[str, Tensor]) -> None:
        """Count statistics that were not finite; training stops where that goes on.

        Args:
            counter: name of the counter.
            dropped: by layer 1 where its statistic was dropped, else 0: 0-d tensors.
        """
        if dropped:
            device = next(iter(dropped.values())).device
            flags = torch.stack([flag.to(device) for flag in dropped.values()])
            self.count(counter, flags.sum())
            self.failures.watch("statistic", list(dropped), flags)

    def diagnostics(self) -> dict[str, float]:
        """Counters and norms as plain numbers. Reads from the device: call it when logging."""
        values = {name: float(value) for name, value in self.counters.items()}
        for name, value in self.device_counters.items():
            values[name] = values.get(name, 0.0) + float(value)
        return values | self.fallback.diagnostics()
