"""Which factors stand left and right of each gradient, and which moments they are made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch
from torch import Tensor

from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.architectures.structure import LayerMatrix, LowRankAdapter, ModelStructure
from hf_precond.linalg.matrix_functions import pack, packed_size, unpack
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.base.layout import state_of
from hf_precond.optimizers.base.parameters import BoundMatrix, allocate
from hf_precond.statistics.moments import request_shape, rows_of
from hf_precond.statistics.requests import MomentRequest

State = dict[Tensor, dict[str, Any]]
Kind = Literal["moment", "inverse", "factor"]
Form = Literal["rows", "columns", "square"]
Side = Literal["", "down", "up"]

VECTORS = {"q": "query", "k": "key"}
SPECTRAL_KINDS: dict[Form, tuple[Kind, Kind]] = {
    "rows": ("factor", "inverse"),
    "columns": ("inverse", "factor"),
    "square": ("factor", "factor"),
}
"""Kinds of the left and right factors, by the form of the matrix sign."""
EXPERT_WIDTH = 4
"""Columns of an input's diagonal block over the rows of an expert, at most: so that the factors of
many narrow experts hold at most six numbers a weight."""


@dataclass(eq=False)
class StateMatrix:
    """A second moment A, or a function of it, in the optimizer's state of one weight.

    As such the left factors of a matrix, one a head.

    Args:
        bound: the matrix whose state holds it.
        name: its name there, behind the prefix of a fused weight's rows.
        shape: ``[…, n, n]``.
        packed: kept as one triangle.
        kind: ``moment``, A itself; or of A, damped, ``inverse``; ``factor``, W with ``W Wᵀ`` the
            inverse.
        experts: of a stack of experts the first and the last (exclusive) that are meant; ``None``
            for all.
    """

    bound: BoundMatrix
    name: str
    shape: tuple[int, ...]
    packed: bool
    kind: Kind
    experts: tuple[int, int] | None = field(default=None, kw_only=True)

    @cached_property
    def key(self) -> str:
        """Its key in the state."""
        return self.bound.prefix + self.name

    def stored(self, state: State) -> Tensor:
        """As it is kept: packed or not."""
        (stored,) = state_of([self.bound], state, self.name)
        return self._chosen(stored)

    def _chosen(self, tensor: Tensor) -> Tensor:
        return tensor if self.experts is None else tensor[slice(*self.experts)]

    def part(self, first: int, last: int) -> Self:
        """That of some experts of a stack.

        Args:
            first: the first of them.
            last: the last, exclusive.
        """
        return replace(self, experts=(first, last), shape=(last - first, *self.shape[1:]))

    def read(self, state: State) -> Tensor:
        """``[…, n, n]`` in the dtype of the mathematics."""
        stored = self.stored(state)
        return (unpack(stored) if self.packed else stored).to(self.bound.dtype)

    def allocate(self, state: dict[str, Any], dtype: torch.dtype) -> None:
        """Makes it where it is missing: a moment of zeros, another kind as the identity."""
        missing, device = self.key not in state, self.bound.weight.device
        shape = (*self.shape[:-2], packed_size(self.shape[-1])) if self.packed else self.shape
        allocate(state, self.key, shape, dtype, device)
        if missing and self.kind != "moment":
            eye = torch.eye(self.shape[-1], dtype=dtype, device=device)
            state[self.key].copy_(pack(eye) if self.packed else eye)


@dataclass(eq=False)
class Moment(StateMatrix):
    """A running second moment of a layer's input, or of queries or keys.

    Args:
        request: what is asked of the model.
    """

    request: MomentRequest

    def updates(self, state: State) -> Tensor:
        """How many means it holds; ``[experts]`` of a stack."""
        return self._chosen(state[self.bound.weight][f"{self.key}_updates"])

    def allocate(self, state: dict[str, Any], dtype: torch.dtype) -> None:
        """Makes it and the count of its means."""
        super().allocate(state, dtype)
        counts, device = self.bound.matrix.stack, self.bound.weight.device
        allocate(state, f"{self.key}_updates", counts, torch.int64, device)


@dataclass(eq=False)
class RightFactor(StateMatrix):
    """The factor of a layer's input; matrices that read the same input share one.

    Args:
        moment: the input's moment.
        columns: columns of the gradients it is applied to; the leading block of a wider moment (a
            key without bias beside a query with one).
        down: LoRA's A, where the input is ``A x``: the moment is ``A A_X Aᵀ``.
    """

    moment: Moment
    columns: int
    down: LayerMatrix | None

    @property
    def blocks(self) -> int:
        """How many diagonal blocks it has."""
        return math.prod(self.shape[len(self.bound.matrix.stack) : -2])

    def part(self, first: int, last: int) -> Self:
        """That of some experts of a stack, and of their moments."""
        return replace(super().part(first, last), moment=self.moment.part(first, last))


@dataclass(eq=False)
class MatrixPlan:
    """How one matrix is stepped.

    Args:
        bound: the matrix.
        role: ``q``, ``k``, ``v``, ``o``, or ``linear`` outside attention.
        side: ``down`` or ``up`` where the matrix is LoRA's A or B.
        block: the attention, if any.
        pair: LoRA's A and B, where one of them is the matrix, outside attention.
        heads: row groups that have a left factor and a matrix sign each.
        left: the factors of its rows; ``None`` for the identity.
        left_moment: the moments under ``left``, where changes of the logits are predicted.
        moments: what its factors are made of.
        experts: of a stack of experts the first and the last (exclusive) that are stepped; ``None``
            for all.

    Attributes:
        right: the factor of its input.
    """

    bound: BoundMatrix
    role: str
    side: Side = ""
    block: AttentionBlock | None = None
    heads: int = 1
    pair: LowRankAdapter | None = field(default=None, kw_only=True)
    right: RightFactor = field(init=False)
    left: StateMatrix | None = None
    left_moment: StateMatrix | None = None
    moments: list[Moment] = field(default_factory=list)
    experts: tuple[int, int] | None = None

    def part(self, first: int, last: int) -> MatrixPlan:
        """That of some experts of a stack.

        Args:
            first: the first of them.
            last: the last, exclusive.
        """
        part = copy.copy(self)
        part.experts = first, last
        return part

    @property
    def pairs(self) -> Sequence[LowRankAdapter]:
        """The LoRA pairs of the matrix' layer."""
        if self.block is not None:
            return self.block.pairs(self.role)
        return () if self.pair is None else (self.pair,)

    @property
    def rows(self) -> int:
        """Rows of one head."""
        return self.bound.matrix.shape[0] // self.heads

    @property
    def form(self) -> Form:
        """Which product the matrix sign is computed from: of rows, of columns, or neither."""
        rows, columns = self.rows, self.bound.matrix.shape[1]
        if columns >= 2 * rows:
            return "rows"
        return "columns" if rows >= 2 * columns else "square"


