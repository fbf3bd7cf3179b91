"""Numbers drawn on the CPU, sent to where they are needed."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(numbers: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A CPU tensor in a dtype and on a device; a GPU is not waited for.

    A copy from pageable memory would make the host wait for all that is queued
    on the GPU, so it goes through pinned memory, which the allocator keeps
    until the copy is done.

    Args:
        numbers: on the CPU.
        device: where they are needed.
        dtype: theirs from then on.
    """
    if device.type != "cuda":
        return numbers.to(device=device, dtype=dtype)
    staged = torch.empty(numbers.shape, dtype=dtype, pin_memory=True)
    return staged.copy_(numbers).to(device, non_blocking=True)
