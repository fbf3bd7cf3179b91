"""Steps of a newly initialised head, measured in what they change of its outputs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.modules import find_matrices, is_layer, is_linear
from hf_precond.architectures.parameters import base_of, find_head
from hf_precond.architectures.pretrained import find_new_head, head_layers
from hf_precond.architectures.structure import LayerMatrix, RoutingTable
from hf_precond.compat.torch_internals import WRAPPERS
from hf_precond.config.base import OptimizerConfig
from hf_precond.distributed import collectives
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.base import messages
from hf_precond.optimizers.base.agreement import agreement
from hf_precond.optimizers.base.fallback import AdamWFallback, descend
from hf_precond.optimizers.base.parameters import ParamView
from hf_precond.statistics.requests import MomentRequest, StatisticsSource, all_reduce_statistics

logger = logging.getLogger(__name__)

INTERVAL = 20
"""Steps between two looks at the head's input, which changes as slowly as the body does."""
FLOOR = 1e-6
"""Smallest mean square change of the outputs that a step is scaled by, over that of inputs with the
same trace which have no direction: momentum may point where a batch has no inputs."""
SHIFT = 5.0
"""AdamW's rate for the constant part of logits, over ``head_step``."""
MEMORY = 64
"""Tokens of earlier looks that enter a moment beside those of the last, at most."""
MOMENT = "head_input"
"""The state of a layer that holds its input's second moment."""
TOKENS = "head_tokens"
"""The state of a layer that holds how many tokens that moment is the mean of."""


def moment_is_due(step: int) -> bool:
    """Whether the head's input is looked at: at steps 0, 1, 2, 4, …, then every 20.

    Args:
        step: the step's number, from 0.
    """
    return step % INTERVAL == 0 if step >= INTERVAL else step & (step - 1) == 0


