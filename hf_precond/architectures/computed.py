"""Layers that compute with another tensor than a parameter: pruned, parametrised, quantised.

What is stepped stays a parameter. Where the layer's weight is that parameter times a mask
(``torch.nn.utils.prune``) or over its largest singular value (``spectral_norm``), its gradient is
that of a linear layer, ``Σ δ xᵀ`` (masked; over σ and less a term of rank one), and a positive
definite preconditioner makes a direction of descent of it: it is the layer's matrix. Of
``weight_norm``, ``orthogonal`` and parametrisations of the user's own this is not so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from hf_precond.architectures.modules import ORIGINAL, is_dense, is_transposed_linear, refusal
from hf_precond.architectures.structure import LayerMatrix

SPECTRAL_NORM = "_SpectralNorm"


@dataclass(eq=False)
class ComputedMatrix(LayerMatrix):
    """A weight that is read, for the factors of its neighbours, and never stepped.

    It is computed from parameters that are no matrix of the layer, or quantised.
    """

    _shape: tuple[int, ...] = ()

    @property
    def weight_parameter(self) -> Tensor:
        """The weight as the layer computes with it now."""
        return effective_weight(self.module, self.weight)

    @property
    def trains(self) -> bool:
        """``False``."""
        return False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        if not self._shape:
            self._shape = _shape_of(self.module, self.weight)
        return self._shape


def source(module: nn.Module, name: str = "weight") -> tuple[nn.Module, str] | None:
    """The parameter that is stepped as the matrix of a layer whose weight is computed from it.

    Args:
        module: the layer.
        name: of the computed tensor.

    Returns:
        What holds the parameter, and its attribute there; ``None`` where there is no such one.
    """
    original = f"{name}{ORIGINAL}"
    marks = (f"{name}_mask", f"{name}_u")  # of pruning, and of the older spectral_norm
    if original in module._parameters and any(mark in module._buffers for mark in marks):
        return module, original
    if parametrize.is_parametrized(module, name):
        parts: Any = module.parametrizations
        if all(type(part).__name__ == SPECTRAL_NORM for part in parts[name]):
            return parts[name], "original"
    return None


def computed_by(module: nn.Module, name: str = "weight") -> str | None:
    """What computes a tensor of a layer, in a few words; ``None`` where it is a parameter."""
    if parametrize.is_parametrized(module, name):
        parts: Any = module.parametrizations
        return " and ".join(type(part).__name__.lstrip("_") for part in parts[name])
    if f"{name}_mask" in module._buffers:
        return "pruning"
    if any(isinstance(h, WeightNorm) and h.name == name for h in _pre_hooks(module)):
        return "weight_norm"
    return "spectral_norm" if f"{name}{ORIGINAL}" in module._parameters else None


def _pre_hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def layer_above(
    modules: Mapping[str, nn.Module], path: str, attribute: str
) -> tuple[str, nn.Module, str] | None:
    """The layer that computes one of its tensors from a parameter.

    Args:
        modules: path to module, for the whole model.
        path: of the module that holds the parameter.
        attribute: that holds it.

    Returns:
        Path, layer, and the attribute with what is computed; ``None`` for other parameters.
    """
    module = modules[path]
    if isinstance(module, parametrize.ParametrizationList):
        layer, _, name = path.rpartition(".")
        layer = layer.rpartition("parametrizations")[0].rstrip(".")
        return layer, modules[layer], name
    name, _, suffix = attribute.rpartition("_")
    if suffix in ("orig", "g", "v") and computed_by(module, name) is not None:
        return path, module, name
    return None


def successors(module: nn.Module, attribute: str) -> list[Tensor]:
    """What a module holds in the place of a parameter that it held under another name.

    Args:
        module: the module, whose parameter was pruned or parametrised, or is so no more.
        attribute: that held it.
    """
    name = attribute
    for suffix in (ORIGINAL, "_g", "_v"):
        name = name.removesuffix(suffix)
    names = (name, f"{name}{ORIGINAL}", f"{name}_g", f"{name}_v")
    found = [module._parameters.get(held) for held in names]
    if parametrize.is_parametrized(module, name):
        parts: Any = module.parametrizations
        found += parts[name].parameters()
    return [parameter for parameter in found if parameter is not None]


def moved_weight(matrix: LayerMatrix) -> Tensor:
    """The weight of a matrix whose layer was pruned or parametrised, or is so no more."""
    name = matrix.effective or matrix.weight
    held = matrix.module._parameters.get(name)
    if held is not None:
        return held
    under = source(matrix.module, name)
    return effective_weight(matrix.module, name) if under is None else getattr(*under)


def effective_step(matrix: LayerMatrix, step: Tensor) -> Tensor:
    """What a step of a matrix changes of the weight that its layer computes with.

    Args:
        matrix: pruned, spectrally normed, or plain.
        step: ``[out, in(+1)]``.
    """
    if matrix.effective is None:
        return step
    if matrix.mask is not None:
        kept = matrix.join(matrix.mask, None)
        kept[:, matrix.shape[1] :] = 1
        return step * kept.to(step)
    held, made = matrix.weight_parameter, effective_weight(matrix.module, matrix.effective)
    norms = [torch.linalg.vector_norm(tensor.detach().to(step)) for tensor in (made, held)]
    scaled = step * (norms[0] / norms[1].clamp(min=torch.finfo(step.dtype).tiny))
    return torch.cat([scaled[:, : matrix.shape[1]], step[:, matrix.shape[1] :]], 1)


def effective_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A tensor as a layer computes with it, detached; reading it changes nothing.

    Args:
        module: the layer.
        name: of the tensor.
    """
    with torch.no_grad():
        if parametrize.is_parametrized(module, name):
            parts: Any = module.parametrizations
            return _in_evaluation(parts[name])
        if f"{name}_mask" in module._buffers:
            return getattr(module, f"{name}{ORIGINAL}") * getattr(module, f"{name}_mask")
        if is_quantised(module):
            return _dequantised(module)
        weight: Tensor = getattr(module, name)
        return weight.detach()


