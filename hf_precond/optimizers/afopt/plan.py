"""Which matrices AFOpt preconditions, and which factors stand left and right of each gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from hf_precond.linalg.matrix_functions import unpack
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.base.parameters import BoundMatrix, grouped
from hf_precond.statistics.requests import MomentRequest

# Selection

SCOPES = {"query_key": ("q", "k"), "attention": ("q", "k", "v", "o")}
_ROLES = {"q": "queries", "k": "keys", "v": "values", "o": "attention output"}


def attention_matrices(model: nn.Module, config: Any) -> ModelStructure:
    """For AFOpt: the matrices of the attentions in ``config.scope``.

    ``query_key`` takes q and k, ``attention`` o and v too, ``all_linear`` the
    other linear layers as well, except output heads, tied weights and
    adapters outside the attentions.

    Raises:
        ValueError: when nothing would be preconditioned: no attention was
            found, or its matrices are frozen.
    """
    survey = ParameterSurvey(model)
    roles = SCOPES.get(config.scope, SCOPES["attention"])
    found = find_attention(model)
    matrices: list[LayerMatrix] = []
    blocks: list[AttentionBlock] = []
    treated: dict[str, str] = {}
    taken: set[int] = set()
    for block in found:
        chosen = _in_scope(block, roles)
        if any(survey.name_of(m.weight_parameter) in survey.tied for m, _ in chosen):
            continue
        if chosen:
            blocks.append(block)
        for matrix, reason in chosen:
            if id(matrix) not in taken:
                taken.add(id(matrix))
                matrices.append(matrix)
            add_reason(treated, survey.matrix_names(matrix), reason)
    if config.scope == "all_linear":
        _add_linears(survey, found, matrices, treated)
    reasons = _left_over(survey, found, config.scope, treated)
    if not matrices or (not found and config.scope != "all_linear"):
        raise ValueError(_nothing(model, found, config.scope))
    if not found:
        warnings.warn(
            f"afopt: no attention was found in {type(model).__name__}, so only its other linear "
            f"layers are preconditioned; {HOW_TO_DECLARE}.",
            stacklevel=3,
        )
    others = _others(survey, found, matrices)
    return survey.structure(
        config, treated, reasons, matrices=matrices, others=others, attention=blocks
    )


def _others(
    survey: ParameterSurvey, found: Sequence[AttentionBlock], matrices: Sequence[LayerMatrix]
) -> list[LayerMatrix]:
    """What ``all_linear`` would take beside ``matrices``."""
    wider = [
        matrix
        for block in found
        for role, matrix in block.roles().items()
        if role in block.trainable and survey.name_of(matrix.weight_parameter) not in survey.tied
    ]
    _add_linears(survey, found, wider, {})
    inside = {(matrix.module, matrix.weight, matrix.rows) for matrix in matrices}
    return [m for m in wider if (m.module, m.weight, m.rows) not in inside]


def _in_scope(block: AttentionBlock, roles: Sequence[str]) -> list[tuple[LayerMatrix, str]]:
    """The matrices of an attention that are stepped, each with its reason."""
    chosen: list[tuple[LayerMatrix, str]] = []
    note = f" ({block.note})" if block.note else ""
    for role, matrix in block.roles().items():
        if role not in roles:
            continue
        if role in block.trainable:
            chosen.append((matrix, _ROLES[role] + note))
        adapter = block.adapters.get(role)
        if adapter is not None:
            pair = [matrix for matrix in (adapter.down, adapter.up) if matrix.trains]
            chosen += [(matrix, f"adapter of {_ROLES[role]}{note}") for matrix in pair]
    return chosen


def _add_linears(
    survey: ParameterSurvey,
    found: Sequence[AttentionBlock],
    matrices: list[LayerMatrix],
    treated: dict[str, str],
) -> None:
    """Add the linear layers outside attention, in model order."""
    inside = {matrix.module for block in found for matrix in block.roles().values()}
    for gate in _gates(found):
        if gate.trains and survey.name_of(gate.weight_parameter) not in survey.tied:
            matrices.append(gate)
            add_reason(treated, survey.matrix_names(gate), "gate")
    for matrix in find_matrices(survey.model):
        name = survey.name_of(matrix.weight_parameter)
        skipped = (
            not is_linear(matrix.module)
            or matrix.module in inside
            or name in treated
            or name in survey.tied
            or name in survey.head
            or survey.describe(name) == "adapter"
            or min(matrix.shape) == 1
        )
        if not skipped:
            matrices.append(matrix)
            add_reason(treated, survey.matrix_names(matrix), "linear layer")
    order = {name: place for place, name in enumerate(survey.parameters)}
    matrices.sort(key=lambda matrix: order[survey.name_of(matrix.weight_parameter)])


def _gates(found: Sequence[AttentionBlock]) -> list[LayerMatrix]:
    """The gates that share a weight with an attention's queries."""
    gates: dict[nn.Module, LayerMatrix] = {}
    for block in found:
        query = block.q
        shared = {matrix.module for role, matrix in block.roles().items() if role != "q"}
        if query.rows is not None and query.module not in shared:
            (rest,) = RowSelection.complement([query.rows])
            gates[query.module] = replace(query, name=query.name[:-3] + "[gate]", rows=rest)
    return list(gates.values())


