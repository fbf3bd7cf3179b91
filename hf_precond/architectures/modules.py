"""What layer a module is (linear, convolution, embedding, norm), and the matrices of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.weight_norm import WeightNorm

from hf_precond.architectures.structure import LayerMatrix, Layout, NormParameter

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def is_transposed_linear(module: nn.Module) -> bool:
    """``transformers``' ``Conv1D``: a linear layer whose weight is stored ``[in, out]``."""
    if not any(cls.__name__ == "Conv1D" for cls in type(module).__mro__):
        return False
    weight, outputs = getattr(module, "weight", None), getattr(module, "nf", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == outputs


def is_linear(module: nn.Module) -> bool:
    """A layer that computes ``x Wᵀ + b``: ``nn.Linear``, a subclass of it, or ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def refusal(tensor: Tensor) -> str | None:
    """Why a weight cannot be stepped as a real dense matrix, or ``None`` when it can."""
    if tensor.is_complex():
        return "complex numbers"
    if not tensor.is_floating_point():
        return "quantised"
    if tensor.layout != torch.strided:
        return "sparse"
    return None if tensor.numel() else "empty"


def is_readable(module: nn.Module) -> bool:
    """Whether a linear layer's weight is there, dense and of the shape its sizes announce."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or refusal(weight):
        return False
    if isinstance(module, nn.Linear):
        return tuple(weight.shape) == (module.out_features, module.in_features)
    return is_transposed_linear(module)


def _layout(module: nn.Module, weight: Tensor) -> Layout:
    if is_transposed_linear(module):
        return "transposed"
    return "conv" if weight.dim() > 2 else "linear"


def _groups(module: nn.Module) -> int:
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def _is_stacked(module: nn.Module, weight: Tensor) -> bool:
    """Whether a weight holds a matrix an expert, ``[experts, rows, columns]``."""
    return weight.dim() == 3 and getattr(module, "num_experts", None) == weight.shape[0]


def layer_matrix(
    module: nn.Module, name: str, *, weight: str = "weight", bias: bool = True
) -> LayerMatrix:
    """The matrix of one layer.

    A bias is joined when it exists and trains; beside a frozen weight it is
    joined whether it trains or not, since such a matrix is only read.

    Args:
        module: the layer.
        name: its path in the model.
        weight: the attribute that holds the weight.
        bias: whether a bias is joined at all.
    """
    tensor = getattr(module, weight)
    vector = getattr(module, "bias", None) if weight == "weight" else None
    joined = (
        bias
        and isinstance(vector, Tensor)
        and vector.dim() == 1
        and (vector.requires_grad or not tensor.requires_grad)
    )
    return LayerMatrix(
        name=name if weight == "weight" else f"{name}.{weight}".lstrip("."),
        module=module,
        weight=weight,
        bias="bias" if joined else None,
        layout=_layout(module, tensor),
        groups=_groups(module),
        stacked=_is_stacked(module, tensor),
    )


def _parameters_once(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """``(module path, module, attribute, parameter)``, a tied parameter at its first owner."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, module, attribute, parameter


def _shared_biases(model: nn.Module) -> set[int]:
    """``id`` of every bias that several layers hold; not to be kept."""
    counts: dict[int, int] = {}
    for module in model.modules():
        vector = getattr(module, "bias", None)
        if isinstance(vector, Tensor) and (is_linear(module) or isinstance(module, CONVOLUTIONS)):
            counts[id(vector)] = counts.get(id(vector), 0) + 1
    return {bias for bias, count in counts.items() if count > 1}


def find_matrices(model: nn.Module, *, trainable: bool = True) -> list[LayerMatrix]:
    """Every weight of at least two dimensions, in model order, tied ones once.

    Covers ``nn.Linear`` and its subclasses, ``Conv1D``, convolutions (grouped
    and depthwise too), embeddings and any other parameter of two or more
    dimensions (read as ``[first, rest]``; those of experts are marked as stacks).
    A bias that trains is joined to the weight of linear layers and convolutions,
    unless several of them share it: each would step it. Weights that
    :func:`refusal` names are left out.

    Args:
        model: the model.
        trainable: leave out frozen weights.
    """
    found, shared = [], _shared_biases(model)
    for path, module, attribute, parameter in _parameters_once(model):
        if parameter.dim() < 2 or refusal(parameter) or (trainable and not parameter.requires_grad):
            continue
        layered = attribute == "weight" and (is_linear(module) or isinstance(module, CONVOLUTIONS))
        joined = layered and id(getattr(module, "bias", None)) not in shared
        found.append(layer_matrix(module, path, weight=attribute, bias=joined))
    return found


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each tied parameter to its other names."""
    first: dict[int, str] = {}
    others: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            others.setdefault(owner, []).append(name)
    return {name: tuple(rest) for name, rest in others.items()}


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm, _InstanceNorm)
_CALLED_NORM = re.compile(r"(?:rms|layer|batch|group|instance)_?norm", re.IGNORECASE)


def is_norm(module: nn.Module) -> bool:
    """A norm layer: torch's own, or one whose class is called so (``T5LayerNorm``, ``*RMSNorm``).

    A class that only bears the name must hold vectors alone, and nothing in
    it any parameter, so that a block which contains a norm is not taken for
    one (``RobertaPreLayerNormLMHead``, which holds a bias of its own).
    """
    if isinstance(module, NORMS):
        return True
    if not any(_CALLED_NORM.search(cls.__name__) for cls in type(module).__mro__):
        return False
    own = list(module.parameters(recurse=False))
    vectors = all(p.dim() <= 1 or p.numel() == max(p.shape) for p in own)
    return bool(own) and vectors and len(own) == len(list(module.parameters()))


def weight_norm_scales(module: nn.Module) -> list[str]:
    """The attributes of the scales that ``weight_norm`` keeps in a module.

    ``torch.nn.utils.parametrizations.weight_norm`` keeps the scale as
    ``original0`` of ``module.parametrizations.weight`` (and the direction as
    ``original1``); the older ``torch.nn.utils.weight_norm`` as ``weight_g``
    of the layer itself.
    """
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        called = {type(child).__name__ for child in module}
        return ["original0"] if "_WeightNorm" in called and hasattr(module, "original0") else []
    hooks = module._forward_pre_hooks.values()
    return [f"{hook.name}_g" for hook in hooks if isinstance(hook, WeightNorm)]


def channel_parameters(model: nn.Module) -> Iterator[tuple[NormParameter, str]]:
    """Every norm parameter of a model, frozen ones too, tied ones once, with what it is."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if is_norm(module):
            attributes = [name for name, _ in module.named_parameters(recurse=False)]
            kind = type(module).__name__
        else:
            attributes, kind = weight_norm_scales(module), "weight-norm scale"
        for attribute in attributes:
            if id(getattr(module, attribute)) not in seen:
                seen.add(id(getattr(module, attribute)))
                name = f"{path}.{attribute}".lstrip(".")
                yield NormParameter(name, module, attribute), kind
