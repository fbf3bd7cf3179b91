"""Which matrices AFOpt preconditions, and which factors stand left and right of each gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.modules import find_matrices, is_linear
from hf_precond.architectures.parameters import ParameterSurvey, add_reason
from hf_precond.architectures.structure import (
    AttentionBlock,
    LayerMatrix,
    ModelStructure,
    RowSelection,
)
from hf_precond.architectures.tables import HOW_TO_DECLARE
from hf_precond.linalg.matrix_functions import pack, packed_size, unpack
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.base.parameters import BoundMatrix, allocate
from hf_precond.statistics.requests import MomentRequest, request_shape

State = dict[Tensor, dict[str, Any]]
Kind = Literal["moment", "inverse", "factor", "root"]
Form = Literal["rows", "columns", "square"]
Side = Literal["", "down", "up"]

SCOPES = {"query_key": "qk", "attention": "qkvo", "all_linear": "qkvo"}
ROLES = {"q": "queries", "k": "keys", "v": "values", "o": "attention output"}
VECTORS = {"q": "query", "k": "key"}
SPECTRAL_KINDS: dict[Form, tuple[Kind, Kind]] = {
    "rows": ("factor", "inverse"),
    "columns": ("inverse", "factor"),
    "square": ("factor", "factor"),
}
"""Kinds of the left and right factors, by the form of the matrix sign."""

Candidate = tuple[LayerMatrix, str]
"""A matrix that can be preconditioned, and what it is."""

# Which matrices ----------------------------------------------------------------------


def attention_matrices(model: nn.Module, config: AFOptConfig) -> ModelStructure:
    """Finds the matrices in ``config.scope``.

    ``query_key`` takes q and k of the attentions, ``attention`` v and o too, ``all_linear`` the
    other linear layers as well, except output heads, tied weights and adapters outside the
    attentions.

    Args:
        model: the model.
        config: the config.

    Returns:
        The structure, with a reason for what becomes of every parameter.

    Raises:
        ValueError: nothing would be preconditioned: no attention was found, or its matrices are
            frozen.
    """
    survey, attentions, scope = ParameterSurvey(model), find_attention(model), config.scope

    def is_tied(matrix: LayerMatrix) -> bool:
        return survey.name_of(matrix.weight_parameter) in survey.tied

    linears = _linears(survey, attentions)
    chosen: list[Candidate] = []
    left: list[Candidate] = []
    blocks: list[AttentionBlock] = []
    for block in attentions:
        inside = _in_scope(block, SCOPES[scope])
        if inside and not any(is_tied(matrix) for matrix, _ in inside):
            blocks.append(block)
            chosen += inside
        trainable = {r: matrix for r, matrix in block.roles().items() if r in block.trainable}
        left += [(matrix, ROLES[r]) for r, matrix in trainable.items() if not is_tied(matrix)]
    if scope == "all_linear":
        order = {name: place for place, name in enumerate(survey.parameters)}
        chosen += linears
        chosen.sort(key=lambda candidate: order[survey.name_of(candidate[0].weight_parameter)])
    matrices = list(dict.fromkeys(matrix for matrix, _ in chosen))
    if not matrices or (not attentions and scope != "all_linear"):
        raise ValueError(_nothing(model, attentions, scope))
    if not attentions:
        warnings.warn(
            f"afopt: no attention was found in {type(model).__name__}, so only its other linear "
            f"layers are preconditioned; {HOW_TO_DECLARE}.",
            stacklevel=3,
        )
    left = [(matrix, what) for matrix, what in left + linears if matrix not in set(matrices)]
    treated: dict[str, str] = {}
    outside: dict[str, str] = {}
    for matrix, what in chosen:
        add_reason(treated, survey.matrix_names(matrix), what)
    for matrix, what in left:
        for name in survey.matrix_names(matrix):
            if name in treated:  # for other rows of a fused weight
                add_reason(treated, [name], f"{what} by the fallback optimizer")
            else:
                add_reason(outside, [name], f"{what}: outside scope={scope}")
    hidden = [matrix for matrix, _ in left]
    return survey.structure(
        config, treated, outside, matrices=matrices, hidden=hidden, attention=blocks
    )


def _in_scope(block: AttentionBlock, roles: str) -> list[Candidate]:
    """The matrices and adapters of an attention that are stepped."""
    chosen: list[Candidate] = []
    note = f" ({block.note})" if block.note else ""
    for role, matrix in block.roles().items():
        if role not in roles:
            continue
        if role in block.trainable:
            chosen.append((matrix, ROLES[role] + note))
        if role in block.adapters:
            adapter = block.adapters[role]
            pair = [matrix for matrix in (adapter.down, adapter.up) if matrix.trains]
            chosen += [(matrix, f"adapter of {ROLES[role]}{note}") for matrix in pair]
    return chosen


def _linears(survey: ParameterSurvey, attentions: Sequence[AttentionBlock]) -> list[Candidate]:
    """The linear layers outside attention, and gates that share a weight with queries."""
    inside: dict[nn.Module, str] = {}
    for block in attentions:
        for role, matrix in block.roles().items():
            inside[matrix.module] = inside.get(matrix.module, "") + role
    queries = {block.q.module: block.q for block in attentions if block.q.rows is not None}
    linears = [(_gate(q), "gate") for layer, q in queries.items() if set(inside[layer]) == {"q"}]
    linears += [(m, "linear layer") for m in find_matrices(survey.model) if m.module not in inside]
    chosen = []
    for matrix, what in linears:
        name = survey.name_of(matrix.weight_parameter)
        skipped = name in survey.tied or name in survey.head or survey.describe(name) == "adapter"
        if is_linear(matrix.module) and matrix.trains and min(matrix.shape) > 1 and not skipped:
            chosen.append((matrix, what))
    return chosen


def _gate(query: LayerMatrix) -> LayerMatrix:
    """The rows beside an attention's queries."""
    assert query.rows is not None
    (rest,) = RowSelection.complement([query.rows])
    return replace(query, name=query.name[:-3] + "[gate]", rows=rest)


