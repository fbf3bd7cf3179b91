"""Entropy of attention weights, from what a kernel was called with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_precond.statistics.attention_heads import Call


def spaced(length: int, rows: int) -> slice:
    """Returns at most ``rows`` evenly spaced positions.

    Args:
        length: how many positions there are.
        rows: at most so many; 0 for all.
    """
    return slice(None, None, -(-length // rows) if rows else 1)


def entropies(module: nn.Module, call: Call, positions: slice) -> Tensor:
    """Returns ``-Σ_j p_ij log p_ij`` in nats at R query positions, ``[B, H, R]``.

    The weights are the softmax of the logits before dropout, masked as the
    kernel masks them.

    Args:
        module: the attention.
        call: what its kernel was called with.
        positions: which queries.

    Raises:
        RuntimeError: the mask is not a tensor (flex attention).
    """
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query, key = call.query[:, :, positions].to(dtype), call.key.to(dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scaling = call.options.get("scaling")
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap = call.options.get("softcap")
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    bias = call.options.get("position_bias")
    if isinstance(bias, Tensor):
        logits = logits + _rows(bias, positions).to(dtype)
    logits = _masked(module, call, positions, logits)
    sinks = call.options.get("s_aux")
    if isinstance(sinks, Tensor):
        column = sinks.to(dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def _rows(mask: Tensor, positions: slice) -> Tensor:
    """The rows of these positions in ``[…, N, M]``, where there is one per position."""
    return mask if mask.shape[-2] == 1 else mask[..., positions, :]


def _masked(module: nn.Module, call: Call, positions: slice, logits: Tensor) -> Tensor:
    mask, length, memory = call.mask, call.query.shape[2], logits.shape[-1]
    lowest = torch.finfo(logits.dtype).min
    if mask is not None and not isinstance(mask, Tensor):
        raise RuntimeError(
            f"attention_entropy: the mask of {call.kernel} ({type(mask).__name__}) cannot be read; "
            "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2', or "
            "set attention_entropy=False."
        )
    if mask is not None and mask.dim() == 4:
        rows = _rows(mask, positions)[..., :memory]
        return logits.masked_fill(~rows, lowest) if rows.dtype == torch.bool else logits + rows
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, -memory:].bool(), lowest)
    if call.kernel.startswith("eager") or length == 1:
        return logits
    ahead = torch.arange(memory, device=logits.device) - (
        torch.arange(length, device=logits.device)[positions, None] + memory - length
    )
    causal = call.options.get("is_causal")
    if getattr(module, "is_causal", True) if causal is None else causal:
        logits = logits.masked_fill(ahead > 0, lowest)
    window = call.options.get("sliding_window")
    return logits if window is None else logits.masked_fill(ahead.abs() >= window, lowest)
