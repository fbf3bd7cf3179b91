"""AFOpt's products on accelerators: over all matrices of one shape, in TF32 and float16.

- The matrix sign is computed in float16
  (:func:`~hf_precond.linalg.matrix_functions.half_newton_schulz`), which is as near to float64 as
  Muon's bfloat16 or nearer, at condition numbers from 1 to 1e6 (``tests/linalg``).
- Products with factors are TF32 where ``precision="auto"`` and the device has it. Rounding of a
  gradient is multiplied by the root of the factors' condition number, ``1 + n/λ`` at most: below a
  damping of 1/2, and with the covariant one, they are float32.
- Rows of an odd length are padded with zeros to a multiple of 8: tensor cores want theirs aligned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.linalg.matrix_functions import half_newton_schulz, packed_size, unpack
from hf_precond.linalg.products import arithmetic, float32_products, from_cpu, matmul
from hf_precond.optimizers.afopt.optimizer import TwoSidedPreconditioner
from hf_precond.optimizers.afopt.plan import MatrixPlan, RightFactor

if TYPE_CHECKING:
    from hf_precond.optimizers.afopt.optimizer import AFOpt

ALIGNED = 8
"""Entries of a row that tensor cores want a multiple of, in half precision."""
DAMPED = 0.5
"""Damping from which products with the factors may be TF32."""


@dataclass
class BatchedPreconditioner(TwoSidedPreconditioner):
    """The factors around a batch of gradients on an accelerator.

    Args:
        stack: the right factors, ``[k, blocks, w, w]``; ``None`` for the identity.
        siblings: how many neighbours of the batch share each of them, k numbers.
        half: whether the matrix sign is computed in float16.
    """

    stack: Tensor | None = None
    siblings: Sequence[int] = ()
    half: bool = False

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

    def _in_half(self, gradient: Tensor) -> Tensor:
        if self.form == "rows":
            z = self._times_left(self._split(gradient), True)
            weighed = None
            if self.stack is not None:
                weighed = self._split(self._times_right(z.view(gradient.shape)))
            return self._times_left(half_newton_schulz(z, weighed)).view(gradient.shape)
        z = self._split(self._times_right(gradient))
        if self.form == "columns":
            weighed = None if self.left is None else self._times_left(z).mT
            sign = half_newton_schulz(z.mT, weighed).mT
        else:
            z = self._times_left(z, True)
            tall = z.shape[1] > z.shape[2]
            sign = self._times_left(half_newton_schulz(z.mT).mT if tall else half_newton_schulz(z))
        return self._times_right(sign.reshape(gradient.shape), True)

    def _widened(self, gradient: Tensor) -> Tensor:
        """``[n, out, c]`` with every block of columns as wide as its factor."""
        if self.stack is None:
            return gradient
        _, blocks, wide, _ = self.stack.shape
        columns = gradient.shape[2]
        width = -(-columns // blocks)
        if blocks > 1 and blocks * width > columns:
            gradient = F.pad(gradient, (0, blocks * width - columns))
        if wide > width:
            gradient = F.pad(gradient.unflatten(2, (blocks, width)), (0, wide - width)).flatten(2)
        return gradient

    def _narrowed(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """The reverse of :meth:`_widened`."""
        if direction.shape == gradient.shape or self.stack is None:
            return direction
        blocks, columns = self.stack.shape[1], gradient.shape[2]
        parts = direction.unflatten(2, (blocks, -1))[..., : -(-columns // blocks)]
        return parts.flatten(2)[..., :columns]

    def _times_left(self, matrices: Tensor, transposed: bool = False) -> Tensor:
        if self.left is None:
            return matrices
        return matmul(self.left.mT if transposed else self.left, matrices, self.precision)

    def _times_right(self, matrices: Tensor, transposed: bool = False) -> Tensor:
        if self.stack is None:
            return matrices
        factors = self.stack.mT if transposed else self.stack
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
    rights = [plan.right for plan in batch if plan.right is not None]
    runs = [(right, len(list(alike))) for right, alike in itertools.groupby(rights)]
    left = None
    if first.left is not None:
        left = torch.cat(optimizer.tensors(batch, "left")).to(first.bound.dtype)
    narrow = config.damping >= DAMPED and not config.covariant_damping
    stack = _stacked(optimizer, first, [right for right, _ in runs])
    return BatchedPreconditioner(
        first.heads, first.form, left, () if stack is None else (stack,),
        config.precision if narrow else "highest", stack, [count for _, count in runs],
        arithmetic(config.precision, first.bound.weight, "sign") == "half",
    )  # fmt: skip


def _stacked(optimizer: AFOpt, first: MatrixPlan, rights: Sequence[RightFactor]) -> Tensor | None:
    """Right factors of one shape, ``[k, blocks, w, w]``, padded to a multiple of 8."""
    if not rights:
        return None
    factors = torch.stack([right.stored(optimizer.state) for right in rights])
    if rights[0].packed:
        size, known = rights[0].shape[-1], optimizer.plan.positions
        if (size, factors.device) not in known:
            places = unpack(torch.arange(packed_size(size), dtype=torch.int32)).flatten()
            known[size, factors.device] = from_cpu(places, factors.device, places.dtype)
        # Read by an index, in one kernel; it is kept for all matrices of this size.
        factors = factors.index_select(-1, known[size, factors.device]).unflatten(-1, (size, size))
    factors = factors.to(first.bound.dtype)
    if first.bound.bias_rests:
        from hf_precond.optimizers.afopt.variants import without_bias

        pairs = zip(rights, factors, strict=True)
        factors = torch.stack([without_bias(right, factor) for right, factor in pairs])
    factors = factors if factors.dim() == 4 else factors.unsqueeze(1)
    extra = -factors.shape[-1] % ALIGNED if factors.shape[-1] > ALIGNED else 0
    return F.pad(factors, (0, extra, 0, extra)) if extra else factors
