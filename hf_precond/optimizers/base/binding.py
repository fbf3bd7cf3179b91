"""What an optimizer holds of its model: the layers it preconditions, their groups, the hooks."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.structure import LayerMatrix, ModelStructure, RoutingTable
from hf_precond.compat.warn import warn
from hf_precond.distributed import collectives
from hf_precond.optimizers.base import checkpoint, messages, parameters
from hf_precond.optimizers.base.coverage import StatisticsCoverage
from hf_precond.optimizers.base.groups import routed
from hf_precond.optimizers.base.layout import Layout
from hf_precond.optimizers.base.new_head import NewHead
from hf_precond.optimizers.base.parameters import BoundMatrix, BoundNorm, ParamGroupValidator
from hf_precond.registry import read_model

if TYPE_CHECKING:
    from hf_precond.statistics.requests import Request, Statistic, StatisticsSource

logger = logging.getLogger(__name__)


class ModelBinding:
    """The part of an optimizer that knows the model.

    It binds each matrix to its parameter group, opens the source of the statistics that a subclass
    asks for (:meth:`requests`, :meth:`due`), and reads the model again where its layers changed or
    a training is resumed that read it otherwise.
    """

    config: Any
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    structure: ModelStructure
    layout: Layout
    coverage: StatisticsCoverage
    validator: ParamGroupValidator
    bound: list[Any]
    common_lr: float | None
    given: int
    falls_back = True
    """Whether a matrix without statistics is stepped by the fallback optimizer."""
    statistics: StatisticsSource | None = None
    scaler: torch.amp.GradScaler | None = None
    loaded: Any = None  # what a state that came before attach() says of its model
    joined: Sequence[str] = ()
    """Parameters of the model that were added to a group since it was read."""
    head: NewHead | None = None  # what is stepped by what it does to the outputs
    resumed_head: Sequence[str] | None = None  # its layers in the training that is resumed
    _carried: dict[str, Statistic] | None = None  # from hooks that were replaced before the step
    _pruned: Sequence[BoundMatrix] = ()
    _ranks_agree = False  # on what their models decided

    @property
    def steps(self) -> int:
        """The number of steps taken so far; inside ``step()`` that of the current one, from 0."""
        return self.param_groups[0]["step"]

    # What a subclass asks of the model ------------------------------------------------

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

    # Binding to parameter groups ------------------------------------------------------

    @property
    def routing(self) -> RoutingTable:
        """Every parameter, how it is stepped, and why."""
        return self.structure.routing

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
            self._bind_to_structure()
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

    def _bind_to_structure(self) -> None:
        """Bind to what was found in the model, and install the hooks."""
        self._bind()
        self._route()
        self._open()

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
        self._bind_to_structure()

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

    # What fields that are ``auto`` mean ------------------------------------------------

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


def _said(fields: Mapping[str, Any]) -> str:
    """Fields as ``--optim_args`` has them."""
    return ",".join(f"{field}={value}" for field, value in fields.items())
