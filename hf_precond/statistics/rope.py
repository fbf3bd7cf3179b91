"""Rotary embeddings as matrices: averages of ``R_iᵀ C R_i`` over positions in O(d_h²)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_precond.architectures.attention import forward_names
from hf_precond.architectures.tables import ROTARY


@dataclass(frozen=True)
class Layout:
    """How a model rotates: ``x'_a = cos[c_a] x_a + sign_a · sin[s_a] x_{p_a}``.

    Components that are not rotated have ``sign`` 0 and a cosine of 1
    (``rotated`` False).

    Args:
        partner: the permutation p, ``[d_h]``.
        sign: ``[d_h]``, 1, -1 or 0.
        cosine, sine: which entry of cos and sin a component takes, ``[d_h]``.
        rotated: whether a component is rotated, ``[d_h]``.
    """

    partner: Tensor
    sign: Tensor
    cosine: Tensor
    sine: Tensor
    rotated: Tensor

    def vectors(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Full-length cosines and signed sines, ``[…, d_h]`` each."""
        cosines = torch.where(self.rotated, cos[..., self.cosine], 1.0)
        return cosines, sin[..., self.sine] * self.sign.to(sin.dtype)

    def to(self, device: torch.device) -> Layout:
        """The same layout on a device."""
        return Layout(
            *(getattr(self, item.name).to(device) for item in dataclasses.fields(self))
        )






def half_split(size: int, rotary: int) -> Layout:
    """The common layout: the first ``rotary`` components, halves paired."""
    half = rotary // 2
    partner, sign = torch.arange(size), torch.zeros(size)
    partner[:half], partner[half:rotary] = torch.arange(half, rotary), torch.arange(half)
    sign[:half], sign[half:rotary] = -1.0, 1.0
    index = torch.arange(size).clamp(max=rotary - 1)
    return Layout(partner, sign, index, index, torch.arange(size) < rotary)


def interleaved(size: int) -> Layout:
    """Neighbours paired, as complex numbers are multiplied."""
    index = torch.arange(size)
    sign = torch.ones(size)
    sign[::2] = -1.0
    return Layout(index ^ 1, sign, index, index, torch.ones(size, dtype=torch.bool))


def from_complex(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, one a component, of rotations given as complex numbers a pair."""
    return numbers.real.repeat_interleave(2, -1), numbers.imag.repeat_interleave(2, -1)


def read_layout(module: nn.Module, size: int, cos: Tensor) -> Layout:
    """The layout of an attention, read off the function that its forward rotates with.

    The function is applied to chosen cosines, sines and vectors that give
    each index away. Where it cannot be called so, the half-split layout of
    the width of ``cos`` is taken.

    Args:
        module: the attention.
        size: width of a head.
        cos: cosines as the attention gets them, ``[…, positions, width]``.
    """
    width = cos.shape[-1]
    function = _rotation_of(module)
    if function is not None:
        try:
            return _probe(function, size, [1] * (cos.dim() - 1) + [width])
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            pass
    return half_split(size, min(width, size))


def _rotation_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    forward = inspect.unwrap(type(module).forward)
    for name in forward_names(module):
        function = forward.__globals__.get(name)
        if ROTARY in name and callable(function):
            return function
    return None


def _probe(
    function: Callable[..., tuple[Tensor, Tensor]], size: int, shape: list[int]
) -> Layout:
    width = shape[-1]
    indices = torch.arange(2.0, width + 2).expand(shape)
    zeros, ones = torch.zeros(shape), torch.ones(shape)

    def rotate(vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        vector = vector.expand(1, 1, 1, size).clone()
        return function(vector, vector.clone(), cos.clone(), sin.clone())[0].reshape(size)

    unit = torch.ones(size)
    cosine = rotate(unit, indices, zeros).round().long()
    rotated = rotate(unit, zeros, zeros) == 0
    sine = rotate(unit, zeros, indices).round().long()
    partner = rotate(torch.arange(2.0, size + 2), zeros, ones).round().long()
    layout = Layout(
        partner=torch.where(rotated, partner.abs() - 2, torch.arange(size)),
        sign=torch.where(rotated, partner.sign(), 0).float(),
        cosine=torch.where(rotated, cosine - 2, 0),
        sine=torch.where(rotated, sine.abs() - 2, 0),
        rotated=rotated,
    )
    if not torch.equal(layout.partner.sort().values, torch.arange(size)):
        raise ValueError("not a rotation of pairs")
    return layout


def tables(layout: Layout, cos: Tensor, sin: Tensor, weights: Tensor | None) -> Tensor:
    """Sums over positions of ``c cᵀ``, ``s cᵀ`` and ``s sᵀ``, ``[3, d_h, d_h]``.

    Args:
        layout: the layout.
        cos, sin: ``[…, n, width]``.
        weights: ``[…, n]``, or ``None`` for ones.
    """
    cosines, sines = layout.vectors(cos, sin)
    left = torch.stack([cosines, sines, sines]).flatten(1, -2)
    right = torch.stack([cosines, cosines, sines]).flatten(1, -2)
    if weights is not None:
        left = left * weights.expand(cosines.shape[:-1]).reshape(1, -1, 1)
    return left.mT @ right


def average(layout: Layout, moment: Tensor, mean: Tensor) -> Tensor:
    """``(1/n) Σ_i R_iᵀ C R_i`` for moments ``[…, d_h, d_h]``, exactly, in O(d_h²).

    With ``R = diag(c) + diag(s) P``::

        C ∘ E[c cᵀ] + Pᵀ (C ∘ E[s cᵀ]) + (C ∘ E[c sᵀ]) P + Pᵀ (C ∘ E[s sᵀ]) P

    Args:
        layout: the layout.
        moment: C, symmetric.
        mean: :func:`tables` divided by the number of positions.
    """
    inverse = layout.partner.argsort()
    crossed = (moment * mean[1])[..., inverse, :]
    both = (moment * mean[2])[..., inverse, :][..., inverse]
    return moment * mean[0] + crossed + crossed.mT + both