class NewHead:
    """The linear layers of a new head, stepped along AdamW's directions by steps of known effect.

    With μ the mean and A the second moment of a layer's inputs over n tokens, those whose output
    the loss reads (one of a decoder's sequence), W ``[out, in]`` its weight and b its bias, ``W x +
    b = W (x - μ) + (b + W μ)``. W and the constant part are stepped apart, each along AdamW's
    direction of its own gradient, ``dW - db μᵀ`` and db::

        W ← (1 - lr·wd) W - s a D_W ,      a = ρ / √(tr(D_W C D_Wᵀ) / out) ,  C = A - μ μᵀ + A / n
        b ← b - s (k ρ D_b - a D_W μ) ,    s = (lr / lr₀) min(1, ‖m‖ / (‖√v‖ r₀))

    ρ is ``head_step``: the root mean square change of the outputs' variable part. lr₀ is the rate
    that a schedule starts from or rises to, so the rate of the body, the width of the features and
    their scale do not matter. The constant part of logits, which has AdamW's step of about kρ with
    k = 5, soon knows how frequent the classes are; the body need not learn it. k is 1 in a hidden
    layer of the head and in a regression, whose targets have a scale of their own. ``A / n`` keeps
    the steps of few tokens, whose covariance is singular, those of A. Where gradients vanish, as
    when the training set is learned, steps do too: m and v are AdamW's moments of W, and ``r₀² =
    (1-β₁)/(1+β₁)`` the ratio of independent gradients of one size.

    Without a bias that trains there is no such division: of W alone the root mean square change of
    all its outputs is ρ, with A in the place of C.

    A layer whose input was not seen is stepped by AdamW at ``lr``.

    Args:
        model: the model.
        matrices: the layers.
        config: the optimizer's.
        state: the optimizer's.
        lr: the rate of its groups that have none of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Sequence[LayerMatrix],
        config: OptimizerConfig,
        state: MutableMapping[Tensor, dict[str, Any]],
        lr: float,
    ) -> None:
        from hf_precond.statistics.collector import MomentCollector

        self.matrices, self.config, self.state, self.lr = matrices, config, state, lr
        self.adamw = AdamWFallback()
        self.shifts = _shifts(model, matrices)
        self.requests = [
            MomentRequest(matrix.name, "input", matrix, reached=True) for matrix in matrices
        ]
        self.source: StatisticsSource | None = MomentCollector(model, self.requests)
        self.due = False

    @property
    def names(self) -> list[str]:
        """Of the layers, as in the model without its wrappers."""
        return [WRAPPERS.sub("", matrix.name) for matrix in self.matrices]

    @classmethod
    def find(
        cls,
        model: nn.Module | None,
        config: OptimizerConfig,
        groups: Sequence[Mapping[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        lr: float | None,
        names: Collection[str] | None = None,
    ) -> NewHead | None:
        """The new head of a model, ``None`` where there is none or its rate was given.

        Args:
            model: the model.
            config: the optimizer's.
            groups: the optimizer's; one with a rate of its own keeps it.
            state: the optimizer's.
            lr: the rate of groups that have none of their own, ``None`` where all have one.
            names: of the layers in the training that is resumed, whose head is no longer new.
        """
        if model is None or lr is None or not _is_asked_for(config):
            return None
        common = {
            id(parameter)
            for group in groups
            if group.get("initial_lr", group["lr"]) == lr
            for parameter in group["params"]
        }
        layers = find_new_head(model) if names is None else head_layers(model)
        found = [
            matrix
            for matrix in layers
            if all(id(parameter) in common for parameter in _parameters(matrix))
            and (names is None or WRAPPERS.sub("", matrix.name) in names)
        ]
        own = {id(parameter) for matrix in found for parameter in _parameters(matrix)}
        if not found or all(id(p) in own for p in model.parameters() if p.requires_grad):
            return None
        return cls(model, found, config, state, lr)

    def announce(self) -> None:
        """Say in a line how the head is stepped."""
        if collectives.rank() == 0:
            names = ", ".join(self.names)
            logger.warning(messages.NEW_HEAD, self.config.name, names, self.config.head_step)

    def routed(self, routing: RoutingTable) -> RoutingTable:
        """A routing table that says how the head is stepped.

        Args:
            routing: the optimizer's.
        """
        reason = f"new head: a step changes what varies of its outputs by {self.config.head_step:g}"
        own = {f"{m.name}.{each}" for m in self.matrices for each in (m.weight, m.bias)}
        return RoutingTable(
            [
                dataclasses.replace(route, treatment="adamw", reason=reason)
                if route.name in own
                else route
                for route in routing
            ]
        )

    def enable(self, step: int) -> None:
        """Look at the input of the passes before a step, or do not.

        Args:
            step: the step's number.
        """
        if self.source is None:
            return
        known = all(MOMENT in self.state[m.weight_parameter] for m in self.matrices)
        self.due = not known or moment_is_due(step)
        self.source.enable(self.due, step)

    def update(self) -> None:
        """Take the moments that were collected for this step, summed over ranks."""
        if self.source is None or not self.due:
            return
        collected = self.source.take()
        if collectives.world_size() > 1:
            from hf_precond.statistics.moments import request_shape

            shapes = {request.key: request_shape(request) for request in self.requests}
            first = self.matrices[0].weight_parameter
            dtype = compute_dtype(first.dtype)
            collected = all_reduce_statistics(collected, shapes, dtype, first.device)
        for matrix in self.matrices:
            found = collected.get(matrix.name)
            if found is None:
                continue
            state, mean = self.state[matrix.weight_parameter], found.sum / found.count.clamp_min(1)
            if MOMENT not in state and not found.count:  # waits for the device, once
                continue
            held = state.get(MOMENT, torch.zeros_like(mean))
            tokens = state.get(TOKENS, mean.new_zeros(()))
            usable = (found.count > 0) & mean.isfinite().all()
            total = tokens.clamp_max(MEMORY) + found.count
            share = found.count / total
            state[MOMENT] = torch.where(usable, held + share * (mean - held), held)
            state[TOKENS] = torch.where(usable, total, tokens).to(mean.dtype)

    def allocate(self, views: Sequence[ParamView]) -> Sequence[ParamView]:
        """Make AdamW's state of the head.

        Args:
            views: of parameters that are about to be stepped.

        Returns:
            The others.
        """
        own, others = self._divide(views)
        self.adamw.allocate(own)
        return others

    def step(self, views: Sequence[ParamView]) -> Sequence[ParamView]:
        """Step the head by its gradients.

        Args:
            views: of parameters that are about to be stepped.

        Returns:
            The others.
        """
        own, others = self._divide(views)
        measured = {
            id(parameter): matrix
            for matrix in self.matrices
            if MOMENT in self.state[matrix.weight_parameter]
            for parameter in _parameters(matrix)
        }
        self.adamw.update([view for view in own if id(view.param) not in measured])
        known = self._centred([view for view in own if id(view.param) in measured], measured)
        pairs = zip(known, self.adamw.directions(known), strict=True)
        directions: dict[int, Tensor] = {}
        trends: dict[int, Tensor] = {}
        for view, (first, root) in pairs:
            matrix = measured[id(view.param)]
            directions[id(view.param)] = first / (root + view.group["eps"])
            if view.param is matrix.weight_parameter or id(matrix) not in trends:
                trends[id(matrix)] = _trend(first, root, view.group["betas"][0])
        moved: dict[int, Tensor] = {}
        for matrix in {id(m): m for m in measured.values() if id(m) in trends}.values():
            moved |= self._scale(matrix, directions, trends[id(matrix)])
        steps = []
        groups = {id(view.param): view.group for view in known}
        for view in known:
            steps.append(self._finished(view, directions[id(view.param)], view.group))
            if id(view.param) in moved:
                weights = groups[id(measured[id(view.param)].weight_parameter)]
                steps.append(
                    self._finished(view, moved[id(view.param)], weights | {"weight_decay": 0.0})
                )
        descend(steps)
        return others

    def _finished(self, view: ParamView, step: Tensor, group: dict[str, Any]) -> ParamView:
        """A view with a step at the peak of the schedule, to be scaled by its group's rate."""
        peak = group.get("max_lr", group.get("initial_lr", self.lr))
        return dataclasses.replace(view, grad=step * _inverse(peak), group=group)

    def _centred(
        self, views: Sequence[ParamView], measured: Mapping[int, LayerMatrix]
    ) -> list[ParamView]:
        """The views, of weights with the gradient at inputs less their mean: ``dW - db μᵀ``."""
        gradients = {id(view.param): view.grad for view in views}
        centred = []
        for view in views:
            matrix = measured[id(view.param)]
            if view.param is matrix.weight_parameter and id(matrix.bias_parameter) in gradients:
                mean = self.state[view.param][MOMENT][:-1, -1]
                bias = collectives.full(gradients[id(matrix.bias_parameter)]).to(mean.dtype)
                shift = _laid_out(matrix, bias[:, None] * mean)
                gradient = view.grad.to(mean.dtype) - collectives.like(view.grad, shift)
                view = dataclasses.replace(view, grad=gradient)
            centred.append(view)
        return centred

    def _divide(
        self, views: Sequence[ParamView]
    ) -> tuple[Sequence[ParamView], Sequence[ParamView]]:
        """The head's views, and the others."""
        held = {id(parameter) for matrix in self.matrices for parameter in _parameters(matrix)}
        fields = {"betas": self.config.betas, "eps": self.config.eps}  # groups of SGD have none
        is_own = [*map(held.__contains__, map(id, [view.param for view in views]))]
        flagged = list(zip(views, is_own, strict=True))
        own = [dataclasses.replace(v, group=fields | v.group) for v, is_its in flagged if is_its]
        return own, [view for view, is_its in flagged if not is_its]

    def _scale(
        self, matrix: LayerMatrix, directions: MutableMapping[int, Tensor], trend: Tensor
    ) -> dict[int, Tensor]:
        """Scale a layer's directions to steps at the peak of the schedule.

        Args:
            matrix: the layer's.
            directions: by ``id`` of the parameter; one without a gradient has none.
            trend: the share that is left of the steps' lengths.

        Returns:
            By ``id`` of the bias, what keeps the outputs' constant part where W moves.
        """
        state, rho = self.state[matrix.weight_parameter], self.config.head_step
        weight, bias = (
            None if each is None else directions.get(id(each))
            for each in (matrix.weight_parameter, matrix.bias_parameter)
        )
        if bias is not None:
            rate = rho * self.shifts[matrix.name]
            directions[id(matrix.bias_parameter)] = bias * (rate * trend)
        if weight is None:
            return {}
        rows, columns = _laid_out(matrix, collectives.full(weight)), matrix.shape[1]
        moment, mean = state[MOMENT][:columns, :columns], state[MOMENT][:-1, -1]
        if bias is not None:
            tokens = state.get(TOKENS, moment.new_ones(())).clamp_min(1)
            moment = moment - mean[:, None] * mean + moment / tokens
        squared = ((rows @ moment) * rows).sum() / len(rows)
        even = rows.square().sum() * moment.diagonal().mean() / len(rows)
        squared = torch.maximum(squared, FLOOR * even)
        scale = torch.where(squared > 0, rho * trend * squared.rsqrt(), 0.0)
        directions[id(matrix.weight_parameter)] = weight * scale
        if bias is None:
            return {}
        return {id(matrix.bias_parameter): collectives.like(bias, (rows @ mean) * -scale)}

    def drop(self) -> None:
        """Forget what was collected for a step that did not come."""
        if self.source is not None:
            self.source.drop()

    def close(self) -> None:
        """Remove every hook; steps go on by what was seen of the input."""
        if self.source is not None:
            self.source.close()
            self.source = None


