"""Second moments of rows: what enters or leaves a layer, and running averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_precond.architectures.modules import CONVOLUTIONS
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.compat.torch_internals import is_transformed, padding_for_pad
from hf_precond.linalg.gram import gram


def mean_of(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; not finite where nothing was counted."""
    return total / count.to(total.dtype)


def update_moment(moment: Tensor, updates: Tensor, mean: Tensor, decay: float) -> Tensor:
    """``A ← b A + (1 - b) mean`` in place, ``b = min(decay, 1 - 1/k)``, k counting updates.

    The first update thus sets A, the second averages two, and so on until the
    decay rules: an average without start-up bias. A mean that is not finite
    changes nothing and counts nothing. No host synchronisation.

    Args:
        moment: A, ``[n, n]`` or ``[…, n, n]``, changed in place.
        updates: k so far, a 0-d tensor on A's device, changed in place.
        mean: the new batch's second moment, shaped like A.
        decay: in [0, 1).

    Returns:
        1 where the mean was dropped, else 0: a 0-d tensor.
    """
    usable = torch.isfinite(mean).all()
    updates += usable
    keep = torch.clamp(1 - 1 / updates.clamp(min=1).to(mean.dtype), max=decay)
    weight = torch.where(usable, 1 - keep, 0.0)
    mean = torch.where(usable, mean, 0.0)
    moment.copy_(moment.to(mean.dtype).mul_(1 - weight).add_(mean * weight))
    return (~usable).to(torch.int64)


def update_moments(
    moments: Sequence[Tensor], updates: Sequence[Tensor], means: Tensor, decay: float
) -> Tensor:
    """:func:`update_moment` of moments of one shape, on a GPU all in a few kernels.

    Args:
        moments: n tensors, changed in place.
        updates: k of each, 0-d tensors, changed in place.
        means: ``[n, …]``.
        decay: in [0, 1).

    Returns:
        Per mean 1 where it was dropped, else 0: ``[n]``.
    """
    if not means.is_cuda:
        each = zip(moments, updates, means, strict=True)
        return torch.stack([update_moment(*one, decay) for one in each])
    usable = torch.isfinite(means).flatten(1).all(1)
    counts = torch.stack(list(updates)) + usable
    keep = torch.clamp(1 - 1 / counts.clamp(min=1).to(means.dtype), max=decay)
    weight = torch.where(usable, 1 - keep, 0.0).view(-1, *[1] * (means.dim() - 1))
    means = torch.where(usable.view(weight.shape), means, 0.0)
    found = torch.stack(list(moments)).to(means.dtype).mul_(1 - weight).add_(means.mul_(weight))
    torch._foreach_copy_(list(moments), list(found.unbind()))
    torch._foreach_copy_(list(updates), list(counts.unbind()))
    return (~usable).to(torch.int64)


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
    padding = padding_for_pad(module)
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


