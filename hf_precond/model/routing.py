"""Which parameters of a model each optimizer preconditions, and what becomes of the rest.

Each selection reads a model for one optimizer and returns
:class:`~hf_precond.blocks.Blocks`, its routing table holding every parameter
of the model once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hf_precond.blocks import (
    AttentionBlock,
    Blocks,
    CurvatureRequest,
    LayerMatrix,
    NormParameter,
    RowSelection,
    StatisticsSource,
)
from hf_precond.blocks.found import Request
from hf_precond.model.adapters import trains
from hf_precond.model.attention import HOW_TO_DECLARE, find_attention
from hf_precond.model.matrices import CONVOLUTIONS, find_matrices, is_linear
from hf_precond.model.moments.capture import Capture
from hf_precond.model.norms import channel_parameters
from hf_precond.model.survey import Survey, add_reason

SCOPES = {"query_key": ("q", "k"), "attention": ("q", "k", "v", "o")}
_ROLES = {"q": "queries", "k": "keys", "v": "values", "o": "attention output"}


def open_statistics(model: nn.Module, requests: Sequence[Request]) -> StatisticsSource:
    """The source of what an optimizer asks for, its hooks installed.

    Raises:
        ValueError: for curvature and second moments asked for at once.
    """
    curvature = [request for request in requests if isinstance(request, CurvatureRequest)]
    if curvature and len(curvature) == len(requests):
        from hf_precond.model.curvature.partial_hessian import open_probe

        return open_probe(model, curvature)
    if curvature:
        raise ValueError("curvature and second moments come from two sources: open each by itself.")
    return Capture(model, [r for r in requests if not isinstance(r, CurvatureRequest)])


def _finish(
    survey: Survey,
    config: Any,
    treated: dict[str, str],
    reasons: dict[str, str] | None = None,
    *,
    matrices: Sequence[LayerMatrix] = (),
    others: Sequence[LayerMatrix] = (),
    attention: Sequence[AttentionBlock] = (),
    norms: Sequence[NormParameter] = (),
) -> Blocks:
    return Blocks(
        matrices=list(matrices),
        others=list(others),
        attention=list(attention),
        norms=list(norms),
        routing=survey.table(treated, getattr(config, "base", "adamw"), reasons),
        owners=[(name, *owner) for name, owner in survey.owners.items()],
        open=functools.partial(open_statistics, survey.model),
    )


def every_matrix(model: nn.Module, config: Any) -> Blocks:
    """For AdamR: every trainable parameter of two or more dimensions, whole, without bias.

    Raises:
        ValueError: when there is none.
    """
    survey = Survey(model)
    matrices, treated, reasons = [], {}, {}
    for matrix in find_matrices(model):
        matrix.bias = None
        (name,) = survey.matrix_names(matrix)
        if min(matrix.shape) == 1:
            reasons[name] = "a single row or column"
        elif matrix.weight.endswith("bias"):  # of experts, a row each
            reasons[name] = "bias"
        else:
            matrices.append(matrix)
            treated[name] = survey.describe(name)
    if not matrices:
        raise ValueError(
            "adamr: no trainable parameter of this model has two dimensions, so nothing would be "
            "rotated; unfreeze a matrix, or use --optim adamw_torch."
        )
    return _finish(survey, config, treated, reasons, matrices=matrices)


def layer_matrices(model: nn.Module, config: Any) -> Blocks:
    """For NKFAC: linear layers and convolutions, the bias joined, fused weights whole.

    Left to the base rule: embeddings, tied weights (their gradient is a sum of
    several uses), the projections of ``nn.MultiheadAttention`` (which calls no
    layer that could be read), layers with both sides wider than ``max_dim``.

    Raises:
        ValueError: when no layer is left.
    """
    survey = Survey(model)
    hidden = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    matrices: list[LayerMatrix] = []
    treated: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for matrix in find_matrices(model):
        name = survey.name_of(matrix.weight_parameter)
        module = matrix.module
        layered = matrix.weight == "weight" and (is_linear(module) or _is_convolution(module))
        wide = [side for side in matrix.shape if side > config.max_dim]
        if not layered or name in survey.tied:
            continue
        if module in hidden:
            reasons[name] = "nn.MultiheadAttention calls no layer whose gradient could be read"
        elif len(wide) == 2:
            reasons[name] = f"both sides wider than max_dim={config.max_dim}"
        else:
            matrices.append(matrix)
            one_sided = f", one side only (max_dim={config.max_dim})" if wide else ""
            names = survey.matrix_names(matrix)
            add_reason(treated, names, survey.describe(name) + one_sided)
    if not matrices:
        raise ValueError(
            "nkfac: this model has no linear layer or convolution that trains and is at most "
            f"max_dim={config.max_dim} wide on a side; unfreeze one, or raise max_dim."
        )
    return _finish(survey, config, treated, reasons, matrices=matrices)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS)


def attention_matrices(model: nn.Module, config: Any) -> Blocks:
    """For AFOpt: the matrices of the attentions in ``config.scope``.

    ``query_key`` takes q and k, ``attention`` o and v too, ``all_linear`` the
    other linear layers as well, except output heads, tied weights and
    adapters outside the attentions.

    Raises:
        ValueError: when nothing would be preconditioned: no attention was
            found, or its matrices are frozen.
    """
    survey = Survey(model)
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
    return _finish(
        survey, config, treated, reasons, matrices=matrices, others=others, attention=blocks
    )


def _others(
    survey: Survey, found: Sequence[AttentionBlock], matrices: Sequence[LayerMatrix]
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
    survey: Survey,
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
    survey: Survey, found: Sequence[AttentionBlock], scope: str, treated: dict[str, str]
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


def norm_parameters(model: nn.Module, config: Any) -> Blocks:
    """For SGD-PH: scales and shifts of norms, weight-norm scales; biases if asked for.

    With ``config.reference`` every one-dimensional parameter, as in the
    authors' code.

    Raises:
        ValueError: when there is none that trains.
    """
    survey = Survey(model)
    norms: list[NormParameter] = []
    treated: dict[str, str] = {}
    for norm, _ in channel_parameters(model):
        if norm.parameter.requires_grad:
            name = survey.name_of(norm.parameter)
            norms.append(NormParameter(name, norm.module, norm.attribute))
            treated[name] = survey.describe(name)
    vectors = getattr(config, "reference", False)
    for name, parameter in survey.parameters.items():
        module, attribute = survey.owners[name]
        wanted = vectors or (config.include_bias and "bias" in attribute)
        if wanted and parameter.dim() == 1 and parameter.requires_grad and name not in treated:
            norms.append(NormParameter(name, module, attribute))
            treated[name] = survey.describe(name)
    if vectors:
        norms = [norm for norm in norms if norm.parameter.dim() == 1]
        treated = {norm.name: treated[norm.name] for norm in norms}
    if not norms:
        raise ValueError(
            "sgdph: this model has no norm layer with parameters that train; unfreeze them, or set "
            "include_bias=True to treat biases as channel-wise parameters."
        )
    order = {name: place for place, name in enumerate(survey.parameters)}
    norms.sort(key=lambda norm: order[norm.name])
    return _finish(survey, config, treated, norms=norms)