def check_saved_head(saved: Mapping[str, Any], config: OptimizerConfig) -> None:
    """Refuse to go on with a rate where a training stepped its new head by its outputs.

    Of one that an earlier release began, say that the steps are others.

    Args:
        saved: what the state says of itself.
        config: the optimizer's.

    Raises:
        ValueError: with what to do.
    """
    head = saved.get("head", ())
    if head and not _is_asked_for(config):
        fields = f"head={config.head!r} and head_lr_scale={config.head_lr_scale:g}"
        raise ValueError(messages.RATED_HEAD.format(name=config.name, first=head[0], fields=fields))
    if head and "head_inputs" not in saved and collectives.rank() == 0:
        logger.warning(messages.EARLIER_HEAD, config.name)


def _trend(first: Tensor, root: Tensor, beta: float) -> Tensor:
    """``min(1, ‖m‖ / (‖√v‖ r₀))``."""
    norms = [torch.linalg.vector_norm(collectives.full(each)) for each in (first, root)]
    return agreement(norms[0], norms[1], beta, 1.0)


def _shifts(model: nn.Module, matrices: Sequence[LayerMatrix]) -> dict[str, float]:
    """Of each layer k: 1 where the head goes on above it, and where it makes no logits."""
    names, inner = find_head(model), base_of(model)
    places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    held = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    head = [m for m in find_matrices(model) if id(m.weight_parameter) in held]
    regression = getattr(getattr(inner, "config", None), "problem_type", None) == "regression"

    def goes_on(matrix: LayerMatrix) -> bool:
        rows, place = matrix.shape[0], places.get(id(matrix.weight_parameter), 0)
        return any(
            other.shape[1] == rows if is_linear(other.module) else other.shape[1] % rows == 0
            for other in head
            if is_layer(other.module) and places.get(id(other.weight_parameter), 0) > place
        )

    return {m.name: 1.0 if regression or m.shape[0] == 1 or goes_on(m) else SHIFT for m in matrices}


def _laid_out(matrix: LayerMatrix, weight: Tensor) -> Tensor:
    """``[out, in]`` as the weight lies in memory, and back."""
    return weight.mT if matrix.layout == "transposed" else weight


def _inverse(peak: float | Tensor) -> float | Tensor:
    """``1 / peak``; 0 at a peak of 0, where nothing moves."""
    if isinstance(peak, Tensor):
        return torch.where(peak > 0, 1 / peak, 0.0)
    return 1 / peak if peak > 0 else 0.0


def _is_asked_for(config: OptimizerConfig) -> bool:
    return config.head == "auto" and config.head_lr_scale == 1.0


def _parameters(matrix: LayerMatrix) -> list[Tensor]:
    bias = matrix.bias_parameter
    return [matrix.weight_parameter, *([] if bias is None else [bias])]
