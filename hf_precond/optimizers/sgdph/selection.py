"""Which parameters SGD-PH steps by their curvature, and what becomes of the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_precond.architectures.modules import channel_parameters
from hf_precond.architectures.parameters import ParameterSurvey
from hf_precond.architectures.structure import (
    ModelStructure,
    NormParameter,
)


def norm_parameters(model: nn.Module, config: Any) -> ModelStructure:
    """For SGD-PH: scales and shifts of norms, weight-norm scales; biases if asked for.

    With ``config.reference`` every one-dimensional parameter, as in the
    authors' code.

    Raises:
        ValueError: when there is none that trains.
    """
    survey = ParameterSurvey(model)
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
    return survey.structure(config, treated, norms=norms)
