"""AFOpt's products on accelerators: over all matrices of one shape, in TF32 and float16.

- The matrix sign is computed in float16
  (:func:`~hf_precond.linalg.matrix_functions.half_newton_schulz`), which is as near to float64 as
  Muon's bfloat16 or nearer, at condition numbers from 1 to 1e6 (``tests/linalg``).
- Whole layers of one shape are stepped in half precision from end to end
  (:func:`step_in_half`), so that each pass over them moves half the bytes: gradients are scaled
  into float16's range, where they keep TF32's digits, and so are the factors.
- Elsewhere (fused or sharded weights, a direction or a scaling that is not the default) products
  with factors are TF32 where ``precision="auto"`` and the device has it. Rounding of a
  gradient is multiplied by the root of the factors' condition number, ``1 + n/λ`` at most: below a
  damping of 1/2 they are float32.
- Rows of an odd length are padded with zeros to a multiple of 8: tensor cores want theirs aligned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.linalg.matrix_functions import (
    half_direction,
    half_newton_schulz,
    packed_size,
    unpack,
)
from hf_precond.linalg.products import (
    ALIGNED,
    arithmetic,
    float32_products,
    from_cpu,
    matmul,
    padded,
)
from hf_precond.optimizers.afopt.optimizer import (
    LONGEST,
    NORM_DECAY,
    RMS,
    TwoSidedPreconditioner,
)
from hf_precond.optimizers.afopt.plan import MatrixPlan, RightFactor
from hf_precond.optimizers.base import kernels
from hf_precond.optimizers.base.layout import kept
from hf_precond.optimizers.base.parameters import (
    BoundMatrix,
    Preconditioned,
    are_alike,
    gradient_stacks,
    padded_stack,
    split_stacks,
)

if TYPE_CHECKING:
    from hf_precond.optimizers.afopt.optimizer import AFOpt

DAMPED = 0.5
"""Damping from which products with the factors may be TF32 or float16."""
HEIGHT = 64.0
"""To this largest entry gradients are scaled in float16. A factor's rows are at most three times as
long as its largest entry, which is scaled to 1, from :data:`DAMPED` on; so no entry of their
product exceeds ``3 · 64 · √1024``, and rounding is 2^-11 down to 1e-6 of the largest entry."""


@dataclass
class BatchedPreconditioner(TwoSidedPreconditioner):
    """The factors around a batch of gradients on an accelerator.

    Args:
        rights: the right factors, ``[k, blocks, w, w]``.
        siblings: how many neighbours of the batch share each of them, k numbers.
        half: whether the matrix sign is computed in float16.
        sizes: what the left factors were divided by, ``[n · heads, 1, 1]``.
    """

    rights: Tensor
    siblings: Sequence[int] = ()
    half: bool = False
    sizes: Tensor | None = None

    def linear(self, gradient: Tensor) -> Tensor:
        """As of a :class:`TwoSidedPreconditioner`."""
        with float32_products(self.precision, gradient):
            return self._narrowed(super().linear(self._widened(gradient)), gradient)

    def spectral(self, gradient: Tensor) -> Tensor:
        """As of a :class:`TwoSidedPreconditioner`."""
        with float32_products(self.precision, gradient):
            wide = self._widened(gradient)
            found = self._in_half(wide) if self.half else super().spectral(wide)
            return self._narrowed(found, gradient)

    def spectral_of_wide(self, gradient: Tensor) -> Tensor:
        """The same, in half precision, of blocks of columns as wide as their factors."""
        with float32_products(self.precision, gradient):
            return self._in_half(gradient)

    def _in_half(self, gradient: Tensor) -> Tensor:
        if self.form == "rows":
            z = self._times_left(self._split(gradient), True)
            sign = self._sign(z, self._split(self._times_right(z.view(gradient.shape))))
            return self._times_left(sign).view(gradient.shape)
        z = self._split(self._times_right(gradient))
        if self.form == "columns":
            sign = self._sign(z.mT, None if self.left is None else self._times_left(z).mT).mT
        else:
            z = self._times_left(z, True)
            tall = z.shape[1] > z.shape[2]
            sign = self._times_left(self._sign(z.mT).mT if tall else self._sign(z))
        return self._times_right(sign.reshape(gradient.shape), True)

    def _sign(self, matrices: Tensor, weighed: Tensor | None = None) -> Tensor:
        if matrices.dtype != torch.float16:
            return half_newton_schulz(matrices, weighed)
        sizes = self.sizes  # of ``columns`` the root of the left factor enters
        sizes = sizes.sqrt() if sizes is not None and self.form == "columns" else sizes
        return half_direction(matrices, weighed, sizes, self.heads)

    def _widened(self, gradient: Tensor) -> Tensor:
        """``[n, out, c]`` with every block of columns as wide as its factor."""
        _, blocks, wide, _ = self.rights.shape
        columns = gradient.shape[2]
        width = -(-columns // blocks)
        if blocks > 1 and blocks * width > columns:
            gradient = F.pad(gradient, (0, blocks * width - columns))
        if wide > width:
            gradient = F.pad(gradient.unflatten(2, (blocks, width)), (0, wide - width)).flatten(2)
        return gradient

    def _narrowed(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """The reverse of :meth:`_widened`."""
        if direction.shape == gradient.shape:
            return direction
        blocks, columns = self.rights.shape[1], gradient.shape[2]
        parts = direction.unflatten(2, (blocks, -1))[..., : -(-columns // blocks)]
        return parts.flatten(2)[..., :columns]

    def _times_left(self, matrices: Tensor, transposed: bool = False) -> Tensor:
        if self.left is None:
            return matrices
        return matmul(self.left.mT if transposed else self.left, matrices, self.precision)

    def _times_right(self, matrices: Tensor, transposed: bool = False) -> Tensor:
        factors = self.rights.mT if transposed else self.rights
        products, place, start = [], 0, 0
        for count, alike in itertools.groupby(self.siblings):
            number = len(list(alike))
            rows = matrices[start : start + number * count].reshape(number, -1, matrices.shape[2])
            pieces = zip(rows.chunk(factors.shape[1], -1), factors[place:].unbind(1), strict=True)
            blocks = [matmul(piece, f[:number], self.precision) for piece, f in pieces]
            product = blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)
            products.append(product.view(-1, *matrices.shape[1:]))
            place, start = place + number, start + number * count
        return products[0] if len(products) == 1 else torch.cat(products)


def batched(optimizer: AFOpt, batch: Sequence[MatrixPlan]) -> BatchedPreconditioner:
    """The factors of a batch.

    Args:
        optimizer: the optimizer.
        batch: matrices that are stepped alike, on an accelerator.
    """
    first, config = batch[0], optimizer.config
    runs = _runs(batch)
    left = None
    if first.left is not None:
        left = torch.cat(optimizer.tensors(batch, "left")).to(first.bound.dtype)
    narrow = config.damping >= DAMPED
    rights = _stacked(optimizer, first, [right for right, _ in runs])
    return BatchedPreconditioner(
        first.heads, first.form, left, rights, config.precision if narrow else "highest",
        [count for _, count in runs],
        arithmetic(config.precision, first.bound.weight, "sign") == "half",
    )  # fmt: skip


def _stacked(
    optimizer: AFOpt, first: MatrixPlan, rights: Sequence[RightFactor], half: bool = False
) -> Tensor:
    """Right factors of one shape, ``[k, blocks, w, w]``, padded to a multiple of 8.

    In float16 each is divided by its largest entry.
    """
    triton = kernels.for_device(first.bound.weight) if half and not first.bound.bias_rests else None
    if triton is not None:
        return _halved(optimizer, rights, triton)
    factors = torch.stack([right.stored(optimizer.state) for right in rights])
    if half:
        dims = tuple(range(1, factors.dim()))  # no factor is zero
        sizes = torch.linalg.vector_norm(
            factors, torch.inf, dim=dims, keepdim=True, dtype=first.bound.dtype
        )
        factors = torch.div(factors, sizes, out=torch.empty_like(factors, dtype=torch.float16))
    if rights[0].packed:
        size, known = rights[0].shape[-1], optimizer.plan.positions
        if (size, factors.device) not in known:
            places = unpack(torch.arange(packed_size(size), dtype=torch.int32)).flatten()
            known[size, factors.device] = from_cpu(places, factors.device, places.dtype)
        # Read by an index, in one kernel; it is kept for all matrices of this size.
        factors = factors.index_select(-1, known[size, factors.device]).unflatten(-1, (size, size))
    factors = factors if half else factors.to(first.bound.dtype)
    if first.bound.bias_rests:
        from hf_precond.optimizers.afopt.variants import without_bias

        pairs = zip(rights, factors, strict=True)
        factors = torch.stack([without_bias(right, factor) for right, factor in pairs])
    factors = factors if factors.dim() == 4 else factors.unsqueeze(1)
    extra = aligned(factors.shape[-1]) - factors.shape[-1]
    return F.pad(factors, (0, extra, 0, extra)) if extra else factors


def _halved(optimizer: AFOpt, rights: Sequence[RightFactor], triton: ModuleType) -> Tensor:
    """As :func:`_stacked` in float16, by Triton kernels."""
    stored, size = [right.stored(optimizer.state) for right in rights], rights[0].shape[-1]
    blocks, wide = rights[0].blocks, aligned(size)
    if rights[0].packed:
        factors = torch.stack(stored)
        dims = tuple(range(1, factors.dim()))
        sizes = torch.linalg.vector_norm(factors, torch.inf, dims, dtype=torch.float32)
        found: Tensor = triton.unpacked(factors, sizes, size, wide)
    else:
        sizes = torch.stack(torch._foreach_norm(stored, torch.inf)).float()
        each = [part for factor in stored for part in factor.reshape(-1, size, size).unbind()]
        scales = sizes.reciprocal().repeat_interleave(blocks) if blocks > 1 else sizes.reciprocal()
        found = triton.halved(triton.Matrices(each, None), scales, size, (wide, wide))
    return found.view(len(rights), blocks, wide, wide)


def aligned(size: int) -> int:
    """A row's length, padded to a multiple of :data:`ALIGNED` unless it is tiny."""
    return padded(size) if size > ALIGNED else size


