"""The step that all optimizers of this package share: a template that each of them fills in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.groups import given_groups, parameter_groups, rate_scales
from hf_precond.architectures.structure import ModelStructure
from hf_precond.compat.warn import warn
from hf_precond.config.base import OptimizerConfig
from hf_precond.distributed import collectives
from hf_precond.distributed.collectives import all_finite, like
from hf_precond.linalg.products import compute_dtype, without_autocast
from hf_precond.optimizers.base import checkpoint, messages, parameters
from hf_precond.optimizers.base.binding import ModelBinding
from hf_precond.optimizers.base.fallback import (
    FallbackOptimizer,
    descend,
    group_defaults,
    make_fallback,
)
from hf_precond.optimizers.base.groups import check_group, have_own_rates, note_added
from hf_precond.optimizers.base.layout import Layout, facts_of, kept
from hf_precond.optimizers.base.new_head import NewHead, check_saved_head
from hf_precond.optimizers.base.parameters import (
    Bound,
    BoundMatrix,
    ParamView,
    Preconditioned,
)
from hf_precond.optimizers.base.refresh import Counters, FailureRecord
from hf_precond.optimizers.base.reporting import Reporting
from hf_precond.registry import make_config, read_model

if TYPE_CHECKING:
    from hf_precond.statistics.requests import Statistic

logger = logging.getLogger(__name__)

STEP_ENTRIES = 2**25
"""Entries of preconditioned gradients that a step holds before AdamW or SGD takes them."""


class PrecondOptimizer(ModelBinding, Reporting, torch.optim.Optimizer):
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
    rates: Sequence[Any] = ()  # of the last step, by group: a scheduler may have changed them since
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
        self._bind_to_structure()

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
            self._bind_to_structure()
        self.coverage.restore(self.state)
        self._drop()  # of a step that was given up
        self._enable_statistics()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its own statistics and counters, and no hooks until :meth:`attach`."""
        own = ("config", "common_lr", "structure", "fallback", "counters", "failures", "coverage")
        bound = ("given", "loaded", "joined", "bound", "_remainders", "validator")
        names = (*own, *bound, "resumed_head")
        return super().__getstate__() | {name: getattr(self, name) for name in names}
