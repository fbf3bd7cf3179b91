"""What layer a module is (linear, convolution, embedding, norm), and the matrices of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from hf_precond.architectures.structure import LayerMatrix, Layout, NormParameter
from hf_precond.architectures.tables import NORM_CLASS

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.SyncBatchNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def base_of(model: nn.Module) -> nn.Module:
    """Returns the model inside its wrappers (compilation, DDP, PEFT), or the model itself."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, wrappers):
            model = model.module
        else:
            inner: Any = getattr(model, "get_base_model", None)
            return inner() if hasattr(model, "peft_config") and inner is not None else model


def has_adapters(model: nn.Module) -> bool:
    """Returns whether a model has PEFT's wrappers (:mod:`~hf_precond.architectures.peft`) in it."""
    names = ("base_layer", "modules_to_save")
    return any(hasattr(module, name) for module in model.modules() for name in names)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is ``transformers``' ``Conv1D``: linear, its weight stored ``[in, out]``."""
    if not any(cls.__name__ == "Conv1D" for cls in type(module).__mro__):
        return False
    weight, outputs = getattr(module, "weight", None), getattr(module, "nf", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == outputs


def is_linear(module: nn.Module) -> bool:
    """Whether a layer computes ``x Wᵀ + b``: ``nn.Linear``, a subclass of it, or ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def refusal(weight: Tensor) -> str | None:
    """Why a weight cannot be stepped as a real dense matrix; ``None`` when it can."""
    if weight.is_complex():
        return "complex numbers"
    if not weight.is_floating_point():
        return "quantised"
    if weight.layout != torch.strided:
        return "sparse"
    return None if weight.numel() else "empty"


def is_readable(module: nn.Module) -> bool:
    """Whether a linear layer's weight is there, dense and of the shape its sizes announce."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or refusal(weight):
        return False
    if isinstance(module, nn.Linear):
        return tuple(weight.shape) == (module.out_features, module.in_features)
    return is_transposed_linear(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: torch's own, or one whose class is named so (``T5LayerNorm``).

    A class that only bears the name must hold vectors alone, and no module
    with parameters, so that a block which contains a norm is not taken for
    one (``RobertaPreLayerNormLMHead``, which has a bias of its own).
    """
    if isinstance(module, NORMS):
        return True
    if not any(NORM_CLASS.search(cls.__name__) for cls in type(module).__mro__):
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
        kinds = {type(child).__name__ for child in module}
        return ["original0"] if "_WeightNorm" in kinds and hasattr(module, "original0") else []
    hooks = module._forward_pre_hooks.values()
    return [f"{hook.name}_g" for hook in hooks if isinstance(hook, WeightNorm)]


def owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The path, module and attribute of every parameter; of a tied one, at its first owner."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, module, attribute


def find_norms(model: nn.Module) -> list[NormParameter]:
    """Every scale and shift of a model's norms, frozen ones too, tied ones once."""
    return [
        NormParameter(f"{path}.{attribute}".lstrip("."), module, attribute)
        for path, module, attribute in owned_parameters(model)
        if is_norm(module) or attribute in weight_norm_scales(module)
    ]


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
    layout: Layout = "conv" if tensor.dim() > 2 else "linear"
    return LayerMatrix(
        name=name if weight == "weight" else f"{name}.{weight}".lstrip("."),
        module=module,
        weight=weight,
        bias="bias" if joined else None,
        layout="transposed" if is_transposed_linear(module) else layout,
        groups=module.groups if isinstance(module, CONVOLUTIONS) else 1,
        stacked=tensor.dim() == 3 and getattr(module, "num_experts", None) == tensor.shape[0],
    )


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution."""
    return is_linear(module) or isinstance(module, CONVOLUTIONS)


def find_matrices(model: nn.Module) -> list[LayerMatrix]:
    """Every weight of at least two dimensions that trains, in model order, tied ones once.

    Covers ``nn.Linear`` and its subclasses, ``Conv1D``, convolutions (grouped
    and depthwise too), embeddings and any other parameter of two or more
    dimensions (read as ``[first, rest]``; those of experts are marked as stacks).
    A bias that trains is joined to the weight of linear layers and convolutions,
    unless several of them share it: each would step it. Weights that
    :func:`refusal` names are left out.
    """
    layers = [module for module in model.modules() if is_layer(module)]
    uses = Counter(id(getattr(layer, "bias", None)) for layer in layers)
    matrices = []
    for path, module, attribute in owned_parameters(model):
        parameter = getattr(module, attribute)
        if parameter.dim() < 2 or refusal(parameter) or not parameter.requires_grad:
            continue
        bias = (
            attribute == "weight"
            and is_layer(module)
            and uses[id(getattr(module, "bias", None))] == 1
        )
        matrices.append(layer_matrix(module, path, weight=attribute, bias=bias))
    return matrices


def class_names(module: nn.Module) -> set[str]:
    """The names under which a module's class and its bases may stand in a table."""
    bases = type(module).__mro__
    files = (f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for cls in bases)
    return {cls.__name__ for cls in bases} | set(files)
