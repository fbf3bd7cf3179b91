"""Muon: matrices of hidden layers stepped by the sign of their momentum."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.hidden import ROUTER, in_hidden_layers
from hf_precond.architectures.parameters import ParameterSurvey, add_reason
from hf_precond.architectures.structure import LayerMatrix, ModelStructure, RowSelection
from hf_precond.distributed.collectives import full, like, local
from hf_precond.optimizers.base.layout import kept
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import (
    Bound,
    BoundMatrix,
    ParamView,
    Preconditioned,
    allocate,
)
from hf_precond.optimizers.muon.config import MuonConfig
from hf_precond.optimizers.muon.step import (
    MOMENTUM,
    ROWS,
    MuonStep,
    as_matrices,
    batches,
    holds_transposes,
    stack_shape,
)
from hf_precond.registry import register_optimizer

Batch = tuple[Sequence[str], Sequence[BoundMatrix], Sequence[ParamView | None]]
"""Names of matrices that are stepped together, the matrices, and views of those that are whole."""


def hidden_matrices(model: nn.Module, config: MuonConfig) -> ModelStructure:
    """Finds the matrices of hidden layers, without biases: q, k, v and o, linear layers and others.

    Those are convolutions, stacks of experts, and the A and B of LoRA. Embeddings, output heads,
    tied weights, single rows and columns, and parameters of no layer are AdamW's.

    Args:
        model: the model.
        config: the config.

    Raises:
        ValueError: there is none.
    """
    survey = ParameterSurvey(model)
    matrices: dict[tuple[str, RowSelection | None], LayerMatrix] = {}
    treated: dict[str, str] = {}
    reasons = dict.fromkeys(survey.routers, ROUTER)
    for name, matrix, what in in_hidden_layers(survey, find_attention(model)):
        if name in survey.head:
            reasons[name] = f"output head ({what})"
        elif min(stack_shape(matrix)[1:]) == 1:
            reasons[name] = f"{what} of a single row or column"
        elif name not in survey.tied:
            matrices.setdefault((name, matrix.rows), replace(matrix, bias=None))
            add_reason(treated, [name], what)
    if not matrices:
        raise ValueError(
            "muon: no matrix of a hidden layer of this model trains, so nothing would be "
            "orthogonalised; unfreeze a linear layer, or use --optim adamw_torch."
        )
    return survey.structure(config, treated, reasons, matrices=list(matrices.values()))


@register_optimizer(
    "muon",
    config=MuonConfig,
    select=hidden_matrices,
    description="the matrix sign of the momentum for hidden layers, AdamW for the rest",
    memory="mn momentum, and m under variant=normuon",
    start="1e-3 with lr_scale=4",
)
class Muon(PrecondOptimizer):
    """The matrix sign of the momentum, for every matrix of a hidden layer.

    For a matrix W, ``[m, n]``, with gradient G, ``torch.optim.Muon``'s step::

        M ← μ M + (1-μ) G ;  N = μ M + (1-μ) G       (Nesterov; else N = M)
        U = msign(N)                                  Newton–Schulz in bfloat16
        W ← (1 - lr·wd) W - lr · lr_scale · 0.2·√max(m, n) · U

    so that the entries of a step have AdamW's usual root mean square; with
    ``adjust_lr_fn="original"`` it is ``√max(1, m/n)`` in the place of
    ``0.2·√max(m, n)``. Under ``variant="normuon"`` rows of U that have been
    large are made smaller, at the same norm of the whole::

        v ← β₂ v + (1-β₂) mean_j U_ij²                one number a row
        U ← Û · ‖U‖_F/‖Û‖_F ,  Û_i = U_i / (√v_i + 1e-8)

    q, k and v are matrices of their own where their weight is fused, and so is
    each expert of a stack and each group of a convolution, whose weight is read
    as ``[out, in·k…]``; of LoRA it is A and B. AdamW steps everything else, at
    the group's learning rate: embeddings, output heads, biases, norms.

    The sign is computed in bfloat16 on CPUs too, as torch does, matrices of one
    shape together; the rest is float32, parameters of lower precision are
    rounded once. Ranks share the signs of large matrices. Kept per matrix: M in
    float32, half of AdamW's state, sharded as the weight is.

    Diagnostics: ``matrices``, how many the last step moved; and, of the step
    that the momentum gives now, ``update_ratio/{matrix}``, its root mean square
    over the weight's (in the logs the largest; above about 1e-2 in a pretrained
    model the rate is high), ``cosine``, of momentum and step, mean over the
    matrices, and under ``normuon`` ``row_ratio/{matrix}``, the root mean square
    of the largest row of the sign over that of all.

    An expert without tokens goes on along its momentum, as under torch's.

    Args:
        params: parameters, pairs of names and parameters, or groups, as for any
            torch optimizer.
        structure: ``matrices`` are those of hidden layers, where it was read already (then
            with ``config``); by default it is read off the model.
        config: a config, in the place of fields, or changed by them.
        optimizer_dict: what some trainers call ``params``.
        attach_to: the model; without it, call :meth:`attach` before the first
            step. ``hf_precond.create_optimizer`` makes groups too.
        **fields: of the config.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural
    networks", 2024; Liu et al., "Muon is scalable for LLM training", 2025,
    arXiv 2502.16982; Li et al., "NorMuon", 2025, arXiv 2510.05491.
    """

    config: MuonConfig
    moved = 0  # matrices at the last step

    @functools.cached_property
    def rule(self) -> MuonStep:
        """The step of the matrices. Not copied with the optimizer: its state is that of views."""
        config = self.config
        return MuonStep(
            config.lr_scale, config.nesterov, config.ns_steps,
            config.adjust_lr_fn, config.variant, config.normuon_beta2,
        )  # fmt: skip

    def allocate(self, bound: BoundMatrix) -> None:
        """Make the momentum, and under ``normuon`` the rows' mean squares, where missing."""
        state, weight, matrix = self.state[bound.weight], bound.weight, bound.matrix
        shape, whole = (matrix.shape, None) if bound.fused else (weight.shape, weight)
        allocate(state, bound.prefix + MOMENTUM, shape, bound.dtype, weight.device, whole)
        if self.config.variant == "normuon":
            count, *sides = stack_shape(matrix)
            outputs = count * sides[1 if holds_transposes(matrix) else 0]
            allocate(state, bound.prefix + ROWS, (outputs,), bound.dtype, weight.device)

    def uses_fallback(self, bound: Bound) -> bool:
        """No: AdamW keeps no state of the matrices."""
        return False

    def precondition(self, ready: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """Step the matrices in place."""
        gathered: dict[Tensor, Tensor] = {}
        self.moved, found = kept("batches", ready, partial(self._batches_of, ready))
        for names, bound, held in found:
            pairs = zip(bound, held, strict=True)
            batch = [self._rows(b, gathered) if view is None else view for b, view in pairs]
            for view in batch:
                if view.matrix_shape is None:
                    assert view.param.grad is not None
                    view.grad = view.param.grad
            self.failures.watch("momentum", names, self.rule.step(batch))
            for view in batch:
                view.grad = view.param  # no memory is held until the next step
        for parameter, whole in gathered.items():
            parameter.copy_(like(parameter, whole))
        return [Preconditioned(bound, None, "applied") for bound in ready]

    def _batches_of(self, ready: Sequence[BoundMatrix]) -> tuple[int, list[Batch]]:
        """How many matrices there are, and which are stepped together."""
        count = sum(stack_shape(bound.matrix)[0] for bound in ready)
        views: list[ParamView] = []
        for bound in ready:
            # Rows of a fused weight are stepped in a copy that is not sharded.
            param = local(bound.weight) if bound.fused else bound.weight
            state, group = self.state[bound.weight], self.param_groups[bound.group]
            views.append(ParamView(param, param, state, bound.prefix, group, matrix=bound.matrix))
        owner = {id(view): bound for view, bound in zip(views, ready, strict=True)}
        found: list[Batch] = []
        for alike in batches(views):
            batch = [owner[id(view)] for view in alike]
            held = [None if b.fused else view for b, view in zip(batch, alike, strict=True)]
            found.append(([b.matrix.name for b in batch], batch, held))
        return count, found

    def _rows(self, bound: BoundMatrix, gathered: dict[Tensor, Tensor]) -> ParamView:
        """Rows of a fused weight with their gradient; of a sharded one in ``gathered``."""
        gradient = bound.gradient()
        assert gradient is not None
        (view,) = bound.views(gradient, self.param_groups, self.state, gathered)
        view.matrix = bound.matrix
        return view

    # ------------------------------------------------------------------------------------

    def counted(self) -> dict[str, float]:
        """The counters, and how many matrices the last step moved."""
        return super().counted() | {"matrices": float(self.moved)}

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Size and direction of the steps, see the class; costs about as much as a step."""
        held: dict[int, BoundMatrix] = {}
        views: list[ParamView] = []
        for bound in self.bound if self.rates else ():
            state, shape = self.state[bound.weight], bound.matrix.shape if bound.fused else None
            momentum, group = state.get(bound.prefix + MOMENTUM), self.param_groups[bound.group]
            if momentum is not None:
                view = ParamView(bound.weight, momentum, state, bound.prefix, group, shape)
                view.matrix = bound.matrix
                held[id(view)] = bound
                views.append(view)
        values: dict[str, Tensor] = {}
        cosines: list[Tensor] = []
        for batch in batches(views):
            directions = self.rule.directions(batch, [view.grad for view in batch], False)
            for view, step in zip(batch, directions.chunk(len(batch)), strict=True):
                bound = held[id(view)]
                name, rate = bound.matrix.name, self.rates[bound.group]
                momentum = as_matrices([view], [full(view.grad)])[0].flatten()
                cosines.append(torch.cosine_similarity(momentum, step.flatten(), dim=0, eps=1e-30))
                length = torch.linalg.vector_norm(bound.matrix.read().to(step.dtype))
                values[f"update_ratio/{name}"] = rate * torch.linalg.vector_norm(step) / length
                if ROWS in view:
                    values[f"row_ratio/{name}"] = (view[ROWS].max() / view[ROWS].mean()).sqrt()
        if not cosines:
            return {}
        values["cosine"] = torch.stack([cosine.cpu().double() for cosine in cosines]).mean()
        return {name: float(value) for name, value in values.items()}
