"""What is inside PEFT's wrappers: layers, LoRA pairs, modules that are saved whole.

The wrappers are recognised by their attributes, which were read in PEFT 0.18
to 0.21. PEFT is not imported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_precond.architectures.modules import (
    is_linear,
    is_readable,
    is_transposed_linear,
    layer_matrix,
)
from hf_precond.architectures.structure import LowRankAdapter, RowSelection


def unwrap(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The layer inside a tuner layer or a saved module, and its path.

    Args:
        module: the wrapper, or a layer without one.
        name: its path.
    """
    while True:
        inner = getattr(module, "base_layer", None)
        saved = getattr(module, "modules_to_save", None)
        if isinstance(inner, nn.Module):
            module, name = inner, f"{name}.base_layer"
        elif isinstance(saved, nn.ModuleDict):
            active = next((key for key in _active(module, saved) if key in saved), None)
            if active is None:
                return module, name
            module, name = saved[active], f"{name}.modules_to_save.{active}"
        else:
            return module, name


def wrappers_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each wrapped layer to the tuner layer around it."""
    layers = ((getattr(module, "base_layer", None), module) for module in model.modules())
    return {layer: wrapper for layer, wrapper in layers if isinstance(layer, nn.Module)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that tuner layers add to the layers inside them."""
    added = []
    for module in model.modules():
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, nn.Module):
            inside = {id(parameter) for parameter in layer.parameters()}
            added += [p for p in module.parameters() if id(p) not in inside]
    return added


def saved_names(model: nn.Module, vocabulary: nn.Module | None) -> set[str]:
    """Names of the parameters that PEFT trains whole (``modules_to_save``).

    Args:
        model: the model.
        vocabulary: its output embeddings, which are left out, as input embeddings are: they are
            not new.
    """
    names: set[str] = set()
    for path, module in model.named_modules():
        saved = getattr(module, "modules_to_save", None)
        original = getattr(module, "original_module", None)
        old = isinstance(original, nn.Embedding) or (
            vocabulary is not None and vocabulary in (module, original)
        )
        if isinstance(saved, nn.ModuleDict) and not old:
            names |= {
                f"{path}.modules_to_save.{name}"
                for name, parameter in saved.named_parameters()
                if parameter.requires_grad
            }
    return names


def find_adapter(
    wrapper: nn.Module, name: str, rows: RowSelection | None = None
) -> LowRankAdapter | None:
    """The LoRA pairs of a tuner layer that train.

    The plain form ``W + scaling · B A`` counts, and DoRA's; a pair of another
    form is not one.

    Args:
        wrapper: the tuner layer, or a layer without one.
        name: its path.
        rows: the rows of B, where the wrapped weight is fused.

    Returns:
        The pair of the first active adapter that trains, those of other active ones beside it;
        ``None`` where none trains.
    """
    downs, ups = getattr(wrapper, "lora_A", None), getattr(wrapper, "lora_B", None)
    if not isinstance(downs, nn.ModuleDict) or not isinstance(ups, nn.ModuleDict):
        return None
    layer = getattr(wrapper, "base_layer", None)
    if hasattr(wrapper, "parameter_name") and layer is not None and is_transposed_linear(layer):
        return None  # of target_parameters, whose A then meets the layer's outputs
    pairs: list[LowRankAdapter] = []
    for key in dict.fromkeys(_active(wrapper, downs)):
        magnitude = _magnitude(wrapper, key)
        if key not in downs or key not in ups or (magnitude is None and _is_varied(wrapper, key)):
            continue
        down, up = downs[key], ups[key]
        if not (is_linear(down) and is_linear(up) and is_readable(down) and is_readable(up)):
            continue
        upper = layer_matrix(up, f"{name}.lora_B.{key}")
        if rows is not None:
            upper.rows = rows
        pairs.append(
            LowRankAdapter(
                down=layer_matrix(down, f"{name}.lora_A.{key}", bias=False),
                up=upper,
                scaling=float(getattr(wrapper, "scaling", {}).get(key, 1.0)),
                magnitude=magnitude,
            )
        )
    pairs.sort(key=lambda pair: not (pair.down.trains or pair.up.trains))
    if not pairs or not (pairs[0].down.trains or pairs[0].up.trains):
        return None
    pairs[0].beside = tuple(pairs[1:])
    return pairs[0]


def _active(wrapper: nn.Module, choices: nn.ModuleDict) -> list[str]:
    """Keys of the adapters that a wrapper uses now."""
    active: Any = getattr(wrapper, "active_adapters", None)
    return list(active or choices)


def _is_varied(wrapper: nn.Module, key: str) -> bool:
    """Whether a pair enters the layer in another form than ``W + scaling · B A``."""
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
