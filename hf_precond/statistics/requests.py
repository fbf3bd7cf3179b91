"""Statistics that an optimizer requests from a model, their sources and running averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from hf_precond.architectures.structure import LayerMatrix, NormParameter

if TYPE_CHECKING:
    from hf_precond.architectures.attention_block import AttentionBlock


@dataclass(frozen=True)
class MomentRequest:
    """A second moment to collect from the model's forward and backward passes.

    ``input``: ``sum over tokens of x̂ x̂ᵀ`` of what enters ``matrix`` (with the
    constant 1 behind it where the matrix has a bias), ``[in(+1), in(+1)]``.
    ``output_grad``: ``sum of δ δᵀ``, δ the loss gradient of what leaves
    ``matrix``, ``[out, out]``.
    ``query`` / ``key``: per head, of the queries or keys as they meet in the
    logits (normed and rotated), ``[H or H_kv, d_h, d_h]``; ``attention`` is set.
    ``entropy``: per head, the sum over query positions of the entropy of their
    attention weights in nats, ``[H]``; ``attention`` is set.

    Of a stack of experts sum and count are those of each, ``[experts, …]`` and ``[experts]``, over
    the tokens that were routed to it.

    Args:
        key: the name of the statistic in what the source returns; unique.
        kind: what is collected.
        matrix: the matrix whose input or output gradient it is.
        attention: the attention whose queries or keys they are.
        average_rotation: for ``query`` / ``key`` under RoPE: return the
            average of ``R_iᵀ C R_i`` over the positions, C the moment of
            the rotated vectors, instead of C.
        blocks: for ``input``: collect only the ``blocks`` diagonal blocks of
            ``width = ceil(columns / blocks)`` columns each, as
            ``[blocks, width, width]``; columns beyond the last are zeros.
        rows: for ``input`` and ``output_grad``: at most so many rows of a
            call enter (sum and count), evenly spaced; for ``entropy``, so many
            query positions of a sequence; 0 for all.
        scale: for ``output_grad``: what gradients are multiplied by before
            they are squared; the sum is ``scale²`` times its own.
        reached: for ``input`` of a linear layer: of the tokens whose output has
            a gradient, where these can be told; a classifier's loss may read
            one of a sequence, whatever the mask says of it.
    """

    key: str
    kind: Literal["input", "output_grad", "query", "key", "entropy"]
    matrix: LayerMatrix
    attention: AttentionBlock | None = None
    average_rotation: bool = False
    blocks: int = 1
    rows: int = 0
    scale: float = 1.0
    reached: bool = False


@dataclass(frozen=True)
class CurvatureRequest:
    """Hessian-vector products of the training loss on norm parameters.

    The statistic under ``key`` is the estimate of the Hessian diagonal of one
    parameter: ``z ∘ Hz`` (``rademacher``), ``Hz`` with ``z`` of ones inside
    the probed tensors and zeros elsewhere (``ones``), or the diagonal itself
    (``exact``), shaped like the parameter, summed over micro-batches; its
    count is 1, so that sum over count averages over ranks.

    Requests that fall on the same step are probed together, in one product.

    Args:
        key: the name of the statistic in what the source returns; unique.
        norm: the parameter.
        probe: the estimator.
        period: of the steps that are collected, probe those whose number is
            ``phase`` modulo ``period``.
        phase: see ``period``; in [0, period).
        autocast: whether the passes may stay under autocast; outside it they
            run in the precision of the weights. ``None``: under bfloat16
            autocast on accelerators.
    """

    key: str
    norm: NormParameter
    probe: Literal["rademacher", "ones", "exact"]
    period: int = 1
    phase: int = 0
    autocast: bool | None = False


Request = MomentRequest | CurvatureRequest
HEAD_KINDS = ("query", "key", "entropy")
"""Kinds of moments that come from the calls of an attention's kernel, per head."""


@dataclass
class Statistic:
    """A sum and its count.

    Args:
        sum: the sum, in float32 (float64 for float64 models), detached.
        count: what the sum is divided by for a mean: tokens (weighted by the
            attention mask) or passes; a 0-d tensor on the sum's device, ``[n]``
            of n experts.
    """

    sum: Tensor
    count: Tensor


