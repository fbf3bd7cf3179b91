"""Passes over gradients, momentum and factors of a batch, each in one kernel; by Triton, on CUDA.

torch takes several times as many: a stack of the gradients, an average, three norms, two
conversions. The products in between are torch's.
:func:`~hf_precond.optimizers.base.kernels.for_batch` says where these serve; elsewhere the
optimizers compute the same by torch's operations.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_precond.linalg.matrix_functions import packed_size, unpack
from hf_precond.linalg.products import from_cpu

BLOCK = 4096
"""Entries of a program."""
TILE = 32
"""Rows and columns of a program that unpacks a triangle."""


@triton.jit
def _gradient(weights, biases, i, row, column, columns, inside, has_bias: tl.constexpr, like):  # type: ignore[no-untyped-def]
    """Entries of ``[dW | db]`` of matrix i, in float32; zeros beyond."""
    kind = tl.pointer_type(like.dtype.element_ty)
    matrix = tl.load(weights + i).to(kind)
    found = tl.load(matrix + row * columns + column, inside & (column < columns), 0.0)
    found = found.to(tl.float32)
    if has_bias:
        bias = tl.load(biases + i).to(kind)
        own = tl.load(bias + row, inside & (column == columns), 0.0)
        found += own.to(tl.float32)
    return found


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    weights, biases, like, momentum, partial, rows, columns, width, share,
    has_bias: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i, part = tl.program_id(1), tl.program_id(0)
    place = part * block + tl.arange(0, block)
    inside = place < rows * width
    row, column = place // width, place % width
    g = _gradient(weights, biases, i, row, column, columns, inside, has_bias, like)
    at = momentum + i.to(tl.int64) * rows * width + place
    m = tl.load(at, inside, 0.0)
    m += share * (g - m)
    tl.store(at, m, inside)
    of_weights = column < columns
    out = partial + (i * tl.num_programs(0) + part) * 3
    tl.store(out, tl.sum(tl.where(of_weights, g * g, 0.0)))
    tl.store(out + 1, tl.sum(tl.where(of_weights, m * m, 0.0)))
    tl.store(out + 2, tl.max(tl.abs(m)))


@triton.jit
def _squares(  # type: ignore[no-untyped-def]
    weights, biases, like, partial, rows, columns, width,
    has_bias: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i, part = tl.program_id(1), tl.program_id(0)
    place = part * block + tl.arange(0, block)
    inside = place < rows * width
    row, column = place // width, place % width
    g = _gradient(weights, biases, i, row, column, columns, inside, has_bias, like)
    tl.store(partial + i * tl.num_programs(0) + part, tl.sum(g * g))


@triton.jit
def _halved(  # type: ignore[no-untyped-def]
    weights, biases, like, scales, out, rows, columns, height, width,
    has_bias: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    place = tl.program_id(0) * block + tl.arange(0, block)
    row, column = place // width, place % width
    g = _gradient(weights, biases, i, row, column, columns, row < rows, has_bias, like)
    to = out + i.to(tl.int64) * height * width + place
    tl.store(to, (tl.load(scales + i) * g).to(tl.float16), place < height * width)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    partial, parts, usual, lengths, scales, decay, noise, length, longest, height, tiny,
    started: tl.constexpr, chunks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    squares = tl.zeros([block], tl.float32)
    ours = tl.zeros([block], tl.float32)
    largest = tl.zeros([block], tl.float32)
    for chunk in range(chunks):
        part = chunk * block + tl.arange(0, block)
        at, inside = partial + (i * parts + part) * 3, part < parts
        squares += tl.load(at, inside, 0.0)
        ours += tl.load(at + 1, inside, 0.0)
        largest = tl.maximum(largest, tl.load(at + 2, inside, 0.0))
    norm = tl.sqrt(tl.sum(squares))
    norm = tl.where(norm < float("inf"), norm, 0.0)  # of a bad gradient, also NaN
    before = tl.load(usual + i)
    after = before + (1.0 - decay) * (norm - before)
    if not started:
        after = tl.where(before > 0.0, after, norm)
    tl.store(usual + i, after)
    mine = tl.sqrt(tl.sum(ours)) / (tiny + after * noise) * length
    tl.store(lengths + i, tl.where(mine > longest * length, longest * length, mine))
    tl.store(scales + i, height / tl.maximum(tl.max(largest), height * tiny))


@triton.jit
def _ahead(  # type: ignore[no-untyped-def]
    weights, biases, like, momentum, scales, out, rows, columns, width, across, own, wide, ahead,
    has_bias: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    place = tl.program_id(0) * block + tl.arange(0, block)
    row, column, valid = _place(place, rows, width, across, own, wide)
    g = _gradient(weights, biases, i, row, column, columns, valid, has_bias, like)
    at = momentum + i.to(tl.int64) * rows * width + row * width + column
    found = tl.load(scales + i) * (tl.load(at, valid, 0.0) + ahead * g)
    to = out + i.to(tl.int64) * rows * across + place
    tl.store(to, found.to(tl.float16), place < rows * across)


@triton.jit
def _place(place, rows, width, across, own, wide):  # type: ignore[no-untyped-def]
    """Row and column of an entry whose columns stand in blocks of ``own``, each ``wide``."""
    row, there = place // across, place % across
    column = there // wide * own + there % wide
    valid = (place < rows * across) & (there % wide < own) & (column < width)
    return row, column, valid


@triton.jit
def _descend(  # type: ignore[no-untyped-def]
    weights, biases, like, found, norms, lengths, rows, columns, across, own, wide, tiny,
    lr, decay, bias_lr, bias_decay, has_bias: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    place = tl.program_id(0) * block + tl.arange(0, block)
    row, column, valid = _place(place, rows, columns + has_bias, across, own, wide)
    size = tl.load(lengths + i) / tl.maximum(tl.load(norms + i), tiny)
    step = size * tl.load(found + i.to(tl.int64) * rows * across + place, valid, 0.0)
    kind = tl.pointer_type(like.dtype.element_ty)
    at = tl.load(weights + i).to(kind) + row * columns + column
    inside = valid & (column < columns)
    before = tl.load(at, inside, 0.0).to(tl.float32)
    after = before * (1.0 - lr * decay) - lr * step
    tl.store(at, after.to(like.dtype.element_ty), inside)
    if has_bias:
        at = tl.load(biases + i).to(kind) + row
        inside = valid & (column == columns)
        before = tl.load(at, inside, 0.0).to(tl.float32)
        after = before * (1.0 - bias_lr * bias_decay) - bias_lr * step
        tl.store(at, after.to(like.dtype.element_ty), inside)


@triton.jit
def _steps(  # type: ignore[no-untyped-def]
    found, scales, steps, rest, rows, columns, height, width,
    has_bias: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < rows * width
    row, column = place // width, place % width
    at = found + i.to(tl.int64) * height * width + place
    step = tl.load(at, inside, 0.0).to(tl.float32) * tl.load(scales + i)
    to = steps + i.to(tl.int64) * rows * columns + row * columns + column
    tl.store(to, step, inside & (column < columns))
    if has_bias:
        tl.store(rest + i * rows + row, step, inside & (column == columns))


@triton.jit
def _unpack(packed, sizes, out, n, blocks, wide, entries, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    matrix = tl.program_id(2)
    i = (tl.program_id(1) * tile + tl.arange(0, tile))[:, None]
    j = (tl.program_id(0) * tile + tl.arange(0, tile))[None, :]
    low, high = tl.maximum(i, j), tl.minimum(i, j)
    first, odd = (n + 1) // 2, n % 2
    second = n - first
    corner = second * first + (low + 1 - odd) * first + high
    last = second * first + (high - first) * first + low - first + odd
    square = (low - first) * first + high
    place = tl.where(high >= first, last, tl.where(low >= first, square, corner))
    inside = low < n
    value = tl.load(packed + matrix.to(tl.int64) * entries + place, inside, 0.0)
    value = value.to(tl.float32) / tl.load(sizes + matrix // blocks)
    to = out + matrix.to(tl.int64) * wide * wide + i * wide + j
    tl.store(to, value.to(tl.float16), (i < wide) & (j < wide))


class Matrices:
    """Where the weights and biases of a batch are, or their gradients.

    Args:
        weights: of equal matrices, contiguous, ``[out, in]`` each or of so many entries.
        biases: likewise, ``[out]`` each; ``None`` where there are none.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
        self.like, self.has_bias, self.count = weights[0], biases is not None, len(weights)
        self.tensors = (*weights, *(biases or ()))  # addresses keep nothing alive
        places = [tensor.data_ptr() for tensor in self.tensors]
        table = _table(tuple(places), self.like.device)
        self.weights, self.biases = table[: len(weights)], table[-len(weights) :]

    def rows(self, columns: int) -> int:
        """Rows of a weight with so many columns."""
        return self.like.numel() // columns


