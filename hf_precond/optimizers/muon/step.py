"""Muon's step: the matrix sign of the momentum, matrices of one shape together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.distributed import collectives
from hf_precond.distributed.collectives import full, is_sharded, like
from hf_precond.linalg.matrix_functions import STEPS, frobenius_norm, newton_schulz
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.base.fallback import AdamWFallback, descend
from hf_precond.optimizers.base.parameters import ParamView, grouped, in_batches

MOMENTUM, ROWS = "momentum_buffer", "row_second_moment"

EPS = 1e-7
"""Smallest Frobenius norm that a momentum is divided by: torch's."""
ROW_EPS = 1e-8
"""Added to the root of a row's mean square."""
CHUNK = {"cpu": 2**20, "cuda": 2**25}
"""Entries stepped in one batch: bounds the memory of temporaries."""
SHARED = 256
"""Smaller side from which a sign costs more than sending it: ranks share these."""


@dataclass(eq=False)
class MuonStep:
    """Steps matrices in place by the sign of their momentum.

    The formula is :class:`~hf_precond.optimizers.muon.optimizer.Muon`'s. Views of one shape and
    parameter group are one batch of products; with several ranks, each computes its share of
    large batches, and all get the same bits. The rest is elementwise, of sharded parameters on
    the shards.

    Args:
        lr_scale: learning rate of the matrices over the group's, > 0.
        nesterov: Nesterov's form of the momentum.
        ns_steps: Newton–Schulz steps.
        adjust_lr_fn: ``match_rms_adamw`` or ``original``.
        variant: ``muon`` or ``normuon``.
        normuon_beta2: decay of the rows' running mean square.
    """

    lr_scale: float = 1.0
    nesterov: bool = True
    ns_steps: int = STEPS
    adjust_lr_fn: str = "match_rms_adamw"
    variant: str = "muon"
    normuon_beta2: float = 0.95

    def update(self, views: Sequence[ParamView]) -> list[tuple[Sequence[ParamView], Tensor]]:
        """Step every view by its gradient; its state has been made.

        Args:
            views: of matrices.

        Returns:
            The views in batches, and of each batch whose momentum was not finite, ``[n]``.
        """
        return [(batch, self.step(batch)) for batch in batches(views)]

    def step(self, batch: Sequence[ParamView]) -> Tensor:
        """Step views that :func:`batches` found alike; their gradients become what is descended.

        Args:
            batch: of matrices.

        Returns:
            Whose momentum was not finite, ``[n]``.
        """
        directions = self.directions(batch, self._advance(batch))
        parts = _as_parameters(batch, directions.split(len(directions) // len(batch)))
        for view, step in zip(batch, parts, strict=True):
            view.grad = step
        descend(batch)
        # One number that is not finite makes every entry of its matrix's sign NaN.
        return directions[:, 0, 0].isnan().view(len(batch), -1).any(1)

    def _advance(self, batch: Sequence[ParamView]) -> list[Tensor]:
        """``M ← μ M + (1-μ) G``; returns N, ``μ M + (1-μ) G`` once more under Nesterov, else M."""
        momenta = [view[MOMENTUM] for view in batch]
        pairs = zip(batch, momenta, strict=True)
        grads = [view.grad.to(m.dtype).reshape(m.shape) for view, m in pairs]
        decay = batch[0].group["momentum"]
        torch._foreach_lerp_(momenta, grads, 1 - decay)
        if not self.nesterov:
            return momenta
        if is_sharded(momenta[0]):  # torch before 2.13 has no rule for the one call of them all
            return [grad.lerp(m, decay) for grad, m in zip(grads, momenta, strict=True)]
        return list(torch._foreach_lerp(grads, momenta, decay))

    def directions(
        self, batch: Sequence[ParamView], momenta: Sequence[Tensor], advance: bool = True
    ) -> Tensor:
        """What a step subtracts, per unit of the group's learning rate.

        Args:
            batch: views of one shape.
            momenta: N of each, shaped like its state.
            advance: average the rows' mean squares first, under ``normuon``.

        Returns:
            ``[n, m, k]``, every expert and every group of a convolution a matrix of its own.
        """
        if is_sharded(momenta[0]):  # rounded before they are gathered: half the traffic
            momenta = [full(momentum.bfloat16()) for momentum in momenta]
        stacked = torch.cat(as_matrices(batch, momenta))
        stack = stacked.bfloat16()
        directions = self._signs(stack).to(compute_dtype(batch[0].param.dtype))
        if self.variant == "normuon":
            directions = self._even_rows(batch, directions, advance)
        rows, columns = stack.mT.shape[1:] if _is_transposed(batch[0]) else stack.shape[1:]
        matched = self.adjust_lr_fn == "match_rms_adamw"
        ratio = (
            0.2 * math.sqrt(max(rows, columns)) if matched else math.sqrt(max(1, rows / columns))
        )
        return directions.mul_(self.lr_scale * ratio)

    def _signs(self, stack: Tensor) -> Tensor:
        """``msign`` of each matrix, in bfloat16; shared out where that pays."""
        ranks, count = collectives.world_size(), len(stack)
        if ranks == 1 or count == 1 or min(stack.shape[1:]) < SHARED:
            return self._own_signs(stack)
        owners = [place * ranks // count for place in range(count)]
        mine = [place for place, owner in enumerate(owners) if owner == collectives.rank()]
        signs = torch.empty_like(stack)
        if mine:
            own = slice(mine[0], mine[-1] + 1)
            signs[own] = self._own_signs(stack[own])
        collectives.broadcast_results([[sign] for sign in signs.unbind()], owners)
        return signs

    def _own_signs(self, stack: Tensor) -> Tensor:
        """In one batch on an accelerator; on a CPU one by one, which rounds as torch's Muon does.

        A batch may add up the products of its matrices in another order.
        """
        batches = stack.split(1) if stack.is_cpu else [stack]
        return torch.cat([newton_schulz(part, self.ns_steps, EPS) for part in batches])

    def _even_rows(self, batch: Sequence[ParamView], signs: Tensor, advance: bool) -> Tensor:
        """NorMuon: rows over the root of their running mean square, each matrix's norm kept."""
        inputs = -2 if _is_transposed(batch[0]) else -1
        moments = torch.stack([view[ROWS] for view in batch]).view(len(signs), -1)
        if advance:
            squares = signs.square().mean(inputs)
            # A gradient that is not finite shows in the weights, as everywhere, and not here.
            squares = torch.where(squares.isfinite(), squares, moments)
            moments.lerp_(squares, 1 - self.normuon_beta2)
            parts = moments.view(len(batch), -1).unbind()
            torch._foreach_copy_([view[ROWS] for view in batch], parts)
        even = signs / (moments.sqrt() + ROW_EPS).unsqueeze(inputs)
        return even.mul_(frobenius_norm(signs) / frobenius_norm(even))


def batches(views: Sequence[ParamView]) -> Iterator[Sequence[ParamView]]:
    """Views of one shape, parameter group, dtype and device, at most :data:`CHUNK` entries a rank.

    Args:
        views: of matrices.
    """

    def key(view: ParamView) -> tuple[Any, ...]:
        param = view.param
        mesh = getattr(param, "device_mesh", None)
        layout = _shape(view), _is_transposed(view)
        return id(view.group), layout, param.dtype, param.device, mesh

    for alike in grouped(views, key):
        limit = CHUNK.get(alike[0].param.device.type, CHUNK["cuda"])
        size = math.prod(_shape(alike[0]))
        yield from in_batches(alike, size, limit * collectives.world_size())


def stack_shape(matrix: LayerMatrix) -> tuple[int, int, int]:
    """``(count, out, in)``: a weight's experts, or the groups of a convolution, one by one.

    As they are stored: ``(count, in, out)`` where :func:`holds_transposes`.

    Args:
        matrix: the weight.
    """
    if matrix.stack:
        rows, columns = matrix.shape[::-1] if holds_transposes(matrix) else matrix.shape
        return matrix.stack[0], rows, columns
    rows, columns = matrix.shape
    if matrix.layout == "transposed":
        return 1, columns, rows
    return matrix.groups, rows // matrix.groups, columns


def holds_transposes(matrix: LayerMatrix) -> bool:
    """Whether a weight is stored ``[in, out]``, as ``Conv1D`` and some experts are.

    Args:
        matrix: the weight.
    """
    return matrix.layout == "transposed"


def as_matrices(batch: Sequence[ParamView], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parameters, or tensors of their shapes, as matrices of :func:`stack_shape`.

    Args:
        batch: views of matrices of one shape.
        tensors: shaped like the parameters, or ``[out, in]`` where those are rows of fused ones.
    """
    shape, turned = _shape(batch[0]), _is_transposed(batch[0])
    return [
        (tensor.mT if turned and view.matrix_shape is not None else tensor).reshape(shape)
        for view, tensor in zip(batch, tensors, strict=True)
    ]


def _as_parameters(batch: Sequence[ParamView], matrices: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`as_matrices`, sharded as the parameters are."""
    turned, sharded = _is_transposed(batch[0]), is_sharded(batch[0].param)
    whole = [
        (part.mT if turned and view.matrix_shape is not None else part).reshape(view.param.shape)
        for view, part in zip(batch, matrices, strict=True)
    ]
    if not sharded:
        return whole
    return [like(view.param, tensor) for view, tensor in zip(batch, whole, strict=True)]


def _shape(view: ParamView) -> tuple[int, ...]:
    return (1, *view.shape) if view.matrix is None else stack_shape(view.matrix)


def _is_transposed(view: ParamView) -> bool:
    return view.matrix is not None and holds_transposes(view.matrix)


class MuonFallback(AdamWFallback):
    """Muon for the views that are marked ``hidden``, AdamW for all others.

    Args:
        lr_scale: learning rate of the matrices over the group's, > 0.
        nesterov: Nesterov's form of the momentum.
    """

    def __init__(self, lr_scale: float = 1.0, nesterov: bool = True) -> None:
        super().__init__()
        self.step = MuonStep(lr_scale, nesterov)

    def allocate(self, views: Sequence[ParamView]) -> None:
        """Makes the momentum of hidden matrices, and AdamW's moments of all others."""
        for view in views:
            if view.hidden and not view.settled:
                view.zeros(MOMENTUM)
        super().allocate([view for view in views if not view.hidden])

    def update(self, views: Sequence[ParamView]) -> None:
        """Steps hidden matrices by Muon and all others by AdamW."""
        super().update([view for view in views if not view.hidden])
        hidden = [view for view in views if view.hidden]
        self.allocate(hidden)
        self.step.update(hidden)