def _in_evaluation(parts: Any) -> Tensor:
    """What parametrisations compute; in training mode ``spectral_norm`` changes its buffers."""
    training = [module for module in parts.modules() if module.training]
    for module in training:
        module.training = False
    try:
        result: Tensor = parts()
        return result
    finally:
        for module in training:
            module.training = True


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear layer that keeps its weight quantised, of whichever package."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) for size in sizes):
        return False
    held = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return any(not is_dense(t) and refusal(t) in (None, "quantised") for t in held)


def _dequantised(module: nn.Module) -> Tensor:
    """``[out, in]`` of a quantised linear layer: its package's, or its outputs of the identity."""
    weight: Any = module._parameters.get("weight")
    if weight is not None and refusal(weight) is None:
        return weight.dequantize()
    layer: Any = module
    if callable(getattr(layer, "dequantize", None)):
        found = layer.dequantize()
        if isinstance(found, Tensor) and tuple(found.shape) == _shape_of(layer, "weight"):
            return found
    held = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    stated = getattr(layer, "compute_dtype", None)
    dense = [t.dtype for t in held if t.is_floating_point() and t.element_size() > 1]
    dtype = stated if isinstance(stated, torch.dtype) else next(iter(dense), torch.float32)
    eye = torch.eye(layer.in_features, dtype=dtype, device=held[0].device)
    outputs: Tensor = layer.forward(eye)  # its hooks are not for this
    bias = getattr(layer, "bias", None)
    return (outputs if bias is None else outputs - bias.to(outputs.dtype)).mT


def _shape_of(module: nn.Module, name: str) -> tuple[int, ...]:
    if name == "weight" and is_quantised(module):
        layer: Any = module
        return layer.out_features, layer.in_features
    return tuple(effective_weight(module, name).shape)


def is_readable(module: nn.Module) -> bool:
    """Whether the computed weight of a linear layer has the shape that its sizes announce."""
    if is_quantised(module):
        return False
    if computed_by(module) is None and not isinstance(getattr(module, "weight", None), Tensor):
        return False
    weight = effective_weight(module)
    if weight.dim() != 2 or not is_dense(weight):
        return False
    if isinstance(module, nn.Linear):
        return tuple(weight.shape) == (module.out_features, module.in_features)
    return is_transposed_linear(module)