def _left_over(
    survey: ParameterSurvey, found: Sequence[AttentionBlock], scope: str, treated: dict[str, str]
) -> dict[str, str]:
    """Reasons for matrices that a wider scope would take, and for rows left of fused ones."""
    reasons: dict[str, str] = {}
    for block in found:
        for role, matrix in block.roles().items():
            for name in survey.matrix_names(matrix):
                if name not in treated:
                    add_reason(reasons, [name], f"{_ROLES[role]}: outside scope={scope}")
                elif matrix.rows is not None and role not in SCOPES.get(scope, "qkvo"):
                    add_reason(treated, [name], f"{_ROLES[role]} by the base rule")
    if scope != "all_linear":
        for gate in _gates(found):
            for name in survey.matrix_names(gate):
                if name in treated:
                    add_reason(treated, [name], "gate by the base rule")
        for name in survey.parameters:
            if name not in treated and survey.describe(name) == "linear layer":
                reasons.setdefault(name, f"linear layer: outside scope={scope}")
    return reasons


def _nothing(model: nn.Module, found: Sequence[AttentionBlock], scope: str) -> str:
    name = type(model).__name__
    if not found:
        return f"afopt: no attention that it knows was found in {name}; {HOW_TO_DECLARE}."
    return (
        f"afopt: {name} has {len(found)} attentions, but no matrix in scope={scope} trains (they "
        "are frozen or tied); unfreeze them, widen scope, or put LoRA adapters on q, k, v or o."
    )


# Plan

State = dict[Tensor, dict[str, Any]]
FactorKind = Literal["inverse", "factor", "root"]
Form = Literal["rows", "columns", "square"]


@dataclass(eq=False)
class Moment:
    """A running second moment, in the state of its anchor, kept as one triangle.

    Args:
        request: what is asked of the model.
        anchor: the matrix whose state holds it.
        name: its name there.
    """

    request: MomentRequest
    anchor: BoundMatrix
    name: str

    @property
    def blocks(self) -> int:
        """Diagonal blocks that are kept of it."""
        return self.request.blocks

    @property
    def key(self) -> str:
        """Its name in the state."""
        return self.anchor.prefix + self.name

    def tensor(self, state: State) -> Tensor:
        """The moment as it is kept, packed."""
        return state[self.anchor.weight][self.key]

    def updates(self, state: State) -> Tensor:
        """How many means it holds."""
        return state[self.anchor.weight][f"{self.key}_updates"]

    def read(self, state: State) -> Tensor:
        """The moment in the dtype of the mathematics."""
        return unpack(self.tensor(state)).to(self.anchor.dtype)


