"""Which parameters AdamR rotates, and what becomes of the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_precond.architectures.modules import find_matrices
from hf_precond.architectures.parameters import ParameterSurvey
from hf_precond.architectures.structure import (
    ModelStructure,
)


def every_matrix(model: nn.Module, config: Any) -> ModelStructure:
    """For AdamR: every trainable parameter of two or more dimensions, whole, without bias.

    Raises:
        ValueError: when there is none.
    """
    survey = ParameterSurvey(model)
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
    return survey.structure(config, treated, reasons, matrices=matrices)
