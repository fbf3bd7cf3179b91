"""Which matrices AFOpt preconditions, and what becomes of the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from hf_precond.architectures.attention import find_attention, is_named_attention
from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.architectures.hidden import (
    CONVOLUTION,
    ROLES,
    ROUTER,
    Candidate,
    adapters_outside_attention,
    in_attention,
    outside_attention,
)
from hf_precond.architectures.modules import find_matrices
from hf_precond.architectures.parameters import ParameterSurvey, add_reason
from hf_precond.architectures.structure import LayerMatrix, ModelStructure
from hf_precond.architectures.tables import HOW_TO_DECLARE
from hf_precond.compat.transformers_internals import was_loaded
from hf_precond.compat.warn import warn
from hf_precond.distributed import collectives
from hf_precond.optimizers.afopt.config import AFOptConfig

logger = logging.getLogger(__name__)

LOADED = (
    "afopt: this model's weights were loaded, so its attention is preconditioned and its other "
    "linear layers are left to %s (scope=attention); scope=all_linear preconditions them too, as "
    "earlier releases did."
)
SCOPES = {"query_key": "qk", "attention": "qkvo", "all_linear": "qkvo"}
Left = tuple[LayerMatrix, str, str]
"""A matrix of a hidden layer that is not chosen, what it is, and why not."""


def attention_matrices(model: nn.Module, config: AFOptConfig) -> ModelStructure:
    """Finds the matrices in ``config.scope``; ``auto`` is what :func:`scope_of` says.

    ``query_key`` takes q and k of the attentions, ``attention`` v and o too, ``all_linear`` the
    other linear layers as well, except output heads and tied weights; in a model without attention
    the convolutions too. LoRA's A and B of these layers are taken too.

    Args:
        model: the model.
        config: the config.

    Returns:
        The structure, with a reason for what becomes of every parameter.

    Raises:
        ValueError: nothing would be preconditioned: no attention was found, or its matrices are
            frozen.
    """
    survey, attentions = ParameterSurvey(model), find_attention(model)
    linears = outside_attention(survey, attentions, convolutions=not attentions)
    scope = scope_of(config, survey, attentions, linears)
    pairs = adapters_outside_attention(survey, attentions)
    adapters = [matrix for pair in pairs for matrix in (pair.down, pair.up)]
    linears += [(matrix, "adapter of a linear layer") for matrix in adapters if matrix.trains]
    blocks, chosen, left = _in_attentions(survey, attentions, scope)
    if scope == "all_linear":
        order = {name: place for place, name in enumerate(survey.parameters)}
        chosen += linears
        chosen.sort(key=lambda candidate: order[survey.name_of(candidate[0].weight_parameter)])
    _check(model, attentions, chosen, scope)
    matrices = list(dict.fromkeys(matrix for matrix, _ in chosen))
    inside = set(matrices)
    why = _outside(scope) + " (auto, of a model that was loaded)" * (config.scope == "auto")
    left += [(matrix, what, why) for matrix, what in linears]
    left = [candidate for candidate in left if candidate[0] not in inside]
    treated, outside = _reasons(model, survey, chosen, left)
    hidden = [matrix for matrix, _, _ in left if matrix not in adapters]
    structure = survey.structure(
        config,
        treated,
        outside,
        matrices=matrices,
        hidden=hidden,
        attention=blocks,
        adapters=[pair for pair in pairs if inside & {pair.down, pair.up}],
    )
    structure.decided = {"scope": scope} if config.scope == "auto" else {}
    return structure


def scope_of(
    config: AFOptConfig,
    survey: ParameterSurvey,
    attentions: Sequence[AttentionBlock],
    linears: Sequence[Candidate],
) -> str:
    """What ``scope`` means for a model.

    ``auto`` leaves linear layers that were loaded to the fallback optimizer, where attention is
    left to precondition: in fine-tuning that was better (``examples/benchmarks/finetuning.md``).

    Args:
        config: the config.
        survey: the model's parameters.
        attentions: the model's.
        linears: its linear layers outside them that train.
    """
    if config.scope != "auto":
        return config.scope
    _, chosen, _ = _in_attentions(survey, attentions, "attention")
    loaded = any(was_loaded(matrix.weight_parameter) for matrix, _ in linears)
    return "attention" if chosen and loaded else "all_linear"


def _outside(scope: str) -> str:
    return f"outside scope={scope}"


def _in_attentions(
    survey: ParameterSurvey, attentions: Sequence[AttentionBlock], scope: str
) -> tuple[list[AttentionBlock], list[Candidate], list[Left]]:
    """The attentions with a matrix in scope, these matrices, and all that train in any."""
    blocks: list[AttentionBlock] = []
    chosen: list[Candidate] = []
    left: list[Left] = []

    def is_tied(matrix: LayerMatrix) -> bool:
        return survey.name_of(matrix.weight_parameter) in survey.tied

    for block in attentions:
        candidates = in_attention(block, SCOPES[scope])
        tied = [matrix for matrix, _ in candidates if is_tied(matrix)]
        if candidates and not tied:
            blocks.append(block)
            chosen += candidates
        for role, matrix in block.roles().items():
            if role in block.trainable and not is_tied(matrix):
                why = _outside(scope)
                if tied and set(block.serves(role)) <= set(SCOPES[scope]):
                    why = f"its attention has a tied weight ({tied[0].name})"
                left.append((matrix, ROLES[role], why))
    return blocks, chosen, left


def _check(
    model: nn.Module, attentions: Sequence[AttentionBlock], chosen: list[Candidate], scope: str
) -> None:
    """Refuses to precondition nothing; warns where attention is there and is not known."""
    name = type(model).__name__
    if not attentions and (scope != "all_linear" or not chosen):
        raise ValueError(
            f"afopt: no attention that it knows was found in {name}; {HOW_TO_DECLARE}; or "
            "choose adamr, which needs none."
        )
    if not chosen:
        raise ValueError(
            f"afopt: {name} has {len(attentions)} attentions, but no matrix in scope={scope} "
            "trains (they are frozen or tied); unfreeze them, widen scope, or put LoRA adapters on "
            "the linear layers."
        )
    unread = any(map(is_named_attention, model.modules()))
    if not attentions and (unread or not any(what == CONVOLUTION for _, what in chosen)):
        warn(
            f"afopt: no attention was found in {name}, so only its other linear layers are "
            f"preconditioned; {HOW_TO_DECLARE}."
        )


def _reasons(
    model: nn.Module, survey: ParameterSurvey, chosen: list[Candidate], left: list[Left]
) -> tuple[dict[str, str], dict[str, str]]:
    """What becomes of the parameters inside and outside, by name."""
    treated: dict[str, str] = {}
    outside = dict.fromkeys(survey.routers, ROUTER)
    for matrix, what in chosen:
        add_reason(treated, survey.matrix_names(matrix), what)
    for matrix, what, why in left:
        for name in survey.matrix_names(matrix):
            if name in treated:  # for other rows of a fused weight
                add_reason(treated, [name], f"{what} by the fallback optimizer")
            else:
                add_reason(outside, [name], f"{what}: {why}")
    for matrix in find_matrices(model):
        name = survey.name_of(matrix.weight_parameter)
        if min(matrix.shape) == 1 and survey.describe(name) == "linear layer":
            add_reason(outside, [name], "a single row or column")
    return treated, outside


def announce(structure: ModelStructure, base: str) -> None:
    """Says in a line where ``scope="auto"`` leaves loaded layers to the fallback optimizer.

    Args:
        structure: what was found in the model.
        base: the fallback optimizer's name.
    """
    if structure.decided.get("scope") == "attention" and collectives.rank() == 0:
        logger.warning(LOADED, base)


def warn_of_unread(attentions: Sequence[AttentionBlock], config: AFOptConfig) -> None:
    """Warns where the averaged factors of rotated queries and keys cannot be had.

    Args:
        attentions: those with a matrix in scope.
        config: the config.
    """
    unread = [block.name for block in attentions if block.rotary and not block.observed]
    if unread and config.rope == "averaged":
        warn(
            f"afopt: the rotated queries and keys of {len(unread)} attentions ({unread[0]}, …) "
            "cannot be read, so their factors follow from the inputs and weights alone, as "
            "with rope='ignored'."
        )
