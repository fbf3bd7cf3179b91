"""What ``from_pretrained`` loaded and what it had to initialise, and the rates that follow."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_precond.architectures.modules import find_matrices, is_layer, is_linear
from hf_precond.architectures.parameters import find_head
from hf_precond.architectures.peft import find_adapter
from hf_precond.architectures.structure import LayerMatrix, LowRankAdapter
from hf_precond.compat.transformers_internals import was_loaded

BODY_STEP = 0.0062
"""What a unit step changes each layer of a pretrained body by, relative to its weights, times the
root of the number of layers."""
ADAPTER_STEP = 0.033
"""The same of the weights below LoRA's adapters, in the spectral norm."""
LONG, SHORT, SHORTEST = 300, 150, 60
"""Steps between which the starting rate times the steps is constant: longer trainings take the rate
of the first number, shorter ones that of the second, with LoRA that of the third."""

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


def starting_lr(model: nn.Module, steps: int | None = None) -> float | None:
    """The learning rate at which fine-tuning starts well, from the weights that were loaded.

    ``lr = 0.0062 · rms(W) / √K``, of the K linear layers and convolutions that were loaded and
    train, W all their weights. A step of size lr in every entry then changes the weights of each
    by ``0.0062 / √K`` of their size, and what the model computes, to first order and as far as the
    changes of its layers are independent, by √K times as much, whatever its depth and the scale of
    its weights.

    A training of fewer than 300 steps goes as far in them: its rate is ``300 / steps`` times as
    high, twice at most. A rule of thumb, from five tasks under an encoder of 6 layers; one of 12
    and a language model of 30 want the root of K.

    LoRA steps ``s B A`` instead, B from zero and A ``[r, in]``: with its scaling s the change has
    the spectral norm of one by ``0.033 / √K``, whatever the rank is, at
    ``0.033 · rms(W) / (√K s √in rms(A))``, where W are the K weights below the adapters. In short
    trainings it is up to five times as high.

    Args:
        model: as ``from_pretrained`` returned it, or within PEFT's wrappers.
        steps: of the optimizer in the whole training; ``None``, or a number that is not
            positive (``TrainingArguments.max_steps`` is -1), where they are not known, which
            counts as 300 or more.

    Returns:
        The rate, to two digits; ``None`` where nothing that was loaded trains (a model made
        from a config, a copy, a sharded model, whose parameters do not tell).
    """
    parameters = dict(model.named_parameters())
    if not any(map(was_loaded, parameters.values())):
        return None
    counted = counted_steps(steps)
    head = {id(parameters[name]) for name in find_head(model) if name in parameters}
    body = [
        matrix.weight_parameter
        for matrix in find_matrices(model)
        if (is_layer(matrix.module) or matrix.stack)
        and was_loaded(matrix.weight_parameter)
        and id(matrix.weight_parameter) not in head
    ]
    if body:
        return _rounded(LONG / max(counted, SHORT) * BODY_STEP * _rms(body) / math.sqrt(len(body)))
    pairs = list(_adapters(model))
    below = [weight for _, weight in pairs if weight.is_floating_point()]
    if not below:
        return None
    reach = [a.scaling * math.sqrt(a.down.shape[1]) * _rms([a.down.read()]) for a, _ in pairs]
    mean = sum(reach) / len(reach)
    size = LONG / counted * ADAPTER_STEP * _rms(below) / math.sqrt(len(pairs))
    return _rounded(size / mean) if mean > 0 else None


def counted_steps(steps: int | None) -> int:
    """The steps by which :func:`starting_lr` judges a training: from 60 to 300.

    Args:
        steps: as :func:`starting_lr` takes them.
    """
    known = steps if steps is not None and steps > 0 else LONG
    return min(max(known, SHORTEST), LONG)


def _adapters(model: nn.Module) -> Iterable[tuple[LowRankAdapter, Tensor]]:
    """The LoRA pairs that train, with the weights below them."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        pair = find_adapter(module, name) if isinstance(base, nn.Module) else None
        weight = getattr(base, "weight", None)
        if pair is not None and isinstance(weight, Tensor):
            yield pair, weight


def _rms(tensors: Iterable[Tensor]) -> float:
    """Root mean square of all entries."""
    held = [tensor.detach() for tensor in tensors]
    norms = [torch.linalg.vector_norm(t, dtype=torch.float32).to(held[0].device) for t in held]
    return float(torch.stack(norms).norm()) / math.sqrt(sum(t.numel() for t in held))


def _rounded(rate: float) -> float | None:
    return float(f"{rate:.2g}") if 0 < rate < math.inf else None
