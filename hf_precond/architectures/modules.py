"""What layer a module is (linear, convolution, embedding, norm), and the matrices of a model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from hf_precond.architectures.structure import LayerMatrix, NormParameter
from hf_precond.architectures.tables import EXPERT, NORM_CLASS

ORIGINAL = "_orig"
"""Behind the name of a parameter that was pruned."""
PARAMETRISED = "parametrizations."
"""In the path of what a parametrised tensor is computed from."""
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


def has_experts(model: nn.Module) -> bool:
    """Whether a model may have experts: by a name in it, or since some were declared."""
    declared = "hf_precond.architectures.experts" in sys.modules
    return declared or any(
        EXPERT.search(path) or EXPERT.search(type(module).__name__)
        for path, module in model.named_modules()
    )


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is ``transformers``' ``Conv1D``: linear, its weight stored ``[in, out]``."""
    if not any(cls.__name__ == "Conv1D" for cls in type(module).__mro__):
        return False
    weight: Tensor | None = module._parameters.get("weight")
    outputs = getattr(module, "nf", None)
    if weight is None:
        from hf_precond.architectures.computed import effective_weight

        weight = effective_weight(module)
    return weight.dim() == 2 and weight.shape[1] == outputs


def is_linear(module: nn.Module) -> bool:
    """Whether a layer computes ``x Wᵀ + b``: ``nn.Linear`` and its like, or ``Conv1D``."""
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        return True
    if not isinstance(getattr(module, "in_features", None), int):
        return False
    from hf_precond.architectures.computed import is_quantised

    return is_quantised(module)


def refusal(weight: Tensor) -> str | None:
    """Why a weight cannot be stepped as a real dense matrix; ``None`` when it can."""
    if weight.is_complex():
        return "complex numbers"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return "quantised"
    if weight.layout != torch.strided:
        return "sparse"
    return None if weight.numel() else "empty"


def is_dense(weight: Tensor) -> bool:
    """Whether a weight can be read entry by entry: it is neither packed nor quantised."""
    return refusal(weight) is None and type(weight).dequantize is Tensor.dequantize


def is_readable(module: nn.Module) -> bool:
    """Whether a linear layer's weight is there, dense and of the shape its sizes announce."""
    weight = module._parameters.get("weight")
    if weight is None or not is_dense(weight):
        from hf_precond.architectures import computed

        return computed.is_readable(module)
    if weight.dim() != 2:
        return False
    if isinstance(module, nn.Linear):
        return tuple(weight.shape) == (module.out_features, module.in_features)
    return is_transposed_linear(module)


def is_known(module: nn.Module) -> bool:
    """Whether a linear layer's weight can be read: :func:`is_readable`, or quantised."""
    if is_readable(module):
        return True
    from hf_precond.architectures.computed import is_quantised

    return is_quantised(module)


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


def layer_of(
    modules: Mapping[str, nn.Module], path: str, attribute: str
) -> tuple[str, nn.Module, str]:
    """The layer whose matrix or vector a parameter is, and as which attribute of it.

    Both are its owner's unless it was pruned or parametrised.

    Args:
        modules: path to module, for the whole model.
        path: of the module that holds the parameter.
        attribute: that holds it.
    """
    if PARAMETRISED in path or attribute.endswith(ORIGINAL):
        from hf_precond.architectures.computed import layer_above, source

        above = layer_above(modules, path, attribute)
        if above is not None and source(*above[1:]) == (modules[path], attribute):
            return above
    return path, modules[path], attribute


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution that computes ``x Wᵀ + b`` at every place."""
    if not isinstance(module, CONVOLUTIONS) or module.groups != 1:
        return False
    weight = module._parameters.get("weight")
    return weight is not None and refusal(weight) is None and weight[0, 0].numel() == 1


def stepped_weight(layer: nn.Module) -> Tensor | None:
    """The parameter that is a layer's matrix; ``None`` where there is none."""
    weight = layer._parameters.get("weight")
    if weight is None:
        from hf_precond.architectures.computed import source

        under = source(layer)
        return None if under is None else getattr(*under)
    return weight


def find_norms(model: nn.Module) -> list[NormParameter]:
    """Every scale and shift of a model's norms, frozen ones too, tied ones once."""
    modules = dict(model.named_modules())
    return [
        NormParameter(f"{path}.{attribute}".lstrip("."), module, attribute)
        for path, module, attribute in owned_parameters(model)
        if is_norm(layer_of(modules, path, attribute)[1]) or attribute in weight_norm_scales(module)
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
    tensor, kind = module._parameters.get(weight), LayerMatrix
    held: dict[str, Any] = {"weight": weight}
    if tensor is None or not is_dense(tensor):
        from hf_precond.architectures import computed

        under = computed.source(module, weight)
        if under is None:
            kind, tensor = computed.ComputedMatrix, None
        else:
            held = {"weight": under[1], "holder": under[0], "effective": weight}
            tensor = getattr(*under)
    trains = tensor is not None and tensor.requires_grad
    vector = getattr(module, "bias", None) if weight == "weight" else None
    joined = (
        bias
        and isinstance(vector, Tensor)
        and vector.dim() == 1
        and ("bias" in module._parameters and vector.requires_grad if trains else True)
    )
    matrix = kind(
        name=name if weight == "weight" else f"{name}.{weight}".lstrip("."),
        module=module,
        bias="bias" if joined else None,
        groups=module.groups if isinstance(module, CONVOLUTIONS) else 1,
        **held,
    )
    shape = matrix.weight_shape
    matrix.stacked = len(shape) == 3 and getattr(module, "num_experts", None) == shape[0]
    if is_transposed_linear(module):
        matrix.layout = "transposed"
    elif len(shape) > 2:
        matrix.layout = "conv"
    return matrix


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
    modules = dict(model.named_modules())
    layers = [module for module in modules.values() if is_layer(module)]
    uses = Counter(id(layer._parameters.get("bias")) for layer in layers)
    matrices = []
    for path, module, attribute in owned_parameters(model):
        parameter = getattr(module, attribute)
        if parameter.dim() < 2 or refusal(parameter) or not parameter.requires_grad:
            continue
        path, module, attribute = layer_of(modules, path, attribute)
        bias = (
            attribute == "weight"
            and is_layer(module)
            and uses[id(module._parameters.get("bias"))] == 1
        )
        matrices.append(layer_matrix(module, path, weight=attribute, bias=bias))
    return matrices


def class_names(module: nn.Module) -> set[str]:
    """The names under which a module's class and its bases may stand in a table."""
    bases = type(module).__mro__
    files = (f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for cls in bases)
    return {cls.__name__ for cls in bases} | set(files)
