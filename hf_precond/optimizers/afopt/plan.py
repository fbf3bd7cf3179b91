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
FactorKind = Literal["inverse", "factor", "root", "moment"]
Form = Literal["rows", "columns", "square"]
Side = Literal["", "down", "up"]

SCOPES = {"query_key": "qk", "attention": "qkvo", "all_linear": "qkvo"}
ROLES = {"q": "queries", "k": "keys", "v": "values", "o": "attention output"}
VECTORS = {"q": "query", "k": "key"}
SPECTRAL_KINDS: dict[Form, tuple[FactorKind, FactorKind]] = {
    "rows": ("factor", "inverse"),
    "columns": ("inverse", "factor"),
    "square": ("factor", "factor"),
}
"""Kinds of the left and right factors, by the form of the matrix sign."""

# Which matrices ----------------------------------------------------------------------


def attention_matrices(model: nn.Module, config: AFOptConfig) -> ModelStructure:
    """Finds the matrices in ``config.scope``.

    ``query_key`` takes q and k of the attentions, ``attention`` v and o too, ``all_linear`` the
    other linear layers as well, except output heads, tied weights and adapters outside the
    attentions.

    Args:
        model: the model.
        config: the config.

    Raises:
        ValueError: nothing would be preconditioned: no attention was found, or its matrices are
            frozen.
    """
    survey, attentions, scope = ParameterSurvey(model), find_attention(model), config.scope

    def is_tied(matrix: LayerMatrix) -> bool:
        return survey.name_of(matrix.weight_parameter) in survey.tied

    chosen: list[tuple[LayerMatrix, str]] = []
    blocks: list[AttentionBlock] = []
    for block in attentions:
        inside = _in_scope(block, SCOPES[scope])
        if inside and not any(is_tied(matrix) for matrix, _ in inside):
            blocks.append(block)
            chosen += inside
    linears = _linears(survey, attentions)
    if scope == "all_linear":
        order = {name: place for place, name in enumerate(survey.parameters)}
        chosen += linears
        chosen.sort(key=lambda item: order[survey.name_of(item[0].weight_parameter)])
    matrices = list(dict.fromkeys(matrix for matrix, _ in chosen))
    if not matrices or (not attentions and scope != "all_linear"):
        raise ValueError(_nothing(model, attentions, scope))
    if not attentions:
        warnings.warn(
            f"afopt: no attention was found in {type(model).__name__}, so only its other linear "
            f"layers are preconditioned; {HOW_TO_DECLARE}.",
            stacklevel=3,
        )
    hidden = [
        matrix
        for block in attentions
        for role, matrix in block.roles().items()
        if role in block.trainable and not is_tied(matrix)
    ]
    hidden += [matrix for matrix, _ in linears]
    treated: dict[str, str] = {}
    for matrix, reason in chosen:
        add_reason(treated, survey.matrix_names(matrix), reason)
    return survey.structure(
        config,
        treated,
        _reasons_outside(survey, attentions, scope, treated),
        matrices=matrices,
        hidden=[matrix for matrix in hidden if matrix not in set(matrices)],
        attention=blocks,
    )


def _in_scope(block: AttentionBlock, roles: str) -> list[tuple[LayerMatrix, str]]:
    """The matrices and adapters of an attention that are stepped, each with its reason."""
    chosen: list[tuple[LayerMatrix, str]] = []
    note = f" ({block.note})" if block.note else ""
    for role, matrix in block.roles().items():
        if role not in roles:
            continue
        if role in block.trainable:
            chosen.append((matrix, ROLES[role] + note))
        adapter = block.adapters.get(role)
        if adapter is not None:
            pair = [matrix for matrix in (adapter.down, adapter.up) if matrix.trains]
            chosen += [(matrix, f"adapter of {ROLES[role]}{note}") for matrix in pair]
    return chosen


def _linears(
    survey: ParameterSurvey, attentions: Sequence[AttentionBlock]
) -> list[tuple[LayerMatrix, str]]:
    """The linear layers outside attention that ``all_linear`` takes, each with its reason."""
    inside = {matrix.module for block in attentions for matrix in block.roles().values()}
    linears = [
        (gate, "gate")
        for gate in _gates(attentions)
        if gate.trains and survey.name_of(gate.weight_parameter) not in survey.tied
    ]
    for matrix in find_matrices(survey.model):
        name = survey.name_of(matrix.weight_parameter)
        if (
            is_linear(matrix.module)
            and matrix.module not in inside
            and name not in survey.tied
            and name not in survey.head
            and survey.describe(name) != "adapter"
            and min(matrix.shape) > 1
        ):
            linears.append((matrix, "linear layer"))
    return linears


