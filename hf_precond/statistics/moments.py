"""Second moments of what enters and leaves a layer, and their running averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_precond.architectures.modules import CONVOLUTIONS
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.compat import devices
from hf_precond.compat.torch_internals import padding_for_pad
from hf_precond.linalg.products import averaging_weight, padded
from hf_precond.statistics.requests import CurvatureRequest, MomentRequest, Statistic

HALF = (torch.bfloat16, torch.float16)
ROWS = 4096
"""Rows of a call that enter a moment on accelerators, at most, where nothing else is said."""
GOLDEN = (5**0.5 - 1) / 2
_PATCHES = 2**24  # entries of a convolution's patches that are laid out at once


def request_shape(request: MomentRequest | CurvatureRequest) -> tuple[int, ...]:
    """Returns the shape of the statistic that answers a request.

    Args:
        request: the request.
    """
    if isinstance(request, CurvatureRequest):
        return tuple(request.norm.parameter.shape)
    stack = request.matrix.stack
    if request.kind == "output_grad":
        return (*stack, *(request.matrix.shape[0],) * 2)
    if request.kind == "input" or request.attention is None:
        columns = request.matrix.columns
        if request.blocks > 1:
            width = -(-columns // request.blocks)
            return (*stack, request.blocks, width, width)
        return (*stack, columns, columns)
    heads = request.attention.heads
    if request.kind == "entropy":
        return (heads.query,)
    count = heads.query if request.kind == "query" else heads.key_value
    return (count, heads.size, heads.size)


# Second moments of rows -------------------------------------------------------


def as_rows(tensor: Tensor, dtype: torch.dtype, low: torch.dtype | None = None) -> Tensor:
    """Returns activations or gradients as their moment is taken of them.

    Half precision stays as it is where a device sums its products in float32: the moment is that
    of the same numbers, at a fraction of the cost. So are float32 numbers that the layer rounds
    to half precision, as those that a norm returns under autocast. Otherwise they are converted.

    Args:
        tensor: activations or gradients.
        dtype: of the moment.
        low: what the layer's own product rounds them to; ``None`` for nothing.
    """
    tensor = tensor.detach()
    if dtype == torch.float32 and devices.accumulates(tensor.device):
        if tensor.dtype in HALF:
            return tensor
        if low in HALF and tensor.dtype == torch.float32:
            return tensor.to(low)
    return tensor.to(dtype)


def rows_of(rows: int | None, like: Tensor) -> int:
    """Returns how many rows of a call enter a moment, at most; 0 for all.

    Args:
        rows: what a config says; ``None`` for all on CPUs, :data:`ROWS` on accelerators, whose
            batches are so large that further rows cost more than they tell.
        like: on the device.
    """
    if rows is None:
        return ROWS if devices.is_accelerator(like) else 0
    return rows


def moment_dtype(rows: Tensor) -> torch.dtype:
    """The dtype in which the moment of rows is summed.

    Args:
        rows: the rows.
    """
    return torch.float32 if rows.dtype in HALF else rows.dtype


def weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Returns rows times their weights.

    Args:
        rows: ``[…, n, d]``.
        weights: ``[…, n]``, or ``None`` for ones.
    """
    return rows if weights is None else rows * weights.to(rows.dtype).unsqueeze(-1)


def count_of(rows: int, weights: Tensor | None, like: Tensor) -> Tensor:
    """Returns the (weighted) number of rows as a new 0-d tensor; nothing is read from the device.

    Args:
        rows: their number.
        weights: their weights, or ``None`` for ones.
        like: of the dtype and device wanted.
    """
    return like.new_full((), rows) if weights is None else weights.sum().to(like.dtype)


def moment(rows: Tensor, weights: Tensor | None = None, constant: bool = False) -> Tensor:
    """Returns ``Σ_i w_i x̂_i x̂_iᵀ``, ``[d, d]`` (``[d + 1, d + 1]`` with the constant).

    Args:
        rows: x, ``[n, d]``.
        weights: w, ``[n]``, or ``None`` for ones.
        constant: put a 1 behind every row.
    """
    if rows.dtype in HALF:
        return _half_moments(rows, weights, constant, 1)[0]
    product = weighted(rows, weights).mT @ rows
    if not constant:
        return product
    size = rows.shape[-1]
    result = product.new_empty(size + 1, size + 1)
    result[:size, :size] = product
    result[size, :size] = (rows.new_ones(len(rows)) if weights is None else weights) @ rows
    result[:size, size] = result[size, :size]
    result[size, size].copy_(count_of(len(rows), weights, product))
    return result


