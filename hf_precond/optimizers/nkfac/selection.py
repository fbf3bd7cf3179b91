"""Which parameters NKFAC preconditions, and what becomes of the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_precond.architectures.modules import CONVOLUTIONS, find_matrices, is_linear
from hf_precond.architectures.parameters import ParameterSurvey, add_reason
from hf_precond.architectures.structure import (
    LayerMatrix,
    ModelStructure,
)


def layer_matrices(model: nn.Module, config: Any) -> ModelStructure:
    """For NKFAC: linear layers and convolutions, the bias joined, fused weights whole.

    Left to the base rule: embeddings, tied weights (their gradient is a sum of
    several uses), the projections of ``nn.MultiheadAttention`` (which calls no
    layer that could be read), layers with both sides wider than ``max_dim``.

    Raises:
        ValueError: when no layer is left.
    """
    survey = ParameterSurvey(model)
    hidden = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    matrices: list[LayerMatrix] = []
    treated: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for matrix in find_matrices(model):
        name = survey.name_of(matrix.weight_parameter)
        module = matrix.module
        layered = matrix.weight == "weight" and (is_linear(module) or isinstance(module, CONVOLUTIONS))
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
    return survey.structure(config, treated, reasons, matrices=matrices)