def _members(block: AttentionBlock, bound: Mapping[LayerMatrix, BoundMatrix]) -> list[MatrixPlan]:
    """Plans of the matrices of an attention that are in scope, without their factors."""
    members: dict[LayerMatrix, tuple[str, Side]] = {}
    for role, matrix in block.roles().items():
        members[matrix] = role, ""
        for pair in block.pairs(role):
            members[pair.up] = role, "up"
            members.setdefault(pair.down, (role, "down"))
    return [
        MatrixPlan(bound[matrix], role, side, block, 1 if side == "down" else block.heads_of(role))
        for matrix, (role, side) in members.items()
        if matrix in bound
    ]


def _adapters(
    pairs: Sequence[LowRankAdapter], bound: Mapping[LayerMatrix, BoundMatrix]
) -> list[MatrixPlan]:
    """Plans of LoRA's A and B outside attention that are in scope, without their factors."""
    plans = []
    for pair in pairs:
        sides: dict[LayerMatrix, Side] = {pair.down: "down", pair.up: "up"}
        held = [matrix for matrix in sides if matrix in bound]
        plans += [MatrixPlan(bound[m], "linear", sides[m], pair=pair) for m in held]
    return plans


def observes(block: AttentionBlock, config: AFOptConfig) -> bool:
    """Whether A_K and A_Q are collected, instead of following from A_X and the weights.

    Queries and keys that are rotated or normed on their way to the logits, or
    made of several tensors, are no linear functions of one input.
    """
    if block.rotary:
        return block.observed and config.rope == "averaged"
    return block.observed and (block.normed or bool(block.parts))


