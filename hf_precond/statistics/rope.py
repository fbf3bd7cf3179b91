"""Rotary embeddings as matrices: averages of ``R_iᵀ C R_i`` over positions in O(d_h²)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_precond.architectures.attention import forward_names
from hf_precond.architectures.modules import class_names
from hf_precond.architectures.tables import (
    INTERLEAVED_FLAG,
    INTERLEAVED_ROTATION,
    OWN_ROTATIONS,
    ROTARY,
    ROTATION_KIND,
)
from hf_precond.compat.torch_internals import Hook
from hf_precond.linalg.products import compute_dtype
from hf_precond.statistics.moments import count_of
from hf_precond.statistics.requests import Statistic
from hf_precond.statistics.token_weights import Reader


@dataclass(frozen=True)
class Layout:
    """How a model rotates: ``x'_a = cos[c_a] y_a + sign_a · sin[s_a] y_{p_a}``, ``y_a = x_{o_a}``.

    Components that are not rotated have ``sign`` 0 and a cosine of 1
    (``rotated`` False).

    Args:
        partner: the permutation p, ``[d_h]``.
        sign: ``[d_h]``, 1, -1 or 0.
        cosine: which entry of cos a component takes, ``[d_h]``.
        sine: which entry of sin a component takes, ``[d_h]``.
        rotated: whether a component is rotated, ``[d_h]``.
        order: the permutation o, ``[d_h]``: in which order the components are rotated.
    """

    partner: Tensor
    sign: Tensor
    cosine: Tensor
    sine: Tensor
    rotated: Tensor
    order: Tensor

    def behind(self, plain: int) -> Layout:
        """Returns the layout with so many components in front that are not rotated.

        Args:
            plain: their number.
        """

        def moved(value: Tensor, front: Tensor, shift: int = 0) -> Tensor:
            return torch.cat([front.to(value), value + shift]) if plain else value

        zeros, places = torch.zeros(plain), torch.arange(plain)
        return Layout(
            partner=moved(self.partner, places, plain),
            sign=moved(self.sign, zeros),
            cosine=moved(self.cosine, zeros),
            sine=moved(self.sine, zeros),
            rotated=torch.cat([zeros.to(self.rotated), self.rotated]),
            order=moved(self.order, places, plain),
        )

    def vectors(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Returns full-length cosines and signed sines, ``[…, d_h]`` each.

        Args:
            cos: ``[…, width]``.
            sin: ``[…, width]``.
        """
        cosines = torch.where(self.rotated, cos[..., self.cosine], 1.0)
        return cosines, sin[..., self.sine] * self.sign.to(sin.dtype)

    def to(self, device: torch.device) -> Layout:
        """Returns the same layout on a device.

        Args:
            device: the device.
        """
        return Layout(*(value.to(device) for value in vars(self).values()))


@dataclass(frozen=True)
class Rotation:
    """The cosines and sines of one call, ``[B or 1, positions, width]`` each.

    Args:
        cos: the cosines.
        sin: the sines.
        paired: whether they came as complex numbers, one a pair of neighbours.
    """

    cos: Tensor
    sin: Tensor
    paired: bool = False

    @classmethod
    def read(cls, value: Any) -> Rotation | None:
        """Returns the rotation in a pair of cosines and sines or in complex numbers.

        Args:
            value: what an attention is called with; ``None`` is returned for anything else.
        """
        if isinstance(value, Tensor) and value.is_complex() and value.dim() in (2, 3):
            numbers = value.detach()
            cos, sin = (part.repeat_interleave(2, -1) for part in (numbers.real, numbers.imag))
            return cls(_by_position(cos), _by_position(sin), paired=True)
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            return None
        cos, sin = value
        if not all(isinstance(part, Tensor) and part.dim() in (2, 3, 4) for part in value):
            return None
        if cos.shape != sin.shape or not cos.is_floating_point():
            return None
        return cls(_by_position(cos.detach()), _by_position(sin.detach()))


def _by_position(part: Tensor) -> Tensor:
    """Cosines or sines as ``[B or 1, positions, width]``, where there is one per position."""
    if part.dim() == 4:  # [B, 1, N, width] or [B, N, 1, width]
        part = part.squeeze(1) if part.shape[1] == 1 else part.squeeze(2)
    return part.unsqueeze(0) if part.dim() == 2 else part


class UnreadRotationError(RuntimeError):
    """The rotation of an attention's queries and keys cannot be read."""


