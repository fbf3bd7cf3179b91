"""The linear layers of a head that ``from_pretrained`` had to initialise."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from hf_precond.architectures.modules import find_matrices, is_linear
from hf_precond.architectures.parameters import find_head
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.compat.transformers_internals import was_loaded

SAVED = re.compile(r"modules_to_save\.[^.]+")
"""PEFT's copy of a module that is trained along with its adapters."""


def find_new_head(model: nn.Module) -> list[LayerMatrix]:
    """The linear layers of the task head whose weights are new.

    :func:`~hf_precond.architectures.parameters.find_head` says what lies outside the body; new is
    what the checkpoint did not have. So a head that was trained before is not new, nor is one of a
    model that was made from its config.

    Args:
        model: as ``from_pretrained`` returned it, or within PEFT's wrappers.
    """
    parameters = dict(model.named_parameters())
    if not any(map(was_loaded, parameters.values())):
        return []
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [
        matrix
        for matrix in head_layers(model)
        if not _was_loaded(names[id(matrix.weight_parameter)], parameters)
    ]


def head_layers(model: nn.Module) -> list[LayerMatrix]:
    """The linear layers of the task head that train, new or not.

    Args:
        model: the model.
    """
    names = find_head(model)
    held = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    matrices = find_matrices(model) if names else []
    return [m for m in matrices if is_linear(m.module) and id(m.weight_parameter) in held]


def _was_loaded(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a parameter was, or the one that PEFT copied it from."""
    source = parameters.get(SAVED.sub("original_module", name))
    return was_loaded(parameters[name] if source is None else source)
