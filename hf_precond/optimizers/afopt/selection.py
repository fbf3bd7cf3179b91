"""Which parameters AFOpt preconditions, and what becomes of the rest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hf_precond.architectures.attention import HOW_TO_DECLARE, find_attention
from hf_precond.architectures.modules import find_matrices, is_linear
from hf_precond.architectures.parameters import ParameterSurvey, add_reason
from hf_precond.architectures.peft import trains
from hf_precond.architectures.structure import (
    AttentionBlock,
    LayerMatrix,
    ModelStructure,
    RowSelection,
)

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
            pair = [matrix for matrix in (adapter.down, adapter.up) if trains(matrix)]
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
        if trains(gate) and survey.name_of(gate.weight_parameter) not in survey.tied:
            matrices.append(gate)
            add_reason(treated, survey.matrix_names(gate), "gate")
    for matrix in find_matrices(survey.model):
        name = survey.name_of(matrix.weight_parameter)
        skipped = (
            not is_linear(matrix.module)
            or matrix.module in inside
            or name in treated
            or name in survey.tied
            or name in survey.heads
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