class RopeReader:
    """Reads the cosines and sines that an attention is called with, or that its child makes.

    Args:
        module: the attention.
        path: its path.
        hooks: takes what removes the hooks.
        plain: so many components in front are not rotated, and the function that rotates does
            not get them.
    """

    def __init__(self, module: nn.Module, path: str, hooks: ExitStack, plain: int = 0) -> None:
        self.enabled = False
        self.plain = plain
        self.module = module
        self.path = path
        self.layout: Layout | None = None
        self.rotation: Rotation | None = None
        self.unrotated = False
        parameters = inspect.signature(module.forward).parameters
        names = class_names(module) & OWN_ROTATIONS.keys()
        self.own = next((OWN_ROTATIONS[name] for name in names), None)
        self.place = list(parameters).index(self.own[0]) if self.own else 0
        self.positions: Tensor | None = None
        known = parameters.get("position_embeddings")
        self.default = self if known is None else known.default
        before = module.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True)
        hooks.callback(before.remove)
        for child in module.modules():
            if child is not module and ROTARY in type(child).__name__.lower():
                hooks.callback(child.register_forward_hook(Hook(self._after_child)).remove)

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.enabled and self.own is not None:
            behind = args[self.place] if len(args) > self.place else None
            self.positions = kwargs.get(self.own[0], behind)
        elif self.enabled:
            given = kwargs.get("position_embeddings", self.default if len(args) < 2 else self)
            if isinstance(given, dict):
                given = given.get(getattr(module, ROTATION_KIND, None))
            self.unrotated = given is None
            rotations = map(Rotation.read, (given, *args))
            self.rotation = next((found for found in rotations if found is not None), None)

    def _after_child(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.enabled:
            self.rotation = Rotation.read(output) or self.rotation

    def tables(self, query: Tensor, reader: Reader) -> Statistic:
        """Returns the sums of :func:`tables` over the query positions of one call.

        Args:
            query: ``[B, H, N, d_h]``.
            reader: of the queries' token weights.

        Raises:
            UnreadRotationError: there is not one cosine and sine per position.
        """
        batch, _, length, size = query.shape
        rotation = self.rotation if self.own is None else self._inside(query)
        width = size - self.plain
        if rotation is None and self.unrotated:
            rotation = Rotation(query.new_ones(1, 1, width), query.new_zeros(1, 1, width))
        if rotation is None or rotation.cos.dim() != 3 or rotation.cos.shape[0] not in (1, batch):
            raise UnreadRotationError(
                f"{self.path}: the rotation of its queries and keys cannot be read (it is called "
                "without position_embeddings of one cosine and sine a position, and has no rotary "
                "module of its own); use rope='ignored'."
            )
        if self.layout is None:
            paired = rotation.paired
            layout = interleaved(width) if paired else read_layout(self.module, width, rotation.cos)
            self.layout = layout.behind(self.plain).to(query.device)
        dtype = compute_dtype(query.dtype)
        cos = rotation.cos.to(dtype).expand(batch, -1, -1)
        sin = rotation.sin.to(dtype).expand(batch, -1, -1)
        front = length - cos.shape[1]
        if front > 0:  # tokens in front that are not rotated (class tokens)
            cos, sin = F.pad(cos, (0, 0, front, 0), value=1.0), F.pad(sin, (0, 0, front, 0))
        # Vision towers call their kernel once an image, with the positions of all images.
        positions = cos.shape[1]
        weights = reader.read((batch, positions, size), dtype)
        total = tables(self.layout, cos, sin, weights)
        return Statistic(total, count_of(batch * positions, weights, total))

    def _inside(self, query: Tensor) -> Rotation:
        """The rotation that an attention computes itself, from what it makes of unit vectors."""
        assert self.own is not None
        locate, apply = (getattr(self.module, name) for name in self.own[1:])
        positions = locate(query[:, 0], self.positions)
        even = torch.zeros_like(query)
        even[..., ::2] = 1
        ahead, behind = (apply(part, positions)[:, 0] for part in (even, 1 - even))
        cos = torch.where(even[:, 0] > 0, ahead, behind)
        return Rotation(cos, torch.where(even[:, 0] > 0, -behind, ahead), paired=True)

    def average(self, moment: Tensor, rotation: Statistic) -> Tensor:
        """Returns :func:`average` of a moment.

        Args:
            moment: of rotated vectors, ``[…, d_h, d_h]``.
            rotation: the sum of :meth:`tables`.
        """
        assert self.layout is not None
        return average(self.layout, moment, rotation.sum / rotation.count.clamp(min=1))


def half_split(size: int, rotary: int) -> Layout:
    """Returns the common layout: the first ``rotary`` components are rotated, halves paired.

    Args:
        size: width of a head.
        rotary: how many components are rotated.
    """
    half = rotary // 2
    partner, sign = torch.arange(size), torch.zeros(size)
    partner[:half], partner[half:rotary] = torch.arange(half, rotary), torch.arange(half)
    sign[:half], sign[half:rotary] = -1.0, 1.0
    index = torch.arange(size).clamp(max=rotary - 1)
    return Layout(partner, sign, index, index, torch.arange(size) < rotary, torch.arange(size))


def interleaved(size: int) -> Layout:
    """Returns the layout that pairs neighbours, as complex numbers are multiplied.

    Args:
        size: width of a head.
    """
    index = torch.arange(size)
    sign = torch.ones(size)
    sign[::2] = -1.0
    return Layout(index ^ 1, sign, index, index, torch.ones(size, dtype=torch.bool), index)


def read_layout(module: nn.Module, size: int, cos: Tensor) -> Layout:
    """Returns the layout of an attention, by probing the function that its forward rotates with.

    The function is applied to cosines, sines and vectors that hold indices,
    so that its result shows which entry went where. Where it cannot be called
    so, the half-split layout of the width of ``cos`` is returned.

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


def _rotation_of(module: nn.Module) -> Callable[..., Any] | None:
    forward = inspect.unwrap(type(module).forward)
    apart = getattr(getattr(module, "config", None), INTERLEAVED_FLAG, True)
    for name in forward_names(module):
        function = forward.__globals__.get(name)
        chosen = apart or not name.endswith(INTERLEAVED_ROTATION)
        if ROTARY in name and callable(function) and chosen:
            return function
    return None


def _probe(function: Callable[..., Any], size: int, shape: list[int]) -> Layout:
    width = shape[-1]
    indices = torch.arange(2.0, width + 2).expand(shape)
    zeros, ones = torch.zeros(shape), torch.ones(shape)

    names = list(inspect.signature(function).parameters)
    alone = len(names) > 1 and "cos" in names[1]

    def rotate(vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        vector = vector.expand(1, 1, 1, size).clone()
        if alone:
            return function(vector, cos.clone(), sin.clone()).reshape(size)
        return function(vector, vector.clone(), cos.clone(), sin.clone())[0].reshape(size)

    unit, places = torch.ones(size), torch.arange(2.0, size + 2)
    cosine = rotate(unit, indices, zeros).round().long()
    rotated = rotate(unit, zeros, zeros) == 0
    sine = rotate(unit, zeros, indices).round().long()
    order = rotate(places, ones, zeros).round().long() - 2
    partner = rotate(places, zeros, ones).round().long()
    inverse = order.argsort()
    layout = Layout(
        partner=torch.where(rotated, inverse[(partner.abs() - 2) % size], torch.arange(size)),
        sign=torch.where(rotated, partner.sign(), 0).float(),
        cosine=torch.where(rotated, cosine - 2, 0),
        sine=torch.where(rotated, sine.abs() - 2, 0),
        rotated=rotated,
        order=order,
    )
    for permutation in (layout.partner, layout.order):
        if not torch.equal(permutation.sort().values, torch.arange(size)):
            raise ValueError("not a rotation of pairs")
    return layout


def tables(layout: Layout, cos: Tensor, sin: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the sums over positions of ``c cᵀ``, ``s cᵀ`` and ``s sᵀ``, ``[3, d_h, d_h]``.

    Args:
        layout: the layout.
        cos: ``[…, n, width]``.
        sin: ``[…, n, width]``.
        weights: ``[…, n]``, or ``None`` for ones.
    """
    cosines, sines = layout.vectors(cos, sin)
    left = torch.stack([cosines, sines, sines]).flatten(1, -2)
    right = torch.stack([cosines, cosines, sines]).flatten(1, -2)
    if weights is not None:
        left = left * weights.expand(cosines.shape[:-1]).reshape(1, -1, 1)
    return left.mT @ right


def average(layout: Layout, moment: Tensor, mean: Tensor) -> Tensor:
    """Returns ``(1/n) Σ_i R_iᵀ C R_i`` for moments ``[…, d_h, d_h]``, exactly, in O(d_h²).

    With ``R = diag(c) + diag(s) P``::

        C ∘ E[c cᵀ] + Pᵀ (C ∘ E[s cᵀ]) + (C ∘ E[c sᵀ]) P + Pᵀ (C ∘ E[s sᵀ]) P

    in the order in which the components are rotated, given back in that of x.

    Args:
        layout: the layout.
        moment: C, symmetric.
        mean: :func:`tables` divided by the number of positions.
    """
    inverse = layout.partner.argsort()
    crossed = (moment * mean[1])[..., inverse, :]
    both = (moment * mean[2])[..., inverse, :][..., inverse]
    result = moment * mean[0] + crossed + crossed.mT + both
    inverse = layout.order.argsort()
    return result[..., inverse, :][..., inverse]