# Half precision from end to end -----------------------------------------------------------------


def step_in_half(optimizer: AFOpt, batch: Sequence[MatrixPlan]) -> Iterator[Preconditioned] | None:
    """The momentum and the direction of a batch, in float16 from the momentum on.

    Args:
        optimizer: the optimizer.
        batch: matrices that are stepped alike, on an accelerator.

    Returns:
        What the step yields; ``None`` where the batch is none of whole layers alike, or the config
        asks for something else than the default direction, scaling and precision.
    """
    config, bound = optimizer.config, [plan.bound for plan in batch]
    usual = (
        config.scaling in ("adaptive", "rms")
        and config.precision == "auto"
        and config.damping >= DAMPED
    )
    if not usual or bound[0].bias_rests or not are_alike(bound):
        return None
    rates = _rates(optimizer, bound) if config.scaling == "adaptive" else None
    triton = kernels.for_batch(bound, steps=True) if rates is not None else None
    if rates is None or triton is None:
        return _stepped(optimizer, batch, bound)
    return _stepped_by_kernels(optimizer, batch, bound, rates, triton)


def _stepped(
    optimizer: AFOpt, batch: Sequence[MatrixPlan], bound: Sequence[BoundMatrix]
) -> Iterator[Preconditioned]:
    matrix, momentum, trends, length = _step_of(optimizer, batch)
    ahead, lengths = _advanced(optimizer, batch, momentum, trends, length)
    factors, size, columns = _half_factors(optimizer, batch), matrix.columns, matrix.shape[1]
    found = factors.spectral(ahead if factors.rights.shape[1] == 1 else ahead[..., :size])
    norms = torch.linalg.vector_norm(found, dim=(1, 2), keepdim=True, dtype=torch.float32)
    lengths /= norms.clamp(min=torch.finfo(torch.float32).tiny)
    steps = lengths.new_empty(len(batch), found.shape[1], columns)
    torch.mul(found[..., :columns], lengths, out=steps)
    rest = None if matrix.bias is None else found[..., columns] * lengths[..., 0]
    for item, parts in zip(bound, split_stacks(bound, steps, rest), strict=True):
        yield Preconditioned(item, parts[0], "direction", parts)