def weigh(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows times their weights."""
    return rows if weights is None else rows * weights.unsqueeze(-1)


def moment(
    rows: Tensor, weights: Tensor | None, *, constant: bool, out: Tensor | None = None
) -> Tensor:
    """``sum of w x̂ x̂ᵀ`` over the second-last dimension.

    Args:
        rows: ``[…, n, d]``.
        weights: ``[…, n]``, or ``None`` for ones.
        constant: put a 1 behind every row: ``[…, d + 1, d + 1]``.
        out: where to write the moment of ``[n, d]``, of any strides.
    """
    if rows.dim() == 2:
        return _flat_moment(rows, weights, constant, out)
    weighted = weigh(rows, weights)
    product = weighted.mT @ rows
    if not constant:
        return product
    size = rows.shape[-1]
    result = product.new_empty(*product.shape[:-2], size + 1, size + 1)
    result[..., :size, :size] = product
    _border(result, rows, weights, weighted.sum(-2))
    return result


def _flat_moment(
    rows: Tensor, weights: Tensor | None, constant: bool, out: Tensor | None
) -> Tensor:
    """:func:`moment` of ``[n, d]``."""
    if not constant:
        return gram(rows, weights, out=out)
    size = rows.shape[-1]
    result = rows.new_empty(size + 1, size + 1) if out is None else out
    gram(rows, weights, out=result[:size, :size])
    total = (rows.new_ones(len(rows)) if weights is None else weights) @ rows
    _border(result, rows, weights, total)
    return result


def _border(result: Tensor, rows: Tensor, weights: Tensor | None, total: Tensor) -> None:
    """Fill the row and column of the constant 1."""
    size = rows.shape[-1]
    result[..., size, :size] = total
    result[..., :size, size] = total
    corner = result[..., size, size]
    if weights is None:
        corner.fill_(rows.shape[-2])  # an assignment would copy the number from the host, and wait
    else:
        corner.copy_(weights.sum(-1))


def block_moment(
    rows: Tensor, weights: Tensor | None, *, constant: bool, blocks: int
) -> Tensor:
    """The diagonal blocks of :func:`moment`, and nothing else computed.

    Args:
        rows: ``[n, d]``.
        weights: ``[n]``, or ``None`` for ones.
        constant: put a 1 behind every row.
        blocks: their number.

    Returns:
        ``[blocks, w, w]``, ``w = ceil(columns / blocks)``, zeros beyond the
        last column.
    """
    columns = rows.shape[-1] + constant
    width = -(-columns // blocks)
    result = rows.new_zeros(blocks, width, width)
    for number in range(blocks):
        start, stop = number * width, min((number + 1) * width, columns)
        if start >= columns:
            break
        part = rows[:, start : min(stop, rows.shape[-1])]
        last = constant and stop == columns
        size = stop - start
        result[number, :size, :size] = moment(part, weights, constant=last)
    return result


def centred(rows: Tensor, weights: Tensor | None) -> Tensor:
    """``[…, n, d]`` less the (weighted) mean over each sequence of n."""
    if weights is None:
        return rows - rows.mean(-2, keepdim=True)
    total = weights.sum(-1, keepdim=True).clamp(min=1).unsqueeze(-1)
    return rows - weigh(rows, weights).sum(-2, keepdim=True) / total


def count_of(rows: int, weights: Tensor | None, like: Tensor) -> Tensor:
    """Number of rows, weighted, as a 0-d tensor; nothing is read from the device."""
    return like.new_full((), rows) if weights is None else weights.sum().to(like.dtype)


@dataclass(frozen=True)
class Part:
    """What one call of a layer adds to a collection's sum and count.

    Args:
        collection: the collection's name.
        sum: the sum.
        count: the count.
        spare: whether the sum's memory is one of :class:`Spares`.
    """

    collection: str
    sum: Tensor
    count: Tensor
    spare: bool = False


class Spares:
    """Square matrices that are needed again and again, on a CPU.

    There fresh pages cost a sixth of the product that is written to them. A
    GPU has its caching allocator.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def take(self, size: int, like: Tensor) -> Tensor:
        """An uninitialised ``[size, size]``, for the caller alone until it is given back."""
        idle = self._idle.get((size, like.dtype))
        if idle:
            return idle.pop()
        # Rows that start at a multiple of 64 bytes make products faster.
        return like.new_empty(size, -(-size // 16) * 16)[:, :size]

    def give(self, matrix: Tensor) -> None:
        """Give back what :meth:`take` gave; nobody else may hold it."""
        self._idle.setdefault((len(matrix), matrix.dtype), []).append(matrix)

    def clear(self) -> None:
        """Give the memory back."""
        self._idle.clear()


def no_autocast(device: torch.device) -> torch.autocast:
    """Moments are summed in their own dtype, whatever autocast says."""
    return torch.autocast(device.type, enabled=False)


GOLDEN = (5**0.5 - 1) / 2
_PATCHES = 2**24  # entries of a convolution's patches that are laid out at once


@dataclass
class Collection:
    """One sum, which may serve several requests.

    Args:
        name: its name in the stage.
        kind: ``input`` or ``output_grad``.
        matrix: a matrix whose input or output gradient it is.
        constant: a 1 stands behind every row.
        center: each sequence's mean is taken off first.
        blocks: only this many diagonal blocks are kept.
        rows: at most so many rows of a call enter; 0 for all.
    """

    name: str
    kind: str
    matrix: LayerMatrix
    constant: bool
    center: bool
    blocks: int = 1
    rows: int = 0

    @property
    def variant(self) -> tuple[bool, bool, int, int]:
        """What is taken of a tensor: two collections alike in it have one moment."""
        return self.constant, self.center, self.blocks, self.rows


def thinned(rows: Tensor, limit: int, step: int) -> Tensor:
    """At most ``limit`` of the rows (all for 0), evenly spaced, from another start each step.

    A view. The starts of successive steps spread by the golden ratio, so that
    no multiple of a sequence's length keeps seeing the same positions.
    """
    if not limit or len(rows) <= limit:
        return rows
    stride = -(-len(rows) // limit)
    return rows[int(stride * (step * GOLDEN % 1)) :: stride]


def output_part(
    collection: Collection,
    rows: Tensor,
    weights: Tensor | None,
    step: int = 0,
    spares: Spares | None = None,
) -> Part:
    """The moment of output gradients ``[n, out]``; ``weights`` only count them."""
    chosen, counted = _seen(collection, select_outputs(collection.matrix, rows), weights, step)
    total, spare = _moment(collection, chosen, None, False, spares)
    return Part(collection.name, total, count_of(len(chosen), counted, chosen), spare)


def input_part(
    collection: Collection,
    rows: Tensor,
    weights: Tensor | None,
    step: int = 0,
    spares: Spares | None = None,
) -> Part:
    """The moment of an input ``[…, T, d]``, each leading index a sequence."""
    if collection.center:
        rows = centred(rows, weights)
    constant = collection.constant and not collection.center
    flat, weights = _seen(collection, rows.flatten(0, -2), weights, step)
    count = count_of(len(flat), weights, flat)
    if collection.constant and collection.center:  # the constant less its mean is zero
        flat = torch.nn.functional.pad(flat, (0, 1))
    total, spare = _moment(collection, flat, weights, constant, spares)
    return Part(collection.name, total, count, spare)


def _seen(
    collection: Collection, rows: Tensor, weights: Tensor | None, step: int
) -> tuple[Tensor, Tensor | None]:
    """The rows of a call that enter, and their weights."""
    if weights is not None:
        weights = thinned(weights.flatten(), collection.rows, step)
    return thinned(rows, collection.rows, step), weights


def _spare(spares: Spares | None, rows: Tensor, constant: bool) -> Tensor | None:
    """Memory for the moment of ``[n, d]`` on a CPU.

    None inside the transforms of ``torch.func``, which write to no memory made outside.
    """
    if spares is None or not rows.is_cpu or is_transformed(rows):
        return None
    return spares.take(rows.shape[-1] + constant, rows)


def _moment(
    collection: Collection,
    rows: Tensor,
    weights: Tensor | None,
    constant: bool,
    spares: Spares | None,
) -> tuple[Tensor, bool]:
    """The moment of ``[n, d]``, and whether its memory is one of ``spares``."""
    if collection.blocks > 1:
        found = block_moment(rows, weights, constant=constant, blocks=collection.blocks)
        return found, False
    out = _spare(spares, rows, constant)
    return moment(rows, weights, constant=constant, out=out), out is not None


def patch_part(
    collection: Collection,
    layer: nn.Module,
    inputs: Tensor,
    at_step: int = 0,
    spares: Spares | None = None,
) -> Part:
    """The moment of a convolution's patches, a part of the batch at a time to bound memory."""
    assert isinstance(layer, CONVOLUTIONS)
    total: Tensor | None = None
    rows, step = 0, len(inputs)
    if inputs.dim() == layer.weight.dim():
        enlarged = inputs[:1].numel() * layer.weight[0, 0].numel()
        step = max(1, _PATCHES // max(1, enlarged))
    for part in inputs.split(step):
        limit = -(-collection.rows * len(part) // max(1, len(inputs)))
        seen = thinned(patches(layer, part).flatten(0, 1), limit, at_step)
        term, spare = _moment(collection, seen, None, collection.constant, spares)
        if total is None:
            total = term
        else:
            total.add_(term)
            if spares is not None and spare:
                spares.give(term)
        rows += len(seen)
    assert total is not None
    return Part(collection.name, total, count_of(rows, None, total), spare)