@dataclass(eq=False)
class RightFactor:
    """A function of the second moment of a layer's input; siblings share one.

    The symmetric kinds are kept as one triangle.

    Args:
        moment: the moment.
        columns: columns of the gradients it is applied to; the leading block
            of a wider moment (a key without bias beside a query with one).
        anchor: the matrix whose state holds it.
        kind: ``inverse``; ``factor``, W with ``W Wᵀ`` the inverse; or
            ``root``, the symmetric inverse square root.
        down: LoRA's A, where the input is ``A x``: the moment is ``A A_X Aᵀ``.
        phase: when in the refresh interval it is due.
    """

    moment: Moment
    columns: int
    anchor: BoundMatrix
    kind: FactorKind
    down: LayerMatrix | None = None
    phase: int = 0

    @property
    def key(self) -> str:
        return f"{self.anchor.prefix}{self.moment.name}_{self.kind}"

    @property
    def packed(self) -> bool:
        return self.kind != "factor"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the factor, unpacked."""
        if self.down is None and self.moment.blocks > 1:
            request = self.moment.request
            width = -(-request.matrix.columns // request.blocks)
            return (request.blocks, width, width)
        return (self.columns, self.columns)

    def tensor(self, state: State) -> Tensor:
        """The factor as it is kept."""
        return state[self.anchor.weight][self.key]

    def read(self, state: State) -> Tensor:
        """The factor."""
        return unpack(self.tensor(state)) if self.packed else self.tensor(state)


@dataclass(eq=False)
class MatrixPlan:
    """How one matrix is stepped.

    Args:
        placed: the matrix.
        role: ``q``, ``k``, ``v``, ``o``, or ``linear`` outside attention.
        heads: row groups that have a left factor and a matrix sign each.
        form: which product the matrix sign is computed from: of rows, of
            columns, or neither.
        block: the attention, if any.
        side: ``down`` or ``up`` where the matrix is LoRA's A or B.
        right: the factor of its input; ``None`` for the identity.
        left: kind of its left factor; ``None`` for the identity.
        phase: when in the refresh interval its left factor is due.
    """

    bound: BoundMatrix
    role: str
    heads: int
    form: Form
    block: AttentionBlock | None = None
    side: Literal["", "down", "up"] = ""
    right: RightFactor | None = None
    left: FactorKind | None = None
    phase: int = 0

    @property
    def rows(self) -> int:
        """Rows of one head."""
        return self.bound.matrix.shape[0] // self.heads

    @property
    def in_logits(self) -> bool:
        """Whether a step of this matrix moves logits in a way that is predicted."""
        return self.role in "qk" and not self.side

    def name(self, name: str) -> str:
        return self.bound.prefix + name

    def held(self, state: State) -> dict[str, Any]:
        return state[self.bound.weight]


def observes(block: AttentionBlock, config: AFOptConfig) -> bool:
    """Whether A_K and A_Q are collected, instead of following from A_X and the weights.

    Queries and keys that are rotated or normed on their way to the logits are
    no linear functions of the input.
    """
    if block.rotary:
        return block.observed and config.rope == "averaged"
    return block.observed and block.normed


class AFOptPlan:
    """Every item, and every moment they need.

    Args:
        placed: the matrices in scope, in model order.
        blocks: what was found in the model.
        config: the config.
    """

    def __init__(
        self, bound: Sequence[BoundMatrix], structure: ModelStructure, config: AFOptConfig
    ) -> None:
        self.config = config
        self.bound = {item.matrix: item for item in bound}
        self.matrices: list[MatrixPlan] = []
        self.moments: list[Moment] = []
        self.rights: list[RightFactor] = []
        self.known: dict[AttentionBlock, dict[str, Moment]] = {}
        self.features = config.space == "logits"
        for number, block in enumerate(structure.attention):
            _Attention(self, block, f"a{number}").plan_members()
        attended = {item.bound for item in self.matrices}
        for item in bound:
            if item not in attended:
                self._add_linear(item)
        order = {item: place for place, item in enumerate(bound)}
        self.matrices.sort(key=lambda item: order[item.bound])
        self._stagger()
        self.of = {item.bound: item for item in self.matrices}
        self.rights_at = {same[0].anchor: same for same in grouped(self.rights, _anchor)}
        self.moments_at = {same[0].anchor: same for same in grouped(self.moments, _anchor)}

    @property
    def predicts(self) -> bool:
        """Whether every step's logit change is predicted."""
        return self.config.scaling in ("logit_rms", "cap")

    def moment(
        self, kind: Any, matrix: LayerMatrix, anchor: BoundMatrix, name: str, key: str, **more: Any
    ) -> Moment:
        """Ask for a moment."""
        blocks = 1
        if kind == "input":
            blocks = -(-matrix.shape[1] // self.config.max_dim)
        request = MomentRequest(key, kind, matrix, blocks=blocks, **more)
        self.moments.append(Moment(request, anchor, name))
        return self.moments[-1]

    def right(
        self, moment: Moment, bound: BoundMatrix, kind: FactorKind, down: LayerMatrix | None
    ) -> RightFactor:
        """The factor for a matrix: a sibling's, or a new one in its own state."""
        columns = bound.matrix.columns
        for known in self.rights:
            if (known.moment, known.columns, known.kind) == (moment, columns, kind) and (
                down is None and known.down is None
            ):
                return known
        self.rights.append(RightFactor(moment, columns, bound, kind, down))
        return self.rights[-1]

    def kinds(self, form: Form) -> tuple[FactorKind, FactorKind]:
        """Kinds of the left and right factors."""
        if self.config.direction == "inverse":
            return "inverse", "inverse"
        if self.config.direction == "inverse_sqrt":
            return "root", "root"
        return {
            "rows": ("factor", "inverse"),
            "columns": ("inverse", "factor"),
            "square": ("factor", "factor"),
        }[form]  # type: ignore[return-value]

    def _add_linear(self, bound: BoundMatrix) -> None:
        form = form_of(*bound.matrix.shape)
        right = None
        if self.features:
            key = f"l{len(self.matrices)}"
            moment = self.moment("input", bound.matrix, bound, "input_moment", key)
            right = self.right(moment, bound, self.kinds(form)[1], None)
        self.matrices.append(MatrixPlan(bound, "linear", 1, form, right=right))

    def _stagger(self) -> None:
        """Spread the layers over the statistics steps of one refresh interval."""
        config = self.config
        phases = max(1, config.inverse_interval // config.stat_interval)
        owners: dict[Any, int] = {}
        for item in self.matrices:
            owner = item.block or item.bound
            number = owners.setdefault(owner, len(owners))
            item.phase = number % phases * config.stat_interval
            if item.right is not None:
                item.right.phase = item.phase


def form_of(rows: int, columns: int) -> Form:
    """Which Gram matrix is small enough to work in."""
    if columns >= 2 * rows:
        return "rows"
    return "columns" if rows >= 2 * columns else "square"


def _anchor(kept: Moment | RightFactor) -> BoundMatrix:
    return kept.anchor


class _Attention:
    """Plans the matrices of one attention."""

    def __init__(self, plan: AFOptPlan, block: AttentionBlock, key: str) -> None:
        self.plan, self.block, self.key = plan, block, key
        self.members: list[tuple[str, Literal["", "down", "up"], LayerMatrix]] = []
        downs: set[LayerMatrix] = set()
        for role, matrix in block.roles().items():
            if matrix in plan.bound:
                self.members.append((role, "", matrix))
            adapter = block.adapters.get(role)
            if adapter is None:
                continue
            if adapter.up in plan.bound:
                self.members.append((role, "up", adapter.up))
            if adapter.down in plan.bound and adapter.down not in downs:
                downs.add(adapter.down)
                self.members.append((role, "down", adapter.down))
        self.known: dict[str, Moment] = plan.known.setdefault(block, {})

    def plan_members(self) -> None:
        if not self.members:
            return
        order = list(self.plan.bound)
        first = min((matrix for _, _, matrix in self.members), key=order.index)
        self.anchor = self.plan.bound[first]
        for role, side, matrix in self.members:
            self._add(role, side, matrix)

    def _add(self, role: str, side: Literal["", "down", "up"], matrix: LayerMatrix) -> None:
        plan, block = self.plan, self.block
        bound = plan.bound[matrix]
        heads = 1
        if side != "down" and role != "o":
            heads = block.heads.query if role == "q" else block.heads.key_value
        form = form_of(matrix.shape[0] // heads, matrix.shape[1])
        left, right = plan.kinds(form)
        has_left = role in "qk" or (role == "v" and block.o is not None) or side == "down"
        item = MatrixPlan(
            bound, role, heads, form, block, side, left=left if has_left else None
        )
        if plan.features:
            down = block.adapters[role].down if side == "up" else None
            item.right = plan.right(self._input(role), bound, right, down)
            self._ask_for_left(role)
        plan.matrices.append(item)

    def _input(self, role: str) -> Moment:
        """The moment of what enters the matrix of a role."""
        if role == "k" and self.plan.config.center:
            return self.centered()
        return self.feature(self.block.reads(role))

    def feature(self, which: str) -> Moment:
        """The moment of one of the tensors that :meth:`AttentionBlock.reads` names."""
        if which not in self.known:
            name = {"x": "input", "o": "output"}.get(which, which) + "_moment"
            self.known[which] = self.plan.moment(
                "input",
                self._widest(which),
                self.anchor,
                name,
                f"{self.key}.{which}",
                attention=self.block,
            )
        return self.known[which]

    def centered(self) -> Moment:
        """The moment of k's input about each sequence's mean."""
        if "centered" not in self.known:
            self.known["centered"] = self.plan.moment(
                "input",
                self._widest(self.block.reads("k")),
                self.anchor,
                "centered_moment",
                f"{self.key}.centered",
                attention=self.block,
                center=True,
            )
        return self.known["centered"]

    def _widest(self, which: str) -> LayerMatrix:
        """The matrix that reads an input with the constant 1 behind it, if one does."""
        block = self.block
        # v first: DeBERTa calls q and k with its relative positions too.
        roles = sorted(block.readers(which), reverse=True)
        matrices = [block.roles()[role] for role in roles]
        return max(matrices, key=lambda m: (m.columns, m.weight_parameter.requires_grad))

    def _ask_for_left(self, role: str) -> None:
        """Ask for what the left factor of a role is made from."""
        config = self.plan.config
        wanted = {"q": ["key"], "k": ["query"]}.get(role, [])
        if config.joint and wanted:
            wanted = ["query", "key"]
        for which in wanted:
            if observes(self.block, config):
                self._vectors(which)
                if not config.covariant_damping:  # which is in units of the input's moment
                    continue
            if which == "query":
                self.feature("x")
            elif config.center:
                self.centered()
            else:
                self.feature(self.block.reads("k"))

    def _vectors(self, which: str) -> None:
        if which in self.known:
            return
        block, config = self.block, self.plan.config
        self.known[which] = self.plan.moment(
            which,
            block.q if which == "query" else block.k,
            self.anchor,
            f"{which}_moment",
            f"{self.key}.{which}",
            attention=block,
            average_rotation=block.rotary,
            center=config.center and which == "key",
        )
