"""What one call of a layer adds to the second moments of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from hf_precond.architectures.modules import CONVOLUTIONS
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.statistics.buffer import Part, Spares, block_moment, centred, count_of, moment
from hf_precond.statistics.layer_rows import patches, select_outputs

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
    if spares is None or not rows.is_cpu or is_functorch_wrapped_tensor(rows):
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