def _nothing(model: nn.Module, attentions: Sequence[AttentionBlock], scope: str) -> str:
    name = type(model).__name__
    if not attentions:
        return f"afopt: no attention that it knows was found in {name}; {HOW_TO_DECLARE}."
    return (
        f"afopt: {name} has {len(attentions)} attentions, but no matrix in scope={scope} trains "
        "(they are frozen or tied); unfreeze them, widen scope, or put LoRA adapters on q, k, v or "
        "o."
    )


def check_attention(attentions: Sequence[AttentionBlock], config: AFOptConfig) -> None:
    """Checks that the config fits the attentions; warns where averaged factors cannot be had.

    Args:
        attentions: those with a matrix in scope.
        config: the config.

    Raises:
        ValueError: ``joint`` for an attention without a known joint solution.
    """
    for block in attentions:
        if config.joint and (block.heads.group > 1 or observes(block, config)):
            raise ValueError(
                f"joint=True: {block.name} has grouped, rotated or normed queries and keys, "
                "for which the joint solution is not known; set joint=False (or "
                "rope='ignored' where they are only rotated)."
            )
    unread = [block.name for block in attentions if block.rotary and not block.observed]
    if unread and config.rope == "averaged" and config.space == "logits":
        warnings.warn(
            f"afopt: the rotated queries and keys of {len(unread)} attentions ({unread[0]}, …) "
            "cannot be read, so their factors follow from the inputs and weights alone, as "
            "with rope='ignored'.",
            stacklevel=2,
        )


def observes(block: AttentionBlock, config: AFOptConfig) -> bool:
    """Whether A_K and A_Q are collected, instead of following from A_X and the weights.

    Queries and keys that are rotated or normed on their way to the logits are
    no linear functions of the input.
    """
    if block.rotary:
        return block.observed and config.rope == "averaged"
    return block.observed and block.normed


