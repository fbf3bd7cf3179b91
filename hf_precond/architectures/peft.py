"""Reads PEFT's wrappers, told by their looks: LoRA layers and saved modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_precond.architectures.modules import is_linear, is_readable, layer_matrix
from hf_precond.architectures.structure import Adapter, LayerMatrix, RowSelection


def unwrap(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The layer inside PEFT's wrappers (tuner layers, saved modules), and its path."""
    while True:
        inner = getattr(module, "base_layer", None)
        saved = getattr(module, "modules_to_save", None)
        if isinstance(inner, nn.Module):
            module, name = inner, f"{name}.base_layer"
        elif isinstance(saved, nn.ModuleDict):
            chosen = next((key for key in _active(module, saved) if key in saved), None)
            if chosen is None:
                return module, name
            module, name = saved[chosen], f"{name}.modules_to_save.{chosen}"
        else:
            return module, name


def _active(wrapper: nn.Module, choices: nn.ModuleDict) -> list[str]:
    """Keys of the adapters that a wrapper uses now."""
    active: Any = getattr(wrapper, "active_adapters", None)
    return list(active or choices)


def base_of(model: nn.Module) -> nn.Module:
    """The model inside what is wrapped around it (compilation, DDP, PEFT), or the model itself."""
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


def wrappers_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each wrapped base layer to the tuner layer around it."""
    wrappers: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, nn.Module):
            wrappers[layer] = module
    return wrappers


def find_adapter(
    wrapper: nn.Module, name: str, rows: RowSelection | None = None
) -> Adapter | None:
    """The LoRA pair of a tuner layer that trains, or ``None``.

    The plain form ``W + scaling · B A`` counts, and DoRA's; a pair varied
    otherwise is not one.

    Args:
        wrapper: the tuner layer.
        name: its path.
        rows: the rows of B, where the wrapped weight is fused.
    """
    downs, ups = getattr(wrapper, "lora_A", None), getattr(wrapper, "lora_B", None)
    if not isinstance(downs, nn.ModuleDict) or not isinstance(ups, nn.ModuleDict):
        return None
    for key in _active(wrapper, downs):
        magnitude = _magnitude(wrapper, key)
        varied = magnitude is None and _is_varied(wrapper, key)
        if key not in downs or key not in ups or varied:
            continue
        down, up = downs[key], ups[key]
        if not (is_linear(down) and is_linear(up) and is_readable(down) and is_readable(up)):
            continue
        if not (down.weight.requires_grad or up.weight.requires_grad):
            continue
        upper = layer_matrix(up, f"{name}.lora_B.{key}")
        if rows is not None:
            upper.rows = rows
        return Adapter(
            down=layer_matrix(down, f"{name}.lora_A.{key}", bias=False),
            up=upper,
            scaling=float(getattr(wrapper, "scaling", {}).get(key, 1.0)),
            magnitude=magnitude,
        )
    return None


def _is_varied(wrapper: nn.Module, key: str) -> bool:
    dora = getattr(wrapper, "use_dora", {})
    variants = getattr(wrapper, "lora_variant", {})
    return bool(dora.get(key)) or key in variants


def _magnitude(wrapper: nn.Module, key: str) -> nn.Module | None:
    """The module with DoRA's magnitudes, one a row, where the pair is DoRA's."""
    vectors = getattr(wrapper, "lora_magnitude_vector", None)
    variants: Any = getattr(wrapper, "lora_variant", {})
    if not isinstance(vectors, nn.ModuleDict) or key not in vectors:
        return None
    if key in variants and not type(variants[key]).__name__.startswith("DoraLinear"):
        return None
    weight = getattr(vectors[key], "weight", None)
    return vectors[key] if isinstance(weight, Tensor) and weight.dim() == 1 else None


def trains(matrix: LayerMatrix) -> bool:
    """Whether a matrix's weight trains."""
    return matrix.weight_parameter.requires_grad
