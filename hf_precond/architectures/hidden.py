"""The matrices of hidden layers: what attentions and other linear layers multiply with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.architectures.modules import (
    CONVOLUTIONS,
    find_matrices,
    is_layer,
    is_linear,
    is_readable,
    layer_matrix,
)
from hf_precond.architectures.parameters import ParameterSurvey
from hf_precond.architectures.structure import LayerMatrix, LowRankAdapter, RowSelection

ROUTER = "router: a step of its logits sends tokens to other experts"
"""Why optimizers with factors leave routers to the fallback optimizer."""

ROLES = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "o": "attention output",
    "k_rot": "keys that all heads share",
    "q_pos": "queries, of positions",
    "k_pos": "keys, of positions",
    "q_sine": "queries, of positions beside content",
    "q_down": "latent of queries",
    "kv_down": "latent of keys and values",
}

CONVOLUTION = "convolution, as a linear layer of its patches (the model has no attention)"

Candidate = tuple[LayerMatrix, str]
"""A matrix that can be preconditioned, and what it is."""


def in_attention(block: AttentionBlock, roles: str = "qkvo") -> list[Candidate]:
    """The matrices and adapters of an attention that train.

    Args:
        block: the attention.
        roles: which of q, k, v and o.
    """
    chosen: list[Candidate] = []
    note = f" ({block.note})" if block.note else ""
    for role, matrix in block.roles().items():
        inside = set(block.serves(role)) <= set(roles)
        if inside and role in block.trainable:
            chosen.append((matrix, ROLES[role] + note))
        for adapter in block.pairs(role) if inside else ():
            pair = (adapter.down, adapter.up)
            chosen += [(m, f"adapter of {ROLES[role]}{note}") for m in pair if m.trains]
    return chosen


def outside_attention(
    survey: ParameterSurvey, attentions: Sequence[AttentionBlock], convolutions: bool = False
) -> list[Candidate]:
    """The linear layers outside attention, experts, and what shares a weight with an attention.

    Without output heads, routers, tied weights, adapters, and weights of a single row or column.

    Args:
        survey: of the model.
        attentions: all of the model's.
        convolutions: those too, but not in groups.
    """
    inside: dict[nn.Module, list[LayerMatrix]] = {}
    for block in attentions:
        for matrix in block.roles().values():
            inside.setdefault(matrix.module, []).append(matrix)
    everything = [m for m in find_matrices(survey.model) if m.module not in inside]
    linears = [(m, "linear layer") for m in everything if is_linear(m.module)]
    if convolutions:
        linears += [(m, CONVOLUTION) for m in everything if isinstance(m.module, CONVOLUTIONS)]
    for matrices in inside.values():
        rows = [matrix.rows for matrix in matrices if matrix.rows is not None]
        for number, rest in enumerate(RowSelection.complement(rows) if rows else ()):
            name = matrices[0].name.rpartition("[")[0] + f"[gate{number or ''}]"
            linears.append((replace(matrices[0], name=name, rows=rest), "gate"))
    chosen = []
    for matrix, what in linears:
        if not matrix.of_layer or not matrix.trains or min(matrix.shape) == 1 or matrix.groups > 1:
            continue
        name = survey.name_of(matrix.weight_parameter)
        skipped = name in survey.tied or name in survey.head or survey.describe(name) == "adapter"
        if not skipped and name not in survey.routers:
            chosen.append((matrix, what))
    return chosen + experts_of(survey)


def adapters_outside_attention(
    survey: ParameterSurvey, attentions: Sequence[AttentionBlock]
) -> list[LowRankAdapter]:
    """LoRA's pairs of the linear layers outside attention.

    Without those of output heads, routers and layers of a single row or column, and pairs that
    share a matrix with others.

    Args:
        survey: of the model.
        attentions: all of the model's.
    """
    if not survey.adapters:
        return []
    from hf_precond.architectures.peft import find_adapter, wrappers_of

    inside = {matrix.module for block in attentions for matrix in block.roles().values()}
    names = {module: name for name, module in survey.model.named_modules()}
    found = []
    for layer, wrapper in wrappers_of(survey.model).items():
        if layer in inside or not is_linear(layer):
            continue
        base = layer_matrix(layer, names[layer], bias=False)
        held = {survey.names[id(parameter)] for parameter in layer.parameters()}
        first = find_adapter(wrapper, names[wrapper])
        if first is None or held & (survey.head | survey.routers) or min(base.shape) == 1:
            continue
        for pair in (first, *first.beside):
            if pair.magnitude is None or is_readable(layer):
                pair.base = base
                found.append(pair)
    uses = Counter(id(m.weight_parameter) for pair in found for m in (pair.down, pair.up))

    def is_own(matrix: LayerMatrix) -> bool:
        weight = matrix.weight_parameter
        return uses[id(weight)] == 1 and survey.name_of(weight) not in survey.tied

    return [pair for pair in found if is_own(pair.down) and is_own(pair.up)]


def in_hidden_layers(
    survey: ParameterSurvey, attentions: Sequence[AttentionBlock]
) -> list[tuple[str, LayerMatrix, str]]:
    """Every matrix of a hidden layer, in the order of the parameters: the name of its weight too.

    Linear layers, convolutions, stacks of experts, and the A and B of LoRA; an attention's tied
    weights, single rows and output heads too.

    Args:
        survey: of the model.
        attentions: all of the model's.
    """
    chosen = [found for b in attentions for found in in_attention(replace(b, note=""))]
    chosen += outside_attention(survey, attentions)
    inside = {id(matrix.weight_parameter) for matrix, _ in chosen}
    others = [m for m in find_matrices(survey.model) if id(m.weight_parameter) not in inside]
    chosen += [(m, what) for m in others if (what := _kind(survey, m)) is not None]
    order = {name: place for place, name in enumerate(survey.parameters)}
    named = [(survey.name_of(m.weight_parameter), m, what) for m, what in chosen]
    return sorted(named, key=lambda found: order[found[0]])


def _kind(survey: ParameterSurvey, matrix: LayerMatrix) -> str | None:
    """What a matrix of a hidden layer is that no attention and no linear layer holds."""
    if not matrix.of_layer or not is_layer(matrix.module):
        return None
    what = survey.describe(survey.name_of(matrix.weight_parameter))
    return what if what in ("adapter", "convolution") else None


def experts_of(survey: ParameterSurvey) -> list[Candidate]:
    """The stacks of experts that train and are not tied.

    Args:
        survey: of the model.
    """
    stacks = [(m, survey.name_of(m.weight_parameter)) for m in survey.experts]
    return [(m, f"{m.count} experts") for m, name in stacks if name not in survey.tied]
