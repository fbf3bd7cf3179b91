"""What enters or leaves a layer as rows: one a token or output position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_precond.architectures.modules import CONVOLUTIONS
from hf_precond.architectures.structure import LayerMatrix


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """The patches that a convolution multiplies its kernels with.

    Ordered as the kernel is: ``sum over rows of δᵀ a`` with δ the output
    gradient's rows is the gradient of ``weight.flatten(1)``, for any stride,
    padding (``"same"`` and every padding mode too) and dilation.

    Args:
        module: a Conv1d, Conv2d or Conv3d.
        inputs: ``[N, C, …]``, or ``[C, …]``.

    Returns:
        ``[groups, N · positions, C / groups · kernel]``.
    """
    assert isinstance(module, CONVOLUTIONS)
    dimensions = len(module.kernel_size)
    if inputs.dim() == dimensions + 1:
        inputs = inputs.unsqueeze(0)
    # F.pad counts from the last dimension, as the module's own padding list does.
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs, padding, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        window = (size - 1) * dilation + 1
        inputs = inputs.unfold(2 + axis, window, stride)[..., ::dilation]
    # [N, C, positions…, kernel…] -> [N, groups, C / groups, positions…, kernel…]
    inputs = inputs.unflatten(1, (module.groups, -1))
    places, kernel = range(3, 3 + dimensions), range(3 + dimensions, 3 + 2 * dimensions)
    inputs = inputs.permute(1, 0, *places, 2, *kernel)
    return inputs.flatten(2 + dimensions).flatten(1, 1 + dimensions)


def output_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """An output gradient as ``[rows, out]``."""
    if isinstance(module, CONVOLUTIONS):
        dimensions = len(module.kernel_size)
        channel = gradient.dim() - dimensions - 1
        return gradient.movedim(channel, -1).flatten(0, -2)
    return gradient.unsqueeze(0) if gradient.dim() == 1 else gradient.flatten(0, -2)


def select_outputs(matrix: LayerMatrix, rows: Tensor) -> Tensor:
    """The columns of ``[rows, out]`` that are a fused weight's part."""
    if matrix.rows is None:
        return rows
    return matrix.rows.view(rows.mT).reshape(matrix.rows.rows, -1).mT


def input_of(
    module: nn.Module, matrix: LayerMatrix, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """What a call brings to a matrix of a module: the layer's own input in most layers.

    A vector alone is one row.
    """
    if isinstance(module, nn.MultiheadAttention):
        place = {"q": 0, "k": 1, "v": 2}[multihead_role(matrix)]
        name = ("query", "key", "value")[place]
        value = args[place] if len(args) > place else kwargs.get(name)
    else:
        value = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(value, Tensor):
        return None
    return value.unsqueeze(0) if value.dim() == 1 else value


def multihead_role(matrix: LayerMatrix) -> str:
    return matrix.part or matrix.weight[0]


def multihead_inner(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The heads' values side by side, which enter ``out_proj`` without a call to it.

    Computed again (without dropout), because ``nn.MultiheadAttention`` hands
    the weight of ``out_proj`` to one fused function.
    """
    options = _positional(args[4:], dict(kwargs)) | {"need_weights": False}
    output, _ = type(module).forward(_without_output(module), *args[:4], **options)
    return output


def _positional(rest: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments behind ``key_padding_mask``, by name."""
    names = ("need_weights", "attn_mask", "average_attn_weights", "is_causal")
    return dict(zip(names, rest, strict=False)) | options


def _without_output(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """A twin that shares the weights, its output projection the identity."""
    twin = nn.MultiheadAttention.__new__(type(module))
    nn.Module.__init__(twin)
    public = {name: value for name, value in module.__dict__.items() if not name.startswith("_")}
    twin.__dict__.update(public)
    twin._qkv_same_embed_dim = module._qkv_same_embed_dim
    for name, parameter in module._parameters.items():
        twin.register_parameter(name, parameter)
    weight = module.out_proj.weight
    identity = nn.Linear(module.embed_dim, module.embed_dim, bias=False, device="meta")
    eye = torch.eye(module.embed_dim, device=weight.device, dtype=weight.dtype)
    identity.weight = nn.Parameter(eye, requires_grad=False)
    twin.register_module("out_proj", identity)
    twin.dropout = 0.0
    return twin


def multihead_weights(
    module: nn.MultiheadAttention, role: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Token weights from ``key_padding_mask``, shaped like the input's leading dimensions.

    Those of keys and values; of queries and outputs too where the queries are
    the keys (self-attention). ``None`` where nothing is said.
    """
    mask = args[3] if len(args) > 3 else kwargs.get("key_padding_mask")
    query, key = (
        args[place] if len(args) > place else kwargs.get(name)
        for place, name in enumerate(("query", "key"))
    )
    if mask is None or (role in "qo" and query is not key):
        return None
    kept = ~mask if mask.dtype == torch.bool else mask == 0
    return kept if module.batch_first or kept.dim() == 1 else kept.mT
