"""The loss scale of float16 training."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_scale(scaler: torch.amp.GradScaler | None) -> Tensor | float | None:
    """What a loss scaler multiplies the loss with now; ``None`` where none is at work.

    The tensor, where it exists: ``get_scale()`` waits for the device.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor | None = getattr(scaler, "_scale", None)
    return scaler.get_scale() if scale is None else scale