def block_moment(rows: Tensor, weights: Tensor | None, constant: bool, blocks: int) -> Tensor:
    """Returns the diagonal blocks of :func:`moment` and computes nothing else.

    Args:
        rows: ``[n, d]``.
        weights: ``[n]``, or ``None`` for ones.
        constant: put a 1 behind every row.
        blocks: their number.

    Returns:
        ``[blocks, w, w]``, ``w = ceil(columns / blocks)``, zeros beyond the
        last column.
    """
    if rows.dtype in HALF:
        return _half_moments(rows, weights, constant, blocks)
    columns = rows.shape[-1] + constant
    width = -(-columns // blocks)
    result = rows.new_zeros(blocks, width, width, dtype=moment_dtype(rows))
    for number, start in enumerate(range(0, columns, width)):
        size = min(width, columns - start)
        last = constant and start + size == columns
        part = rows[:, start : start + size]
        result[number, :size, :size] = moment(part, weights, last)
    return result


def _half_moments(rows: Tensor, weights: Tensor | None, constant: bool, blocks: int) -> Tensor:
    """:func:`block_moment` of half-precision rows, summed in float32, in one product.

    The constant stands in the rows, and blocks are as wide as tensor cores read fast: that takes a
    third of the launches of sums and copies of parts.
    """
    size = rows.shape[-1]
    columns = size + constant
    width = -(-columns // blocks)
    wide = width if columns == size and blocks == 1 else padded(width)
    if blocks == 1 and wide == size:
        laid = rows.unsqueeze(1)
    else:  # what lies beyond a block's width is cut off from the product
        laid = rows.new_empty(len(rows), blocks, wide)
        whole, rest = divmod(size, width)
        if whole:
            laid[:, :whole, :width] = rows[:, : whole * width].unflatten(1, (whole, width))
        if rest:
            laid[:, whole, :rest] = rows[:, whole * width :]
        if constant:
            laid[:, whole, rest] = 1
        end, used = divmod(columns, width)
        if end < blocks:
            laid[:, end, used:] = 0
            laid[:, end + 1 :] = 0
    left = laid if weights is None else laid * weights.to(laid.dtype)[:, None, None]
    sides = left.permute(1, 2, 0), laid.transpose(0, 1)
    result = torch.bmm(*sides, out_dtype=torch.float32)[:, :width, :width]
    if constant and weights is not None:  # which are rounded in the product
        block, place = divmod(size, width)
        result[block, place, place].copy_(weights.sum())
    return result


@dataclass
class Collection:
    """A sum of second moments over the calls of a layer; it may serve several requests.

    Args:
        kind: ``input`` or ``output_grad``.
        matrix: a matrix whose input or output gradient it is.
        constant: a 1 stands behind every row.
        blocks: number of diagonal blocks; 1 for the whole moment.
        rows: at most so many rows of a call enter; 0 for all.
        scale: of output gradients.
        reached: of inputs whose output has a gradient alone.
    """

    kind: str
    matrix: LayerMatrix
    constant: bool = False
    blocks: int = 1
    rows: int = 0
    scale: float = 1.0
    reached: bool = False

    @property
    def variant(self) -> tuple[bool, int, int]:
        """What two collections must have in common to have the same moment of the same input."""
        return self.constant, self.blocks, self.rows


def thinned(rows: Tensor, limit: int, step: int) -> Tensor:
    """Returns a view of at most ``limit`` rows, evenly spaced, from another start each step.

    The starts of successive steps spread by the golden ratio, so that no
    multiple of a sequence's length selects the same positions again and again.

    Args:
        rows: ``[n, …]``.
        limit: at most so many; 0 for all.
        step: the optimizer's step.
    """
    if not limit or len(rows) <= limit:
        return rows
    stride = -(-len(rows) // limit)
    return rows[int(stride * (step * GOLDEN % 1)) :: stride]


def second_moment(
    collection: Collection,
    rows: Tensor,
    weights: Tensor | None,
    step: int = 0,
    prepare: Callable[[Tensor], Tensor] = torch.detach,
) -> Statistic:
    """Returns what the rows of one call add to a collection.

    Args:
        collection: the collection.
        rows: inputs or output gradients, ``[…, T, d]``, each leading index a sequence.
        weights: of the tokens, ``[…, T]`` or flat; those of output gradients only count.
        step: the optimizer's step; it chooses the rows where not all enter.
        prepare: converts the rows that enter, entry by entry.
    """
    rows = prepare(thinned(rows.flatten(0, -2), collection.rows, step))
    if weights is not None:
        weights = thinned(weights.flatten(), collection.rows, step)
    count = count_of(len(rows), weights, rows.new_empty(0, dtype=moment_dtype(rows)))
    if collection.kind == "output_grad":
        rows, weights = select_outputs(collection.matrix, rows), None
    if collection.blocks > 1:
        blocks = block_moment(rows, weights, collection.constant, collection.blocks)
        return Statistic(blocks, count)
    return Statistic(moment(rows, weights, collection.constant), count)


def patch_moment(
    collection: Collection, layer: nn.Module, inputs: Tensor, step: int = 0
) -> Statistic:
    """Returns what a convolution's patches add, part of the batch by part to bound memory.

    Args:
        collection: the collection.
        layer: the convolution.
        inputs: what it was called with.
        step: the optimizer's step.
    """
    assert isinstance(layer, CONVOLUTIONS)
    size = len(inputs)
    if inputs.dim() == layer.weight.dim():
        enlarged = inputs[:1].numel() * layer.weight[0, 0].numel()
        size = max(1, _PATCHES // max(1, enlarged))
    result: Statistic | None = None
    for part in inputs.split(size):
        limit = -(-collection.rows * len(part) // max(1, len(inputs)))
        term = second_moment(replace(collection, rows=limit), patches(layer, part), None, step)
        if result is None:
            result = term
        else:
            result.sum.add_(term.sum)
            result.count.add_(term.count)
    assert result is not None
    return result


# Rows of layers ---------------------------------------------------------------


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Returns the patches that a convolution multiplies its kernels with.

    Ordered as the kernel is: ``sum over rows of δᵀ a`` with δ the output
    gradient's rows is the gradient of ``weight.flatten(1)``, for any stride,
    padding (``"same"`` and every padding mode too) and dilation.

    Args:
        layer: a Conv1d, Conv2d or Conv3d.
        inputs: ``[N, C, …]``, or ``[C, …]``.

    Returns:
        ``[groups, N · positions, C / groups · kernel]``.
    """
    assert isinstance(layer, CONVOLUTIONS)
    dimensions = len(layer.kernel_size)
    if inputs.dim() == dimensions + 1:
        inputs = inputs.unsqueeze(0)
    padding = padding_for_pad(layer)
    if any(padding):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, padding, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        window = (size - 1) * dilation + 1
        inputs = inputs.unfold(2 + axis, window, stride)[..., ::dilation]
    # [N, C, positions…, kernel…] -> [N, groups, C / groups, positions…, kernel…]
    inputs = inputs.unflatten(1, (layer.groups, -1))
    places, kernel = range(3, 3 + dimensions), range(3 + dimensions, 3 + 2 * dimensions)
    inputs = inputs.permute(1, 0, *places, 2, *kernel)
    return inputs.flatten(2 + dimensions).flatten(1, 1 + dimensions)


def output_rows(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Returns an output gradient as ``[rows, out]``.

    Args:
        layer: the layer.
        gradient: of its output.
    """
    if isinstance(layer, CONVOLUTIONS):
        channel = gradient.dim() - len(layer.kernel_size) - 1
        return gradient.movedim(channel, -1).flatten(0, -2)
    return gradient.unsqueeze(0) if gradient.dim() == 1 else gradient.flatten(0, -2)


def select_outputs(matrix: LayerMatrix, rows: Tensor) -> Tensor:
    """Returns the columns of ``[rows, out]`` that belong to a matrix of a fused weight.

    Args:
        matrix: the matrix.
        rows: outputs, or their gradients, of its layer.
    """
    if matrix.rows is None:
        return rows
    return matrix.rows.view(rows.mT).reshape(matrix.rows.rows, -1).mT


def multihead_role(matrix: LayerMatrix) -> str:
    """Returns ``q``, ``k``, ``v`` or ``o``: which projection of ``nn.MultiheadAttention`` it is.

    Args:
        matrix: the projection.
    """
    if isinstance(matrix.module, nn.MultiheadAttention):
        return matrix.part or matrix.weight[0]
    return "o"


def multihead_input(
    layer: nn.MultiheadAttention, role: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor | None]:
    """Returns what enters a projection of ``nn.MultiheadAttention``, and its tokens' weights.

    The weights come from ``key_padding_mask``, for queries and outputs only
    in self-attention; ``None`` where no mask applies.

    Args:
        layer: the attention.
        role: ``q``, ``k``, ``v`` or ``o``.
        args: the positional arguments of its call.
        kwargs: the others.
    """
    names = ("query", "key", "value", "key_padding_mask")
    given = dict(zip(names, args, strict=False)) | kwargs
    mask, weights = given.get("key_padding_mask"), None
    if mask is not None and (role in "kv" or given["query"] is given["key"]):
        kept = ~mask if mask.dtype == torch.bool else mask == 0
        weights = kept if layer.batch_first or kept.dim() == 1 else kept.mT
    if role == "o":
        return multihead_inner(layer, args, kwargs), weights
    return given[{"q": "query", "k": "key", "v": "value"}[role]], weights


def multihead_inner(
    layer: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Returns the heads' values side by side, which enter ``out_proj``.

    Computed again (without dropout), because ``nn.MultiheadAttention`` hands
    the weight of ``out_proj`` to one fused function.

    Args:
        layer: the attention.
        args: the positional arguments of its call.
        kwargs: the others.
    """
    names = ("need_weights", "attn_mask", "average_attn_weights", "is_causal")
    options = dict(zip(names, args[4:], strict=False)) | kwargs | {"need_weights": False}
    weight = next(layer.parameters())
    identity = nn.Linear(layer.embed_dim, layer.embed_dim, bias=False, device="meta")
    eye = torch.eye(layer.embed_dim, device=weight.device, dtype=weight.dtype)
    identity.weight = nn.Parameter(eye, requires_grad=False)
    kind, held = type(layer), layer.__dict__ | {"dropout": 0.0}
    parametrised: Any = layer._modules.get("parametrizations")
    if parametrised is not None:  # its class computes these weights in properties
        from hf_precond.architectures.computed import effective_weight

        kind = kind.__mro__[1]
        held |= {name: effective_weight(layer, name) for name in parametrised}
    twin = kind.__new__(kind)
    twin.__dict__ = held | {"_modules": {"out_proj": identity}}
    # Not a call: the user's hooks are those of the layer.
    output, _ = kind.forward(twin, *args[:4], **options)
    return output


# Running averages --------------------------------------------------------------


def mean_of(total: Tensor, count: Tensor) -> Tensor:
    """Returns ``total / count``; not finite where nothing was counted.

    Args:
        total: a sum.
        count: what it is divided by.
    """
    return total / count.to(total.dtype)


def update_moments(
    moments: Sequence[Tensor], updates: Sequence[Tensor], means: Tensor, decay: float
) -> Tensor:
    """Updates running averages in place: ``A ← b A + (1 - b) mean``.

    b is :func:`averaging_weight`. A mean that is not finite changes nothing and
    counts nothing. Nothing is read from the device.

    Args:
        moments: A, n tensors of one shape, of one dimension or more.
        updates: k of each, the updates so far: 0-d tensors, increased by 1.
        means: the means of one batch, ``[n, …]``, in the dtype to compute in.
        decay: in [0, 1).

    Returns:
        Per mean 1 where it was not finite, else 0: int64, ``[n]``.
    """
    # The largest magnitude tells in one pass what isfinite() takes four for.
    usable = torch.linalg.vector_norm(means.flatten(1), torch.inf, dim=1).isfinite()
    counts = torch.stack(list(updates)) + usable
    shape = -1, *[1] * (means.dim() - 1)
    kept = torch.stack(list(moments)).to(means.dtype)
    means = torch.where(usable.view(shape), means, kept)
    keep = averaging_weight(counts.clamp(min=1).to(means.dtype), decay)
    kept.lerp_(means, (1 - keep).view(shape))
    torch._foreach_copy_(list(moments), list(kept.unbind()))
    torch._foreach_copy_(list(updates), list(counts.unbind()))
    return (~usable).to(torch.int64)
