"""The step that all optimizers of this package share: a template that each of them fills in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.groups import given_groups, parameter_groups, rate_scales
from hf_precond.architectures.structure import LayerMatrix, ModelStructure, RoutingTable
from hf_precond.compat.warn import warn
from hf_precond.config.base import OptimizerConfig
from hf_precond.distributed import collectives
from hf_precond.distributed.collectives import all_finite, like
from hf_precond.linalg.products import compute_dtype, without_autocast
from hf_precond.optimizers.base import checkpoint, messages, parameters
from hf_precond.optimizers.base.coverage import StatisticsCoverage
from hf_precond.optimizers.base.fallback import (
    FallbackOptimizer,
    descend,
    group_defaults,
    make_fallback,
)
from hf_precond.optimizers.base.groups import check_group, have_own_rates, note_added, routed
from hf_precond.optimizers.base.layout import Layout, facts_of, kept
from hf_precond.optimizers.base.new_head import NewHead, check_saved_head
from hf_precond.optimizers.base.parameters import (
    Bound,
    BoundMatrix,
    BoundNorm,
    ParamGroupValidator,
    ParamView,
    Preconditioned,
)
from hf_precond.optimizers.base.refresh import Counters, FailureRecord
from hf_precond.optimizers.base.reporting import Reporting
from hf_precond.registry import make_config, read_model

if TYPE_CHECKING:
    from hf_precond.statistics.requests import Request, Statistic, StatisticsSource

logger = logging.getLogger(__name__)

STEP_ENTRIES = 2**25
"""Entries of preconditioned gradients that a step holds before AdamW or SGD takes them."""


class PrecondOptimizer(Reporting, torch.optim.Optimizer):
    """A template: update statistics, refresh preconditioners, precondition, step, count.

    A subclass says which statistics it needs (:meth:`requests`, :meth:`due`), what it does with
    them (:meth:`update_statistics`), how its preconditioners are refreshed (:meth:`refresh`) and
    what a gradient becomes (:meth:`precondition`). The fallback optimizer (AdamW, SGD, ... by the
    config's ``base``) steps all other parameters, and where a preconditioner yields gradients
    takes these in the place of the raw ones.

    A statistic that is not finite is dropped and counted. A refresh that fails keeps the previous
    preconditioner. Either stops training after several failures in a row
    (:class:`~hf_precond.optimizers.base.refresh.FailureRecord`). A gradient that is not finite
    enters the weights and the fallback optimizer's moments as in torch's optimizers, and no
    preconditioner; with ``skip_nonfinite=True`` the whole step is skipped.

    The class is called as torch's are, ``AFOpt(groups, lr=1e-3)``, and binds to the model at
    :meth:`attach`; under a Trainer this happens by itself, at the latest when training begins.
    :func:`hf_precond.create_optimizer` does both, and has defaults for the groups.

    Args:
        params: parameters, pairs of names and parameters, or groups, as for any torch optimizer.
        structure: what was found in the model, where it was read already; then ``config`` is
            needed too.
        config: a config in the place of fields, or changed by them.
        optimizer_dict: what some trainers call ``params``.
        attach_to: the model, to bind to at once.
        **fields: of the config.

    Raises:
        TypeError: ``params`` are not what torch's optimizers take, or an argument was given by
            position.
        ValueError: for complex parameters, a parameter given twice, a field or value that is not
            legal, where nothing is preconditioned, and for ``head_lr_scale`` and
            ``layer_lr_decay`` without a model.
        RuntimeError: at a step, before the optimizer was attached to a model, for sparse gradients
            and for too many failures in a row, with advice.
    """

    registered_name = ""  # set by register_optimizer
    coverage: StatisticsCoverage
    falls_back = True
    """Whether a matrix without statistics is stepped by the fallback optimizer."""
    statistics: StatisticsSource | None = None
    scaler: torch.amp.GradScaler | None = None
    loaded: Any = None  # what a state that came before attach() says of its model
    joined: Sequence[str] = ()
    """Parameters of the model that were added to a group since it was read."""
    _carried: dict[str, Statistic] | None = None  # from hooks that were replaced before the step
    _pruned: Sequence[BoundMatrix] = ()
    _ranks_agree = False  # on what their models decided
    rates: Sequence[Any] = ()  # of the last step, by group: a scheduler may have changed them since
    head: NewHead | None = None  # what is stepped by what it does to the outputs
    resumed_head: Sequence[str] | None = None  # its layers in the training that is resumed
    layout = Layout()  # of the last step, and inside step() of the current one

    def __init__(
        self,
        params: Iterable[Any] | None = None,
        structure: ModelStructure | None = None,
        config: OptimizerConfig | None = None,
        *,
        optimizer_dict: Iterable[Any] | None = None,
        attach_to: nn.Module | None = None,
        **fields: Any,
    ) -> None:
        params = optimizer_dict if params is None else params
        if structure is None:
            config = make_config(config or self.registered_name, **fields)
            if config.name != self.registered_name:
                name, other = type(self).__name__, type(config).__name__
                raise TypeError(messages.OTHER_CONFIG.format(name=name, other=other))
            structure, params = self._read(attach_to, config, params)
        elif not isinstance(structure, ModelStructure) or config is None or fields or attach_to:
            name = type(self).__name__
            raise TypeError(
                messages.WRONG_ARGUMENTS.format(name=name, optimizer=self.registered_name)
            )
        self.config = config
        # Of groups without a rate of their own; of a resumed training, what that began with.
        self.common_lr = None if have_own_rates(params, config) else config.lr
        self.structure = structure
        self.counters = Counters()
        self.failures = FailureRecord()
        self.fallback: FallbackOptimizer = self.make_fallback()
        super().__init__(() if params is None else params, group_defaults(config))
        self.given = len(self.param_groups)
        self._bind()
        self._route()
        self._open()

    @staticmethod
    def _read(
        model: nn.Module | None, config: OptimizerConfig, params: Iterable[Any] | None
    ) -> tuple[ModelStructure, list[dict[str, Any]]]:
        """What is in a model, nothing where there is none yet, and the parameter groups."""
        if model is not None:
            return read_model(model, config), parameter_groups(model, config, params)
        for field in ("head_lr_scale", "layer_lr_decay"):
            value = getattr(config, field)
            if value != 1.0:
                raise ValueError(
                    messages.RATES_NEED_MODEL.format(field=field, value=value, name=config.name)
                )
        groups = given_groups(() if params is None else params)
        return ModelStructure(reread=partial(read_model, config=config)), groups

    # What a subclass fills in -----------------------------------------------------

    def make_fallback(self) -> FallbackOptimizer:
        """The optimizer of the parameters without a preconditioner, and of gradients with one."""
        name = getattr(self.config, "base", "adamw")
        return make_fallback(name, self.config, self.failures, self.counters.add)

    def requests(self) -> Sequence[Request]:
        """The statistics this optimizer needs from the model."""
        return ()

    def needs(self) -> Mapping[BoundMatrix, Sequence[str]]:
        """The keys of the requests whose statistics each matrix's preconditioner is made of.

        Where these are missing although the matrix has gradients, a warning says so. By default
        the requests that name the matrix.
        """
        keys: dict[Any, list[str]] = {}
        for request in self.requests():
            if hasattr(request, "matrix"):
                keys.setdefault(request.matrix, []).append(request.key)
        matrices = [bound for bound in self.bound if isinstance(bound, BoundMatrix)]
        return {bound: keys.get(bound.matrix, []) for bound in matrices}

    def due(self, step: int) -> bool:
        """Whether statistics are collected in the passes before a step.

        Args:
            step: the step's number, from 0.
        """
        return False

    def allocate(self, bound: Any) -> None:
        """Make the state of one matrix that this class keeps itself, where it is missing.

        Args:
            bound: the matrix, or norm parameter; its state is ``self.state[bound.weight]``.
        """

    def update_statistics(self, statistics: Mapping[str, Statistic]) -> None:
        """Put this step's statistics, summed over ranks, into running averages.

        Args:
            statistics: by the ``key`` of the requests; those that no token reached may be missing.
        """

    def refresh(self) -> None:
        """Recompute the preconditioners that are due at step :attr:`steps`."""

    def precondition(self, ready: Sequence[Any]) -> Iterable[Preconditioned]:
        """What becomes of the gradients of matrices or norm parameters.

        The fallback optimizer steps those that are left out, by their raw gradients.

        Args:
            ready: those that have a gradient at this step.
        """
        return ()

    def uses_fallback(self, bound: Bound) -> bool:
        """Whether the fallback optimizer steps a matrix, and so keeps state of it.

        Args:
            bound: the matrix, or norm parameter.
        """
        return True

    # The step -----------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """The number of steps taken so far; inside :meth:`step` that of the current one, from 0."""
        return self.param_groups[0]["step"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

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
            try:
                self._step()
            except BaseException:  # what it held of the step goes with it
                self.layout.close()
                self.layout = Layout()
                raise
            self.layout.close()
        return loss

    def _step(self) -> None:
        if not self.attached:
            raise RuntimeError(messages.NOT_ATTACHED.format(name=self.config.name))
        self._settle()
        if self.joined:
            name, count, first = self.config.name, len(self.joined), self.joined[0]
            warn(messages.ADDED.format(name=name, count=count, first=first))
            self.joined = ()
        if self._only_allocates():
            self.allocate_fallback()
            return
        if self.config.skip_nonfinite and self._skips():
            return
        if self.head is not None:
            self.head.update()
        self._update_statistics()
        self.refresh()
        self.failures.check()
        rates = [group["lr"] for group in self.param_groups]
        self.rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        self._apply()
        for group in self.param_groups:
            group["step"] += 1
        self._enable_statistics()
        self.layout.note(self.state)

    def _settle(self) -> None:
        """Find the parameters, check them and make state; nothing where the last layout holds."""
        groups, name = self.param_groups, self.config.name
        if self.layout.holds(facts_of(groups, self.validator.stepped), self.state):
            self.layout.begin()
            self.validator.warn_of_idle(groups, name)
            return
        parameters.refuse_sparse(groups, name)
        self._locate()
        self._lay_out()

    def _lay_out(self) -> None:
        """Begin a layout, and make the state of what is bound."""
        facts = facts_of(self.param_groups, self.validator.stepped)
        bound = (*self.bound, *self._remainders)
        known = self.validator.known()
        if any(id(parameter) not in known for item in bound for parameter in item.members):
            facts = None
        self.layout.close()
        self.layout = Layout(facts, self.param_groups)
        self.layout.bind(bound)
        self.layout.begin()
        for item in self.bound:
            self.allocate(item)

    def allocate_fallback(self) -> None:
        """Make the fallback optimizer's state of everything with a gradient that it steps."""
        stepped_here = [bound for bound in self.bound if not self.uses_fallback(bound)]
        views: Sequence[ParamView] = self._raw_views(stepped_here, {})
        self.fallback.allocate(views if self.head is None else self.head.allocate(views))

    def _only_allocates(self) -> bool:
        """Whether this is a step of zero gradients and lr 0, by which checkpointing makes state."""
        groups = self.param_groups
        # To look at a rate that is a tensor may wait for a GPU: only before the first step.
        if any((self.steps and isinstance(g["lr"], Tensor)) or g["lr"] != 0 for g in groups):
            return False
        return not any(bool(grad.count_nonzero()) for grad in parameters.gradients_of(groups))

    def _skips(self) -> bool:
        """Whether this step is skipped because a gradient is not finite; the same on every rank."""
        skips = not all_finite(parameters.gradients_of(self.param_groups))
        self.failures.note("step", self.config.name, skips)
        if skips:
            self.count("skipped_steps")
            self._drop()
        return skips

    def _drop(self) -> None:
        """Forget what was collected for a step that did not come."""
        for source in (self.statistics, self.head):
            if source is not None:
                source.drop()

    def _update_statistics(self) -> None:
        if self.statistics is None or not self.due(self.steps):
            return
        collected = self.statistics.take() if self._carried is None else self._carried
        self._carried = None
        if collectives.world_size() > 1:
            from hf_precond.statistics import moments, requests

            self._refuse_other_ranks()
            shapes = {request.key: moments.request_shape(request) for request in self.requests()}
            dtype, device = compute_dtype(self._first.dtype), self._first.device
            stacks = {r.key: r.matrix.stack for r in self.requests() if hasattr(r, "matrix")}
            experts = {key: stack[0] for key, stack in stacks.items() if stack}
            collected = requests.all_reduce_statistics(collected, shapes, dtype, device, experts)
            if self.coverage.needs:  # what no rank has collected; waits for the device
                counts = torch.stack([statistic.count.sum() for statistic in collected.values()])
                numbers = zip(collected, counts.tolist(), strict=True)
                collected = {key: collected[key] for key, number in numbers if number}
        if self.statistics.outdated:
            self.close()
            self._bind()
            self._lay_out()
            self._open()
        else:
            source = self.statistics
            if self.coverage.judge(self.state, collected, source.missing, self.config.name):
                source.watch()
        self.update_statistics(collected)

    def _refuse_other_ranks(self) -> None:
        """Refuse to sum the statistics of ranks whose models decided otherwise; looked at once."""
        if not self.structure.decided or self._ranks_agree:
            return
        own = len(self.bound)
        numbers = torch.tensor([own, own * own]).to(self._first.device)
        total, squares = collectives.sum_over_ranks(numbers).tolist()
        if total * total != squares * collectives.world_size():
            said = _said(self.structure.decided)
            raise RuntimeError(messages.OTHER_RANKS.format(name=self.config.name, fields=said))
        self._ranks_agree = True

    def _apply(self) -> None:
        unobserved = self.coverage.without_preconditioner
        ready = kept("ready", self.bound, self._ready)
        ready = [bound for bound in ready if bound not in unobserved] if unobserved else ready
        resting = [bound.weight.clone() for bound in self._pruned]
        handled: list[Bound] = []
        directions: list[ParamView] = []
        gradients: list[ParamView] = []
        gathered: dict[Tensor, Tensor] = {}
        held = 0
        for item in self.precondition(ready):
            handled += (item.bound,)
            if item.matrix is None:
                continue
            if item.kind == "direction":
                directions += self._views(item, gathered)
                continue
            gradients += self._views(item, gathered)
            held += item.matrix.numel()
            if held > STEP_ENTRIES and self.fallback.elementwise:
                self._step_by_fallback(gradients)
                gradients, held = [], 0
        gradients += self._raw_views(handled, gathered)
        self._step_by_fallback(gradients, self.head)
        if directions:
            descend(directions)
        for view in directions:
            view.grad = view.param  # no memory is held until the next step
        for parameter, whole in gathered.items():
            parameter.copy_(like(parameter, whole))
        for bound, before in zip(self._pruned, resting, strict=True):
            # No gradient says where a pruned entry should go: a preconditioner mixes in others'.
            assert bound.matrix.mask is not None
            bound.weight.copy_(torch.where(bound.matrix.mask.bool(), bound.weight, before))

    def _ready(self) -> list[Bound]:
        return [bound for bound in self.bound if bound.weight.grad is not None]

    def _step_by_fallback(self, views: Sequence[ParamView], head: NewHead | None = None) -> None:
        left = views if head is None else head.step(views)
        if left:
            self.fallback.update(left)
        for view in views:
            view.grad, view.settled = view.param, True  # no memory is held until the next step

    def _views(self, item: Preconditioned, gathered: dict[Tensor, Tensor]) -> Sequence[ParamView]:
        """What a preconditioner made of a gradient, as views; those of whole weights are kept."""
        bound, matrix, groups = item.bound, item.matrix, self.param_groups
        # A direction needs no state: an empty one must not appear in self.state.
        state = self.state if item.kind == "gradient" else {}
        make = partial(bound.whole_views, groups, state)
        views = self.layout.keep(item.kind, [bound], make)
        assert matrix is not None
        if views is None:
            return bound.views(matrix, groups, state, gathered, item.parts)
        parts = bound.split(matrix) if item.parts is None else item.parts
        for view, part in zip(views, parts, strict=False):
            assert part is not None
            view.grad = part
        return views

    def _raw_views(
        self, handled: Sequence[Bound], gathered: dict[Tensor, Tensor]
    ) -> list[ParamView]:
        """Everything with a gradient outside ``handled``, to be stepped by its raw gradient."""
        rows: list[ParamView] = []
        for bound in kept("fused", self.bound, self._fused):
            if bound not in handled:
                rows += bound.raw_views(self.param_groups, self.state, gathered)
        self._mark_hidden(rows)
        whole = self.layout.keep("raw", handled, partial(self._whole_views, handled))
        for view in whole:
            assert view.param.grad is not None
            view.grad = view.param.grad
        return rows + whole

    def _fused(self) -> list[BoundMatrix]:
        held = (*self.bound, *self._remainders)
        return [bound for bound in held if isinstance(bound, BoundMatrix) and bound.fused]

    def _whole_views(self, handled: Sequence[Bound]) -> list[ParamView]:
        """Views of whole parameters that no preconditioner steps."""
        taken = {id(p) for bound in (*handled, *self._fused()) for p in bound.parameters}
        views = [
            ParamView(parameter, parameter.grad, self.state[parameter], "", group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and id(parameter) not in taken
        ]
        self._mark_hidden(views)
        return views

    def _mark_hidden(self, views: Sequence[ParamView]) -> None:
        """Say which views are of matrices of hidden layers."""
        hidden = {id(self.state.get(m.weight_parameter)): m for m in self.structure.hidden}
        for view in views if hidden else ():
            matrix = hidden.get(id(view.state))
            view.hidden = matrix is not None and (bool(matrix.stack) or len(view.shape) == 2)
            if matrix is not None and matrix.stack:
                view.matrix = matrix  # which says that it is a stack of matrices

    # Binding to parameter groups and to the model --------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the optimizer knows in which layers its parameters are; see :meth:`attach`."""
        return bool(self.structure.owners) or self.structure.reread is None

    @property
    def _first(self) -> Tensor:
        return next(parameter for group in self.param_groups for parameter in group["params"])

    def _group_numbers(self) -> dict[int, int]:
        """``id`` of every parameter held now to its group's number; not to be kept."""
        groups = enumerate(self.param_groups)
        return {id(parameter): number for number, group in groups for parameter in group["params"]}

    def _locate(self) -> None:
        """Find what is preconditioned again in parameter groups that may have changed."""
        groups = self._group_numbers()
        if self.validator.moved(groups) and self.structure.model is not None:
            self._read_again(self.structure.model)
        for bound in (*self.bound, *self._remainders):
            bound.locate(groups)
        self.validator.check(groups, self.bound)
        self.validator.warn_of_idle(self.param_groups, self.config.name)

    def _read_again(self, model: nn.Module) -> None:
        """Go on with the parameters of layers that were pruned or parametrised since the last step.

        They are the same ones. A layer whose weight is no longer a matrix that is stepped is left
        to the fallback optimizer, which begins anew.
        """
        from hf_precond.architectures.computed import successors

        before, collected = self.bound, None
        if self.statistics is not None and self.due(self.steps):
            collected = self.statistics.take()
        try:
            self.attach(model)
        except ValueError:  # nothing is left to precondition: no reason to stop a training
            from hf_precond.architectures.parameters import ParameterSurvey

            known = self.structure
            self.structure = ParameterSurvey(model).structure(self.config, {})
            self.structure.reread, self.structure.decided = known.reread, known.decided
            self._bind()
            self._route()
            self._open()
        if collected is not None:
            from hf_precond.statistics.moments import request_shape

            shapes = {request.key: tuple(request_shape(request)) for request in self.requests()}
            self._carried = {
                key: statistic
                for key, statistic in collected.items()
                if shapes.get(key) == tuple(statistic.sum.shape)
            }
        held = {id(bound.weight) for bound in self.bound}
        lost: list[LayerMatrix] = []
        for bound in before:
            matrix = bound.matrix if isinstance(bound, BoundMatrix) else None
            found = [] if matrix is None else successors(matrix.module, matrix.weight)
            if matrix is not None and found and held.isdisjoint(map(id, found)):
                lost.append(matrix)
                for parameter in found:
                    self.state.pop(parameter, None)
        if lost:
            first = lost[0].name.partition("[")[0]
            said = (r.reason for r in self.routing if r.name.startswith(f"{first}."))
            computed = (reason for reason in said if "computed from" in reason)
            reason = next(computed, "their weights are computed from them")
            name, count = self.config.name, len(lost)
            message = messages.PARAMETRISED.format(
                name=name, count=count, first=first, reason=reason
            )
            warn(message)

    def _bind(self) -> None:
        """Find the parameter groups of everything that is preconditioned."""
        self.layout = Layout()
        groups, structure = self._group_numbers(), self.structure
        self.validator = ParamGroupValidator(structure.owners, groups)
        self.bound: list[Any] = []
        before = self.head
        if before is not None:
            before.close()
        args = (self.config, self.param_groups, self.state, self.common_lr, self.resumed_head)
        self.head = NewHead.find(structure.model, *args)
        if self.head is not None and before is None:
            self.head.announce()
        head = set() if self.head is None else {matrix.name for matrix in self.head.matrices}
        matrices = [matrix for matrix in structure.matrices if matrix.name not in head]
        for matrix in matrices:
            bias = matrix.bias_parameter
            bias_group = None if bias is None else groups.get(id(bias))
            group = groups.get(id(matrix.weight_parameter))
            if group is not None:
                self.bound.append(BoundMatrix(matrix, group, bias_group))
        for norm in structure.norms:
            group = groups.get(id(norm.parameter))
            if group is not None:
                self.bound.append(BoundNorm(norm, group))
        names = [matrix.name for matrix in matrices]
        names += [norm.name for norm in structure.norms]
        if names and not self.bound:
            name, optimizer = names[0], self.config.name
            raise ValueError(messages.NOT_IN_GROUPS.format(name=name, optimizer=optimizer))
        self._remainders = parameters.fused_remainders(self.bound)
        held = [bound for bound in self.bound if isinstance(bound, BoundMatrix)]
        self._pruned = [bound for bound in held if bound.matrix.mask is not None]

    def _open(self) -> None:
        requests, structure = self.requests(), self.structure
        if hasattr(self, "coverage"):
            self.coverage.forget()
        fallback = getattr(self.config, "base", "adamw") if self.falls_back else None
        self.coverage = StatisticsCoverage(self.needs(), structure, fallback)
        self.coverage.restore(self.state)
        if requests and structure.open_statistics is not None:
            self.statistics = structure.open_statistics(requests)
        elif requests and structure.model is not None:
            self.statistics = self._statistics_of(structure.model, requests)
        if self.scaler is not None:
            self.attach_scaler(self.scaler)
        self._enable_statistics()

    def _statistics_of(self, model: nn.Module, requests: Sequence[Any]) -> StatisticsSource:
        """The source of second moments, or of curvature; its hooks are installed in the model."""
        from hf_precond.statistics.requests import MomentRequest

        if isinstance(requests[0], MomentRequest):
            from hf_precond.statistics.collector import MomentCollector

            return MomentCollector(model, requests)
        from hf_precond.statistics.hessian_probe import CurvatureProbe

        return CurvatureProbe(model, requests)

    def _enable_statistics(self) -> None:
        if self.statistics is not None:
            self.statistics.enable(self.due(self.steps), self.steps)
        if self.head is not None:
            self.head.enable(self.steps)

    def attach_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Name the loss scaler of a float16 loop that runs without a ``Trainer``.

        Statistics of output gradients are then divided by the loss scale.
        ``optimizer.zero_grad()`` (not ``model.zero_grad()``) drops those of a
        step that the scaler skipped.

        Args:
            scaler: the scaler.
        """
        from hf_precond.compat.torch_internals import loss_scale

        self.scaler = scaler
        if self.statistics is not None:
            self.statistics.loss_scale = partial(loss_scale, scaler)

    def attach(self, model: nn.Module) -> None:
        """Read ``model`` (whose parameters this optimizer holds) and install the hooks.

        An optimizer made without a model cannot step until this is called, and
        a deep copy has no hooks until then. A state may be loaded before.

        Args:
            model: the model.

        Raises:
            RuntimeError: the optimizer was made with a structure by hand.
            ValueError: nothing of ``model`` would be preconditioned, or a state
                that was loaded before is of another model.
        """
        if self.structure.reread is None:
            raise RuntimeError(messages.HAND_MADE)
        self.close()
        structure = self.structure.reread(model)
        if self.loaded is not None:
            own = checkpoint.identity(self.config, self.param_groups, structure.owners)
            checkpoint.refuse_other_model(self.config.name, self.loaded, own["parameters"])
            self.loaded = None
        self.structure = structure
        self._bind()
        self._route()
        self._open()

    def _route(self) -> None:
        """Note the parameter groups in the routing table of a model that was just read."""
        self.joined = ()
        if self.structure.reread is not None:
            routing = routed(self.structure, self.param_groups, self.config, self.given)
            self.structure.routing = routing if self.head is None else self.head.routed(routing)

    def refuse_joined(self) -> None:
        """Refuse to train a model of which other parameters train than when this was made.

        Raises:
            ValueError: one is in none of the parameter groups; with what to do under a Trainer.
        """
        model, groups = self.structure.model, self._group_numbers()
        joined = [] if model is None else self.validator.joined(model, groups)
        if joined:
            name, count = self.config.name, len(joined)
            raise ValueError(messages.JOINED.format(name=name, count=count, first=joined[0]))

    def close(self) -> None:
        """Remove every hook. The optimizer can still step, with the preconditioners it has."""
        if self.statistics is not None:
            self.statistics.close()
            self.statistics = None
        if self.head is not None:
            self.head.close()

    # What torch optimizers have ----------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; the fallback optimizer steps those that no structure names.

        Args:
            param_group: as for any torch optimizer.

        Raises:
            ValueError: for complex parameters, a parameter that stands twice, a value out of
                range, and a field that holds for all groups alike.
        """
        param_group.setdefault("step", self.steps if self.param_groups else 0)
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        try:
            parameters.refuse_complex(added, self.config.name)
            check_group(self.param_groups[-1], self.config)
        except ValueError:
            del self.param_groups[-1]
            raise
        if hasattr(self, "bound"):
            number = len(self.param_groups) - 1
            names = note_added(self.structure, number, self.param_groups[-1])
            self.joined = [*self.joined, *names] if self.structure.reread is not None else ()

    def change_lr(self, lr: float) -> bool:
        """Take another learning rate before a schedule begins, in the config and in the groups.

        A group with a rate of its own keeps it.

        Args:
            lr: as the config's, of which ``head_lr_scale`` and ``layer_lr_decay`` make the groups'.

        Returns:
            Whether there was a group to change; otherwise nothing has changed.
        """
        model, before = self.structure.model, self.config.lr
        scales = {1.0} if model is None else rate_scales(model, self.config)
        rates = {before * scale: lr * scale for scale in scales}
        own = [(group, group.get("initial_lr", group["lr"])) for group in self.param_groups]
        followers = [(g, rates[r]) for g, r in own if not isinstance(r, Tensor) and r in rates]
        for group, rate in followers:
            group |= {key: rate for key in ("lr", "initial_lr") if key in group}
        if not followers:
            return False
        self.config = self.config.replace(lr=lr)
        self.common_lr = self.defaults["lr"] = lr
        if self.head is not None:
            self.head.lr = lr
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the statistics collected for a step that did not come.

        Args:
            set_to_none: as for any torch optimizer.
        """
        super().zero_grad(set_to_none)
        self._drop()

    def state_dict(self) -> dict[str, Any]:
        """The state, as of any torch optimizer, and the identity of optimizer and model.

        Returns:
            Plain values and tensors, which ``weights_only`` loads. Once there
            is state, every parameter has an entry.
        """
        own = self._identity()
        checkpoint.forget_empty(self.state)
        return checkpoint.complete(super().state_dict()) | {checkpoint.KEY: own}

    def _identity(self, decided: Mapping[str, Any] | None = None) -> dict[str, Any]:
        head = () if self.head is None else self.head.names
        config = self.config.replace(**(decided or self.structure.decided))
        own = checkpoint.identity(config, self.param_groups, self.structure.owners, head)
        return own | {"lr": self.common_lr, "head_inputs": "centred"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`'s output; every tensor keeps its own dtype.

        Args:
            state_dict: of this release or of an earlier one.

        Raises:
            ValueError: the state is of another model or optimizer, was saved
                with other fields, or is not whole; nothing has been loaded.
        """
        decided = self.decided_by(state_dict)
        own = self._identity(decided)
        check_saved_head(state_dict.get(checkpoint.KEY, own), self.config)
        with checkpoint.restoring(self, own, self.config):
            super().load_state_dict(state_dict)
        self.layout = Layout()
        if not self.attached:
            self.loaded = state_dict.get(checkpoint.KEY, own)["parameters"]
        checkpoint.forget_empty(self.state)
        if checkpoint.KEY in state_dict:
            self.resumed_head = state_dict[checkpoint.KEY].get("head", ())
        self.common_lr = state_dict.get(checkpoint.KEY, {}).get("lr", self.common_lr)
        if self.head is not None:  # torch makes a new state
            self.head.state, self.head.lr = self.state, self.common_lr
        self._follow(decided)
        resumed = own["head"] if self.resumed_head is None else self.resumed_head
        if self.structure.model is not None and set(resumed) != set(own["head"]):
            self.close()
            self._bind()
            self._route()
            self._open()
        self.coverage.restore(self.state)
        self._drop()  # of a step that was given up
        self._enable_statistics()

    def decided_by(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What fields that are ``auto`` mean in a training that goes on with a state.

        Args:
            state_dict: the state, which knows what the model decided when it was begun.
        """
        return self.structure.decided | checkpoint.decided(self.config, state_dict)

    def _follow(self, decided: dict[str, Any]) -> None:
        """Read the model as the training did that is resumed."""
        if decided == self.structure.decided or self.structure.reread is None:
            return
        reread = partial(read_model, config=self.config, decided=decided)
        if self.structure.model is None:
            self.structure.reread, self.structure.decided = reread, decided
            return
        if collectives.rank() == 0:
            said = _said(decided)
            logger.warning(messages.FOLLOWED, self.config.name, said)
        self.structure.reread = reread
        self.attach(self.structure.model)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its own statistics and counters, and no hooks until :meth:`attach`."""
        own = ("config", "common_lr", "structure", "fallback", "counters", "failures", "coverage")
        bound = ("given", "loaded", "joined", "bound", "_remainders", "validator")
        names = (*own, *bound, "resumed_head")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    # What a person sees (and what :class:`Reporting` has) ---------------------------------

    @property
    def routing(self) -> RoutingTable:
        """Every parameter, how it is stepped, and why."""
        return self.structure.routing


def _said(fields: Mapping[str, Any]) -> str:
    """Fields as ``--optim_args`` has them."""
    return ",".join(f"{field}={value}" for field, value in fields.items())