def _stepped_by_kernels(
    optimizer: AFOpt,
    batch: Sequence[MatrixPlan],
    bound: Sequence[BoundMatrix],
    rates: tuple[float, float, float, float],
    triton: ModuleType,
) -> Iterator[Preconditioned]:
    """As :func:`_stepped`, without stacks of gradients and steps; the parameters are changed.

    A step that fails has changed those of the batches before.
    """
    matrix, momentum, trends, length = _step_of(optimizer, batch)
    beta = optimizer.param_groups[bound[0].group]["momentum"]
    factors = _half_factors(optimizer, batch)
    blocks, wide = factors.rights.shape[1:3]
    own, columns = -(-matrix.columns // blocks), matrix.shape[1]
    ahead, lengths = triton.advance(
        triton.Matrices(*kernels.gradients(bound)), momentum, trends, columns, beta,
        decay=NORM_DECAY, started=optimizer.have_norms(batch),
        noise=math.sqrt((1 - beta) / (1 + beta)), length=length, longest=LONGEST,
        height=HEIGHT, nesterov=optimizer.config.nesterov, blocks=blocks, own=own, wide=wide,
    )  # fmt: skip
    found = factors.spectral_of_wide(ahead).contiguous()
    norms = torch.linalg.vector_norm(found, dim=(1, 2), dtype=torch.float32)
    parameters = triton.Matrices(*kernels.parameters(bound))
    triton.descend(parameters, found, norms, lengths, columns, own, wide, rates)
    for item in bound:
        yield Preconditioned(item, None, "applied")


def _rates(
    optimizer: AFOpt, bound: Sequence[BoundMatrix]
) -> tuple[float, float, float, float] | None:
    """Rate and weight decay of weights and of biases; ``None`` where a kernel cannot take them."""
    weight, bias = bound[0].group, bound[0].bias_group
    if bound[0].matrix.bias is None:
        bias = weight
    if bias is None or any(item.bias_group != bound[0].bias_group for item in bound):
        return None
    groups = (optimizer.param_groups[number] for number in (weight, bias))
    rates = [group[name] for group in groups for name in ("lr", "weight_decay")]
    if any(isinstance(rate, Tensor) for rate in rates):
        return None
    first, second, third, fourth = map(float, rates)
    return first, second, third, fourth


def _step_of(
    optimizer: AFOpt, batch: Sequence[MatrixPlan]
) -> tuple[LayerMatrix, Tensor, Tensor, float]:
    """The matrix; its momentum and average of norms, stacked; the length of a step of noise."""
    matrix, bound = batch[0].bound.matrix, [plan.bound for plan in batch]
    shapes = {"momentum": (matrix.shape[0], aligned(matrix.columns)), optimizer.trend: (1, 1)}
    momentum, trends = (
        kept(("stack", name), bound, partial(_state_stack, optimizer, batch, name, shape))
        for name, shape in shapes.items()
    )
    length = RMS * math.sqrt(matrix.shape[0] * matrix.columns) * optimizer.config.lr_scale
    return matrix, momentum, trends, length


def _advanced(
    optimizer: AFOpt,
    batch: Sequence[MatrixPlan],
    momentum: Tensor,
    trends: Tensor,
    length: float,
) -> tuple[Tensor, Tensor]:
    """Advances the momentum; N in float16, scaled, and the lengths of the steps."""
    weights, biases = gradient_stacks([plan.bound for plan in batch])
    columns = weights.shape[2]
    beta = optimizer.param_groups[batch[0].bound.group]["momentum"]
    adaptive = optimizer.config.scaling == "adaptive"
    largest = None if adaptive else _largest_entries(weights, biases)
    momentum[..., :columns].lerp_(weights, 1 - beta)
    if biases is not None:
        momentum[..., columns].lerp_(biases, 1 - beta)
    # N / β = M + (1/β - 1) G, where M has (1 - β) G in it: within a few times M's largest entry.
    height = torch.linalg.vector_norm(momentum, torch.inf, dim=(1, 2), keepdim=True)
    tiny = torch.finfo(momentum.dtype).tiny
    if largest is None:
        norms = torch.linalg.vector_norm(weights, dim=(1, 2), keepdim=True)
        optimizer.average_norms(batch, trends, norms)
        norms = torch.linalg.vector_norm(momentum[..., :columns], dim=(1, 2), keepdim=True)
        # As ``agreement``, times the length: in fewer kernels.
        noise = math.sqrt((1 - beta) / (1 + beta))
        lengths = norms / torch.add(torch.full((), tiny), trends, alpha=noise / length)
        lengths.clamp_(max=LONGEST * length)
    else:
        height = torch.maximum(height, largest)
        lengths = trends.mul_(beta).masked_fill_(largest != 0, 1.0) * length
    height.clamp_(min=HEIGHT * tiny)  # of a gradient of zeros; the scale stays finite
    ahead = torch.empty_like(momentum, dtype=torch.float16)
    scale = torch.full((), HEIGHT) / height  # of a number this would be two kernels
    torch.mul(momentum, scale, out=ahead)
    if optimizer.config.nesterov and beta > 0:  # N / β: β M + (1 - β) G
        ahead[..., :columns].addcmul_(weights, scale, value=(1 - beta) / beta)
        if biases is not None:
            ahead[..., columns].addcmul_(biases, scale[..., 0], value=(1 - beta) / beta)
    return ahead, lengths


def _largest_entries(weights: Tensor, biases: Tensor | None) -> Tensor:
    """Largest magnitudes of gradients, ``[n, 1, 1]``."""
    largest = torch.linalg.vector_norm(weights, torch.inf, dim=(1, 2), keepdim=True)
    if biases is None:
        return largest
    most = torch.linalg.vector_norm(biases, torch.inf, dim=1)
    return torch.maximum(largest, most[:, None, None])


def _state_stack(
    optimizer: AFOpt, batch: Sequence[MatrixPlan], name: str, shape: tuple[int, int]
) -> Tensor:
    """State of a batch in one stack, ``[n, *shape]``, of which it is views from now on."""
    held = optimizer.tensors(batch, name)
    stack, views = padded_stack([h if h.dim() else h.view(1, 1) for h in held], shape)
    for plan, tensor, view in zip(batch, held, views or (), strict=False):
        view = view if tensor.dim() else view.view(())
        optimizer.state[plan.bound.weight][plan.bound.prefix + name] = view
    return stack


def _half_factors(optimizer: AFOpt, batch: Sequence[MatrixPlan]) -> BatchedPreconditioner:
    """The factors of a batch in float16, each scaled to entries of 1 and less."""
    first, heads, runs = batch[0], batch[0].heads, _runs(batch)
    rights = _stacked(optimizer, first, [right for right, _ in runs], True)
    left = sizes = None
    if first.left is not None:
        whole = torch.cat(optimizer.tensors(batch, "left")).to(first.bound.dtype)
        sizes = torch.linalg.vector_norm(whole, torch.inf, dim=(1, 2), keepdim=True)
        left = torch.div(whole, sizes, out=torch.empty_like(whole, dtype=torch.float16))
    return BatchedPreconditioner(
        heads, first.form, left, rights, optimizer.config.precision,
        [count for _, count in runs], True, sizes,
    )  # fmt: skip


def _runs(batch: Sequence[MatrixPlan]) -> list[tuple[RightFactor, int]]:
    """Right factors, and how many neighbours share each."""
    rights = [plan.right for plan in batch]
    return [(right, len(list(alike))) for right, alike in itertools.groupby(rights)]
