"""Finds the channel-wise parameters of a model: scales and shifts of its norms."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.weight_norm import WeightNorm

from hf_precond.architectures.structure import NormParameter

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