def _gates(attentions: Sequence[AttentionBlock]) -> list[LayerMatrix]:
    """The gates that share a weight with an attention's queries."""
    gates: dict[nn.Module, LayerMatrix] = {}
    for block in attentions:
        query = block.q
        shared = {matrix.module for role, matrix in block.roles().items() if role != "q"}
        if query.rows is not None and query.module not in shared:
            (rest,) = RowSelection.complement([query.rows])
            gates[query.module] = replace(query, name=query.name[:-3] + "[gate]", rows=rest)
    return list(gates.values())


def _reasons_outside(
    survey: ParameterSurvey,
    attentions: Sequence[AttentionBlock],
    scope: str,
    treated: dict[str, str],
) -> dict[str, str]:
    """Reasons of matrices outside the scope; rows outside it are added to ``treated``."""
    reasons: dict[str, str] = {}
    for block in attentions:
        for role, matrix in block.roles().items():
            for name in survey.matrix_names(matrix):
                if name not in treated:
                    add_reason(reasons, [name], f"{ROLES[role]}: outside scope={scope}")
                elif matrix.rows is not None and role not in SCOPES[scope]:
                    add_reason(treated, [name], f"{ROLES[role]} by the fallback optimizer")
    if scope != "all_linear":
        for gate in _gates(attentions):
            names = [name for name in survey.matrix_names(gate) if name in treated]
            add_reason(treated, names, "gate by the fallback optimizer")
        for name in survey.parameters:
            if name not in treated and survey.describe(name) == "linear layer":
                reasons.setdefault(name, f"linear layer: outside scope={scope}")
    return reasons


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
    """A symmetric or triangular matrix, or several, in the optimizer's state of one weight.

    Args:
        bound: the matrix whose state holds it.
        name: its name there, behind the prefix of a fused weight's rows.
        shape: ``[…, n, n]``.
        packed: kept as one triangle.
    """

    bound: BoundMatrix
    name: str
    shape: tuple[int, ...]
    packed: bool

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
        """Makes it in a weight's state, of zeros, where it is missing."""
        shape = (*self.shape[:-2], packed_size(self.shape[-1])) if self.packed else self.shape
        allocate(held, self.key, shape, dtype, self.bound.weight.device)


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
class Factor(StateMatrix):
    """A function of a damped second moment A; as such the left factors, one a head of a matrix.

    Args:
        kind: ``inverse``; ``factor``, W with ``W Wᵀ`` the inverse; ``root``, the symmetric inverse
            square root; or ``moment``, A itself, undamped.
    """

    kind: FactorKind

    def allocate(self, held: dict[str, Any], dtype: torch.dtype) -> None:
        """Makes it, as the identity."""
        missing = self.key not in held
        super().allocate(held, dtype)
        if missing and self.kind != "moment":
            eye = torch.eye(self.shape[-1], dtype=dtype, device=self.bound.weight.device)
            held[self.key].copy_(pack(eye) if self.packed else eye)


@dataclass(eq=False)
class RightFactor(Factor):
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
    left: Factor | None = None
    left_moment: Factor | None = None
    own: Factor | None = None

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
        self.lefts: list[Factor] = []
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

    def _kinds(self, plan: MatrixPlan) -> tuple[FactorKind, FactorKind]:
        """Kinds of the left and right factors."""
        if self.config.direction == "inverse":
            return "inverse", "inverse"
        if self.config.direction == "inverse_sqrt":
            return "root", "root"
        return SPECTRAL_KINDS[plan.form]

    def _left(self, plan: MatrixPlan, name: str, kind: FactorKind) -> Factor:
        shape = (plan.heads, plan.rows, plan.rows)
        self.lefts.append(Factor(plan.bound, name, shape, False, kind))
        return self.lefts[-1]

    def _right(
        self, moment: Moment, bound: BoundMatrix, kind: FactorKind, down: LayerMatrix | None
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
        self.moments.append(Moment(bound, name, request_shape(request), True, request))
        return self.moments[-1]