class StatisticsSource(Protocol):
    """Where an optimizer's statistics come from.

    Attributes:
        loss_scale: what the loss is multiplied by before backward (float16
            training), or a function that returns it; ``None`` for 1. Output
            gradients are divided by it; a source without them ignores it.
        outdated: the passes have shown that the model is not as the requests
            suppose (:class:`~hf_precond.statistics.shared_inputs.InputCheck`); the
            optimizer makes them anew.
    """

    loss_scale: Tensor | float | Callable[[], Tensor | float | None] | None = None
    outdated: bool = False

    def enable(self, due: bool, step: int) -> None:
        """Collects (or not) in the passes before the optimizer's step number ``step``.

        Args:
            due: whether to collect.
            step: the number of the step.
        """

    def take(self) -> dict[str, Statistic]:
        """Returns what was collected since the last call, by request key, and forgets it."""

    def missing(self, key: str) -> str:
        """Returns why nothing was collected for a request the last time; empty if not known.

        Args:
            key: the request's.
        """
        return ""

    def watch(self) -> None:
        """Looks out, from the next statistics on, for what the calls of modules do not show."""
        return

    def drop(self) -> None:
        """Forgets what was collected (a skipped step)."""

    def close(self) -> None:
        """Removes every hook."""


@runtime_checkable
class CurvatureSource(StatisticsSource, Protocol):
    """A source that needs the loss itself, for Hessian-vector products."""

    def context(self) -> AbstractContextManager[None]:
        """Returns a context inside which forward and backward can be differentiated twice."""

    def record(
        self,
        owner: Any,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Makes a call of a Trainer's ``compute_loss`` and, where due, keeps how to make it again.

        Args:
            owner: the Trainer.
            function: its bound method.
            args: of the call.
            kwargs: of the call.

        Returns:
            What the call returned.
        """

    def observe(
        self,
        loss: Tensor | Callable[[], Tensor],
        weight: float = 1.0,
        scale: Tensor | float | None = None,
    ) -> bool:
        """Adds the products of ``weight * loss`` if they are due.

        Args:
            loss: a scalar with its graph, or a function that returns the loss.
            weight: what the training multiplies the loss by.
            scale: loss scale to compute under.

        Returns:
            Whether the loss is this model's and was due.
        """


def all_reduce_statistics(
    collected: Mapping[str, Statistic],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    experts: Mapping[str, int] | None = None,
) -> dict[str, Statistic]:
    """Sums every statistic over the ranks, in one collective.

    A rank whose module had no tokens collected nothing and adds zeros, so every
    rank takes part in the same collective. Sums and counts are added; a
    statistic that no rank collected has count 0.

    Args:
        collected: what this rank collected, by key.
        shapes: every requested key, with its shape; the same on all ranks.
        dtype: dtype of the sums.
        device: where the collective runs.
        experts: keys whose statistics are those of so many experts.

    Returns:
        A statistic for every key of ``shapes``.
    """
    experts = experts or {}
    parts: list[Tensor] = []
    for key, shape in shapes.items():
        own = collected.get(key)
        if own is None:
            size = math.prod(shape) + experts.get(key, 1)
            parts.append(torch.zeros(size, dtype=dtype, device=device))
            continue
        if tuple(own.sum.shape) != tuple(shape):
            raise ValueError(f"{key}: its sum is {tuple(own.sum.shape)}, not {tuple(shape)}.")
        parts += [own.sum.to(dtype).flatten(), own.count.to(own.sum.device, dtype).flatten()]
    bucket = torch.cat(parts)
    dist.all_reduce(bucket)
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    blocks = bucket.split([size + experts.get(key, 1) for key, size in sizes.items()])
    return {
        key: Statistic(
            block[: sizes[key]].view(*shape),
            block[sizes[key] :] if key in experts else block[-1],
        )
        for (key, shape), block in zip(shapes.items(), blocks, strict=True)
    }