class AFOptPlan:
    """The plan of every matrix, and every moment and factor they need.

    Args:
        bound: the matrices in scope, in model order.
        structure: what was found in the model.
        config: the config.
    """

    def __init__(
        self, bound: Sequence[BoundMatrix], structure: ModelStructure, config: AFOptConfig
    ) -> None:
        self.config = config
        in_scope = {item.matrix: item for item in bound}
        plans = [plan for block in structure.attention for plan in _members(block, in_scope)]
        plans += _adapters(structure.adapters, in_scope)
        known = {plan.bound for plan in plans}
        plans += [MatrixPlan(item, "linear") for item in bound if item not in known]
        self.of = {plan.bound: plan for plan in plans}
        self.matrices = [self.of[item] for item in bound]
        self.moments: list[Moment] = []
        self.moments_of: dict[AttentionBlock, dict[str, Moment]] = {}
        self.lefts: list[StateMatrix] = []
        self.rights: list[RightFactor] = []
        for plan in plans:
            self._add_left(plan)
            self._add_right(plan)
        self.stored: dict[BoundMatrix, list[StateMatrix]] = {item: [] for item in bound}
        for stored in (*self.lefts, *self.rights, *self.moments):
            self.stored[stored.bound].append(stored)
        # Spread the layers over the statistics steps of one refresh interval.
        layers: dict[Any, int] = {}
        phases = max(1, config.inverse_interval // config.stat_interval)
        self.phases: dict[BoundMatrix, int] = {}
        for plan in self.matrices:
            below = plan.bound if plan.pair is None else plan.pair.base
            number = layers.setdefault(plan.block or below, len(layers))
            self.phases[plan.bound] = number % phases * config.stat_interval
        # Where in a packed triangle the entries of a matrix are, by size and device.
        self.positions: dict[tuple[int, torch.device], Tensor] = {}

    def _kinds(self, plan: MatrixPlan) -> tuple[Kind, Kind]:
        """Kinds of the left and right factors."""
        if self.config.direction == "inverse":
            return "inverse", "inverse"
        return SPECTRAL_KINDS[plan.form]

    def _add_left(self, plan: MatrixPlan) -> None:
        def add(name: str, kind: Kind) -> StateMatrix:
            shape = (plan.heads, plan.rows, plan.rows)
            self.lefts.append(StateMatrix(plan.bound, name, shape, False, kind))
            return self.lefts[-1]

        config, block = self.config, plan.block
        serves = "" if block is None else block.serves(plan.role)
        down = block is not None and plan.role in block.downs
        in_logits = serves in ("q", "k") and not plan.side and not down
        meets_output = serves == "v" and block is not None and block.o is not None
        if {"q", "k"} & set(serves) or meets_output or plan.side == "down":
            plan.left = add("left", self._kinds(plan)[0])
        if in_logits and config.scaling == "cap":
            plan.left_moment = add("left_moment", "moment")

    def _add_right(self, plan: MatrixPlan) -> None:
        """The right factor, and the moments that it and the left one are made from."""
        block, role, config = plan.block, plan.role, self.config
        if block is None:
            plan.right = self._right(plan, self._moment_outside(plan))
            plan.moments.append(plan.right.moment)
            return
        plan.right = self._right(plan, self._moment(plan, block, block.reads(role)))
        plan.moments.append(plan.right.moment)
        serves = block.serves(role)
        others = [b for a, b in ("qk", "kq") if a in serves]
        for met, other in [(met, vector) for vector in others for met in block.meeting(vector)]:
            if observes(met, config):
                plan.moments.append(self._moment(plan, met, VECTORS[other]))
            else:
                inputs = [met.reads(maker) for maker in met.makers(other)]
                plan.moments += [self._moment(plan, met, name) for name in inputs]

    def _right(self, plan: MatrixPlan, moment: Moment) -> RightFactor:
        """The right factor of a matrix: a sibling's, or a new one in its own state."""
        columns, kind, down = plan.bound.matrix.columns, self._kinds(plan)[1], None
        if plan.side == "up":
            down = next(pair.down for pair in plan.pairs if pair.up is plan.bound.matrix)
        for known in self.rights:
            alike = (known.moment, known.columns, known.kind) == (moment, columns, kind)
            if alike and known.down is down is None:
                return known
        blocked = down is None and moment.request.blocks > 1
        shape = moment.shape if blocked else (*plan.bound.matrix.stack, columns, columns)
        name, packed = f"{moment.name}_{kind}", kind != "factor"
        factor = RightFactor(plan.bound, name, shape, packed, kind, moment, columns, down)
        self.rights.append(factor)
        return factor

    def _moment_outside(self, plan: MatrixPlan) -> Moment:
        """The moment of a layer's input outside attention; LoRA's pairs of one layer share it."""
        if plan.pair is None:
            return self._add_moment(plan.bound, "input_moment", "input", plan.bound.matrix)
        layer, name = plan.pair.base, "layer_input_moment"
        assert layer is not None
        for known in self.moments:
            if known.name == name and known.request.matrix.module is layer.module:
                return known
        return self._add_moment(plan.bound, name, "input", layer)

    def _moment(self, plan: MatrixPlan, block: AttentionBlock, name: str) -> Moment:
        """A moment of an attention, made once; its first matrix's state holds it.

        Where none of its matrices is in scope, that of the plan that asks does.

        ``x``, ``context``, ``value``, ``o``: of a tensor that :meth:`AttentionBlock.reads` names;
        ``query``, ``key``: of these vectors.
        """
        moments = self.moments_of.setdefault(block, {})
        if name in moments:
            return moments[name]
        vectors = name in VECTORS.values()
        if vectors:
            matrix = block.q if name == "query" else block.k
        else:
            # v first: DeBERTa calls q and k with its relative positions too.
            readers = [block.roles()[role] for role in sorted(block.readers(name), reverse=True)]
            matrix = max(readers, key=lambda m: (m.columns, m.trains))
        holders = (each.bound for each in self.matrices if each.block is block)
        holder = next(holders, None)
        suffix = "" if holder is not None else f"_of_{block.name}"
        moments[name] = self._add_moment(
            holder or plan.bound,
            {"x": "input", "o": "output"}.get(name, name) + "_moment" + suffix,
            name if vectors else "input",
            matrix,
            attention=block,
            average_rotation=vectors and block.rotary,
        )
        return moments[name]

    def _add_moment(
        self, bound: BoundMatrix, name: str, kind: Any, matrix: LayerMatrix, **fields: Any
    ) -> Moment:
        widest = self.config.max_dim
        if matrix.stack:
            widest = min(widest, EXPERT_WIDTH * matrix.shape[0])
        blocks = -(-matrix.shape[1] // widest) if kind == "input" else 1
        rows = rows_of(self.config.stat_rows, bound.weight) if kind == "input" else 0
        request = MomentRequest(
            f"{matrix.name}:{name}", kind, matrix, blocks=blocks, rows=rows, **fields
        )
        self.moments.append(Moment(bound, name, request_shape(request), True, "moment", request))
        return self.moments[-1]