# Which factors -------------------------------------------------------------------------


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
            inverse; ``root``, the symmetric inverse square root.
    """

    bound: BoundMatrix
    name: str
    shape: tuple[int, ...]
    packed: bool
    kind: Kind

    @property
    def key(self) -> str:
        """Its key in the state."""
        return self.bound.prefix + self.name

    def stored(self, state: State) -> Tensor:
        """As it is kept: packed or not."""
        return state[self.bound.weight][self.key]

    def read(self, state: State) -> Tensor:
        """``[…, n, n]`` in the dtype of the mathematics."""
        stored = self.stored(state)
        return (unpack(stored) if self.packed else stored).to(self.bound.dtype)

    def allocate(self, held: dict[str, Any], dtype: torch.dtype) -> None:
        """Makes it where it is missing: a moment of zeros, another kind as the identity."""
        missing, device = self.key not in held, self.bound.weight.device
        shape = (*self.shape[:-2], packed_size(self.shape[-1])) if self.packed else self.shape
        allocate(held, self.key, shape, dtype, device)
        if missing and self.kind != "moment":
            eye = torch.eye(self.shape[-1], dtype=dtype, device=device)
            held[self.key].copy_(pack(eye) if self.packed else eye)


@dataclass(eq=False)
class Moment(StateMatrix):
    """A running second moment of a layer's input, or of queries or keys.

    Args:
        request: what is asked of the model.
    """

    request: MomentRequest

    def updates(self, state: State) -> Tensor:
        """How many means it holds."""
        return state[self.bound.weight][f"{self.key}_updates"]

    def allocate(self, held: dict[str, Any], dtype: torch.dtype) -> None:
        """Makes it and the count of its means."""
        super().allocate(held, dtype)
        allocate(held, f"{self.key}_updates", (), torch.int64, self.bound.weight.device)


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


@dataclass(eq=False)
class MatrixPlan:
    """How one matrix is stepped.

    Args:
        bound: the matrix.
        role: ``q``, ``k``, ``v``, ``o``, or ``linear`` outside attention.
        block: the attention, if any.
        side: ``down`` or ``up`` where the matrix is LoRA's A or B.
        heads: row groups that have a left factor and a matrix sign each.
        right: the factor of its input; ``None`` for the identity.
        left: the factors of its rows; ``None`` for the identity.
        left_moment: the moments under ``left``, where changes of the logits are predicted.
        own: under ``joint``, the inverse moments of its own queries (q) or keys (k).
    """

    bound: BoundMatrix
    role: str
    block: AttentionBlock | None = None
    side: Side = ""
    heads: int = 1
    right: RightFactor | None = None
    left: StateMatrix | None = None
    left_moment: StateMatrix | None = None
    own: StateMatrix | None = None

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
        self.bound = {item.matrix: item for item in bound}
        self.of: dict[BoundMatrix, MatrixPlan] = {}
        self.moments: list[Moment] = []
        self.moments_of: dict[AttentionBlock, dict[str, Moment]] = {}
        self.lefts: list[StateMatrix] = []
        self.rights: list[RightFactor] = []
        for block in structure.attention:
            for role, side, item in self._members(block):
                self._plan_attention(block, role, side, item)
        for item in bound:
            if item not in self.of:
                self._plan_linear(item)
        self.matrices = [self.of[item] for item in bound]
        self.stored: dict[BoundMatrix, list[StateMatrix]] = {item: [] for item in bound}
        for stored in (*self.lefts, *self.rights, *self.moments):
            self.stored[stored.bound].append(stored)
        # Spread the layers over the statistics steps of one refresh interval.
        layers: dict[Any, int] = {}
        phases = max(1, config.inverse_interval // config.stat_interval)
        self.phases: dict[BoundMatrix, int] = {}
        for plan in self.matrices:
            number = layers.setdefault(plan.block or plan.bound, len(layers))
            self.phases[plan.bound] = number % phases * config.stat_interval

    def _members(self, block: AttentionBlock) -> list[tuple[str, Side, BoundMatrix]]:
        """Role and side of the matrices of an attention that are in scope."""
        members: dict[LayerMatrix, tuple[str, Side]] = {}
        for role, matrix in block.roles().items():
            members[matrix] = role, ""
            if role in block.adapters:
                members[block.adapters[role].up] = role, "up"
                members.setdefault(block.adapters[role].down, (role, "down"))
        bound = self.bound
        return [(*member, bound[matrix]) for matrix, member in members.items() if matrix in bound]

    def _plan_attention(
        self, block: AttentionBlock, role: str, side: Side, bound: BoundMatrix
    ) -> None:
        config, heads = self.config, 1
        if side != "down" and role != "o":
            heads = block.heads.query if role == "q" else block.heads.key_value
        plan = self.of[bound] = MatrixPlan(bound, role, block, side, heads)
        left, right = self._kinds(plan)
        if role in "qk" or (role == "v" and block.o is not None) or side == "down":
            plan.left = self._left(plan, "left", left)
        if role in "qk" and not side and config.scaling in ("logit_rms", "cap"):
            plan.left_moment = self._left(plan, "left_moment", "moment")
        if role in "qk" and not side and config.joint:
            plan.own = self._left(plan, "own", "inverse")
        if config.space == "logits":
            moment = self._moment(block, self.input_of(block, role))
            down = block.adapters[role].down if side == "up" else None
            plan.right = self._right(moment, bound, right, down)
            left_inputs = "qk" if config.joint and role in "qk" else {"q": "k", "k": "q"}.get(role)
            for other in left_inputs or "":
                # Covariant damping is in units of the input's moment.
                if not observes(block, config) or config.covariant_damping:
                    self._moment(block, self.input_of(block, other))
                if observes(block, config):
                    self._moment(block, VECTORS[other])

    def _plan_linear(self, bound: BoundMatrix) -> None:
        plan = self.of[bound] = MatrixPlan(bound, "linear")
        if self.config.space == "logits":
            request = self._input_request(f"{bound.matrix.name}:input", bound.matrix)
            moment = self._add_moment(bound, "input_moment", request)
            plan.right = self._right(moment, bound, self._kinds(plan)[1], None)

    def _kinds(self, plan: MatrixPlan) -> tuple[Kind, Kind]:
        """Kinds of the left and right factors."""
        if self.config.direction == "inverse":
            return "inverse", "inverse"
        if self.config.direction == "inverse_sqrt":
            return "root", "root"
        return SPECTRAL_KINDS[plan.form]

    def _left(self, plan: MatrixPlan, name: str, kind: Kind) -> StateMatrix:
        shape = (plan.heads, plan.rows, plan.rows)
        self.lefts.append(StateMatrix(plan.bound, name, shape, False, kind))
        return self.lefts[-1]

    def _right(
        self, moment: Moment, bound: BoundMatrix, kind: Kind, down: LayerMatrix | None
    ) -> RightFactor:
        """The factor for a matrix: a sibling's, or a new one in its own state."""
        columns = bound.matrix.columns
        for known in self.rights:
            if (known.moment, known.columns, known.kind) == (moment, columns, kind) and (
                down is None and known.down is None
            ):
                return known
        blocked = down is None and moment.request.blocks > 1
        shape = moment.shape if blocked else (columns, columns)
        name, packed = f"{moment.name}_{kind}", kind != "factor"
        self.rights.append(RightFactor(bound, name, shape, packed, kind, moment, columns, down))
        return self.rights[-1]

    def input_of(self, block: AttentionBlock, role: str) -> str:
        """The name in :attr:`moments_of` of what enters a role's matrix."""
        return "centered" if role == "k" and self.config.center else block.reads(role)

    def _moment(self, block: AttentionBlock, name: str) -> Moment:
        """A moment of an attention, made once; its first matrix's state holds it.

        ``x``, ``context``, ``value``, ``o``: of a tensor that :meth:`AttentionBlock.reads` names;
        ``centered``: of k's input about each sequence's mean; ``query``, ``key``: of these vectors.
        """
        moments = self.moments_of.setdefault(block, {})
        if name in moments:
            return moments[name]
        key, center = f"{block.name}:{name}", self.config.center and name in ("centered", "key")
        if name in ("query", "key"):
            matrix, rotates = block.q if name == "query" else block.k, block.rotary
            request = MomentRequest(key, name, matrix, block, rotates, center)  # type: ignore[arg-type]
        else:
            tensor = block.reads("k") if name == "centered" else name
            # v first: DeBERTa calls q and k with its relative positions too.
            readers = [block.roles()[role] for role in sorted(block.readers(tensor), reverse=True)]
            widest = max(readers, key=lambda m: (m.columns, m.weight_parameter.requires_grad))
            request = self._input_request(key, widest, attention=block, center=center)
        members = {item for _, _, item in self._members(block)}
        first = next(item for item in self.bound.values() if item in members)
        stem = {"x": "input", "o": "output"}.get(name, name)
        moments[name] = self._add_moment(first, f"{stem}_moment", request)
        return moments[name]

    def _input_request(self, key: str, matrix: LayerMatrix, **fields: Any) -> MomentRequest:
        blocks = -(-matrix.shape[1] // self.config.max_dim)
        return MomentRequest(key, "input", matrix, blocks=blocks, **fields)

    def _add_moment(self, bound: BoundMatrix, name: str, request: MomentRequest) -> Moment:
        self.moments.append(Moment(bound, name, request_shape(request), True, "moment", request))
        return self.moments[-1]