@functools.lru_cache(maxsize=256)
def _table(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses on the device; those of the step before, where gradients stayed in place."""
    return from_cpu(torch.tensor(places, dtype=torch.int64), device, torch.int64)


def advance(
    gradients: Matrices,
    momentum: Tensor,
    usual: Tensor,
    columns: int,
    beta: float,
    *,
    decay: float,
    started: bool,
    noise: float,
    length: float,
    longest: float,
    height: float,
    nesterov: bool,
    blocks: int,
    own: int,
    wide: int,
) -> tuple[Tensor, Tensor]:
    """The momentum of a batch, in place, and what becomes of it in float16.

    ``M ← β M + (1-β) G``; ``g ← decay g + (1 - decay) ‖G‖``; lengths
    ``min(longest, ‖M‖ / (g · noise)) · length``, norms of the weights alone; and
    ``M + (1/β - 1) G``, or M, times ``height / max|M|``.

    Args:
        gradients: G.
        momentum: M, ``[n, out, width]``, float32; zeros beyond the weights and the bias.
        usual: g, n numbers, changed in place.
        columns: of a weight.
        beta: β, in [0, 1).
        decay: of g.
        started: whether g is an average already; else its first norm takes its place.
        noise: ``r₀``, see :func:`~hf_precond.optimizers.base.agreement.agreement`.
        length: of a step where gradients are noise.
        longest: the largest of the lengths over that.
        height: the largest entry of a momentum in float16.
        nesterov: whether G is added once more.
        blocks: blocks of columns of the result.
        own: columns of each.
        wide: columns that each block takes there, zeros beyond its own.

    Returns:
        ``[n, out, blocks · wide]`` in float16, and the lengths, ``[n, 1, 1]``.
    """
    count, rows, width = momentum.shape
    across = blocks * wide
    grid = triton.cdiv(rows * width, BLOCK), count
    partial = momentum.new_empty(count, grid[0], 3)
    lengths, scales = momentum.new_empty(2, count)
    table = gradients.weights, gradients.biases, gradients.like
    tiny = torch.finfo(torch.float32).tiny
    with torch.cuda.device_of(momentum):
        _advance[grid](
            *table, momentum, partial, rows, columns, width, 1 - beta,
            has_bias=gradients.has_bias, block=BLOCK, num_warps=8,
        )  # fmt: skip
        _finish[(count,)](
            partial, grid[0], usual, lengths, scales, decay, noise, length, longest, height, tiny,
            started=started, chunks=triton.cdiv(grid[0], 256), block=256,
        )  # fmt: skip
        out = momentum.new_empty(count, rows, across, dtype=torch.float16)
        ahead = (1 - beta) / beta if nesterov and beta > 0 else 0.0
        _ahead[triton.cdiv(rows * across, BLOCK), count](
            *table, momentum, scales, out, rows, columns, width, across, own, wide, ahead,
            has_bias=gradients.has_bias, block=BLOCK, num_warps=8,
        )  # fmt: skip
    return out, lengths.view(-1, 1, 1)


def frobenius_norms(gradients: Matrices, columns: int) -> Tensor:
    """Norms of ``[dW | db]``, n numbers.

    Args:
        gradients: of a batch.
        columns: of a weight.
    """
    rows, width = gradients.rows(columns), columns + gradients.has_bias
    grid = triton.cdiv(rows * width, BLOCK), gradients.count
    partial = torch.empty(*grid[::-1], dtype=torch.float32, device=gradients.like.device)
    with torch.cuda.device_of(gradients.like):
        _squares[grid](
            gradients.weights, gradients.biases, gradients.like, partial, rows, columns, width,
            has_bias=gradients.has_bias, block=BLOCK, num_warps=8,
        )  # fmt: skip
    return partial.sum(1).sqrt_()


def halved(gradients: Matrices, scales: Tensor, columns: int, shape: tuple[int, int]) -> Tensor:
    """``[dW | db]`` times a number each, in float16, zeros beyond.

    Args:
        gradients: of a batch.
        scales: n numbers.
        columns: of a weight.
        shape: ``(height, width)`` of the results.

    Returns:
        ``[n, height, width]``.
    """
    height, width = shape
    out = torch.empty(gradients.count, *shape, dtype=torch.float16, device=scales.device)
    with torch.cuda.device_of(scales):
        _halved[triton.cdiv(height * width, BLOCK), gradients.count](
            gradients.weights, gradients.biases, gradients.like, scales, out,
            gradients.rows(columns), columns, height, width,
            has_bias=gradients.has_bias, block=BLOCK, num_warps=8,
        )  # fmt: skip
    return out


def scaled_steps(
    found: Tensor, scales: Tensor, columns: int, has_bias: bool, rows: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Directions times a number each, the bias apart.

    Args:
        found: ``[n, height, width]``, float16, contiguous.
        scales: n numbers.
        columns: of a weight.
        has_bias: whether the next column is the bias.
        rows: of a weight; all by default.

    Returns:
        ``[n, out, columns]`` and ``[n, out]`` or ``None``, in float32.
    """
    count, height, width = found.shape
    rows = height if rows is None else rows
    steps = scales.new_empty(count, rows, columns)
    rest = scales.new_empty(count, rows) if has_bias else None
    with torch.cuda.device_of(found):
        _steps[triton.cdiv(rows * width, BLOCK), count](
            found, scales, steps, steps if rest is None else rest, rows, columns, height, width,
            has_bias=has_bias, block=BLOCK, num_warps=8,
        )  # fmt: skip
    return steps, rest


def descend(
    parameters: Matrices,
    found: Tensor,
    norms: Tensor,
    lengths: Tensor,
    columns: int,
    own: int,
    wide: int,
    rates: tuple[float, float, float, float],
) -> None:
    """``p ← (1 - lr·wd) p - lr · length / norm · u``, rounded once to the parameters' dtype.

    Args:
        parameters: changed in place.
        found: u, ``[n, out, blocks · wide]``, float16, contiguous; as :func:`advance` lays it out.
        norms: n numbers.
        lengths: likewise.
        columns: of a weight.
        own: see :func:`advance`.
        wide: the same.
        rates: lr and wd of the weights, lr and wd of the biases.
    """
    count, rows, across = found.shape
    tiny = torch.finfo(torch.float32).tiny
    with torch.cuda.device_of(found):
        _descend[triton.cdiv(rows * across, BLOCK), count](
            parameters.weights, parameters.biases, parameters.like, found, norms, lengths, rows,
            columns, across, own, wide, tiny, *rates,
            has_bias=parameters.has_bias, block=BLOCK, num_warps=8,
        )  # fmt: skip
    torch.autograd.graph.increment_version(parameters.tensors)


def unpacked(packed: Tensor, sizes: Tensor, n: int, wide: int) -> Tensor:
    """Symmetric factors in float16, each divided by a number, with zeros around them.

    Args:
        packed: of :func:`~hf_precond.linalg.matrix_functions.pack`, ``[k, n (n + 1) / 2]`` or
            ``[k, blocks, n (n + 1) / 2]``.
        sizes: k numbers.
        n: their size.
        wide: the size of the results.

    Returns:
        ``[k, wide, wide]`` or ``[k, blocks, wide, wide]``.
    """
    out = torch.empty(*packed.shape[:-1], wide, wide, dtype=torch.float16, device=packed.device)
    blocks = packed.shape[1] if packed.dim() == 3 else 1
    tiles = triton.cdiv(wide, TILE)
    with torch.cuda.device_of(packed):
        _unpack[tiles, tiles, len(packed) * blocks](
            packed, sizes, out, n, blocks, wide, packed.shape[-1], tile=TILE
        )
    return out


@functools.cache
def usable(device: Any) -> bool:
    """Whether the kernels work on a device: they are tried once, see :func:`trial`.

    Args:
        device: a CUDA device.
    """
    try:
        trial(device)
        return True
    except Exception as error:  # no compiler, an old driver, other results
        text = "AFOpt and NKFAC run without their Triton kernels on %s, more slowly: %s"
        logging.getLogger(__name__).warning(text, device, error)
        return False


def trial(device: Any) -> None:
    """Compare every kernel with torch's operations, on matrices that several programs share.

    Args:
        device: where. Its random numbers are left alone.

    Raises:
        AssertionError: the results differ.
    """

    def numbers(*shape: int) -> Tensor:
        count = torch.arange(math.prod(shape), dtype=torch.float32, device=device)
        return count.mul(0.7).sin().view(shape)

    def same(found: Tensor, expected: Tensor, error: float = 1e-4) -> None:
        torch.testing.assert_close(found.float(), expected.float(), rtol=error, atol=error)

    rows, columns, beta = 70, 130, 0.75
    whole, momentum = numbers(2, rows, columns + 6), numbers(2, rows, columns + 6).mul(0.5)
    whole[..., columns + 1 :], momentum[..., columns + 1 :] = 0, 0
    weights = [part[:, :columns].contiguous() for part in whole]
    gradients = Matrices(weights, [part[:, columns].contiguous() for part in whole])
    expected = torch.lerp(momentum, whole, 1 - beta)
    usual = torch.tensor([0.0, 1.0], dtype=torch.float32, device=device)
    half, lengths = advance(
        gradients, momentum, usual, columns, beta, decay=0.9, started=False, noise=0.8,
        length=3.0, longest=2.0, height=64.0, nesterov=True, blocks=2, own=66, wide=72,
    )  # fmt: skip
    norms, ours = (t[..., :columns].flatten(1).norm(dim=1) for t in (whole, expected))
    average = torch.stack([norms[0], 0.9 + 0.1 * norms[1]])
    same(momentum, expected)
    same(usual, average)
    same(lengths.flatten(), (ours / (0.8 * average)).clamp(max=2.0) * 3.0)
    scale = 64 / expected.abs().amax((1, 2), keepdim=True)
    ahead = (expected + (1 / beta - 1) * whole) * scale
    first, last = half.split(72, 2)
    same(torch.cat([first[..., :66], last[..., :65]], 2), ahead[..., : columns + 1], 2e-3)
    assert not first[..., 66:].any() and not last[..., 65:].any()
    held = [part.clone() for part in weights], [part[:, 0].clone() for part in weights]
    descend(Matrices(*held), half, norms, lengths, columns, 66, 72, (0.5, 0.1, 0.25, 0.0))
    right = ahead * (lengths / norms[:, None, None])
    same(torch.stack(held[0]), 0.95 * whole[..., :columns] - 0.5 * right[..., :columns], 2e-3)
    same(torch.stack(held[1]), whole[..., 0] - 0.25 * right[..., columns], 2e-3)
    half = ahead.half()
    steps, rest = scaled_steps(half, 1 / norms, columns, True)
    right = half.float() / norms[:, None, None]
    same(steps, right[..., :columns])
    assert rest is not None
    same(rest, right[..., columns])
    same(frobenius_norms(gradients, columns), whole.flatten(1).norm(dim=1))
    wide = torch.zeros_like(whole[:, :1]).repeat(1, 72, 1)
    wide[:, :rows] = whole * norms[:, None, None]
    same(halved(gradients, norms, columns, (72, columns + 6)), wide, 2e-3)
    triangles = numbers(2, packed_size(rows - 1))
    factors = torch.zeros(2, 72, 72, dtype=torch.float32, device=device)
    factors[:, : rows - 1, : rows - 1] = unpack(triangles) / norms[:, None, None]
    same(unpacked(triangles, norms, rows - 1, 72), factors, 2e-3)
