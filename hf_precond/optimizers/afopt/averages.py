"""How a step's statistics enter the running moments of AFOpt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_precond.linalg.matrix_functions import pack
from hf_precond.optimizers.afopt.plan import Moment, State
from hf_precond.optimizers.base.parameters import grouped, in_batches
from hf_precond.statistics.moments import mean_of, update_moments
from hf_precond.statistics.requests import Statistic

CHUNK = 1 << 25
"""Elements that are averaged in one batch on a GPU, to bound the memory of temporaries."""
Found = tuple[Moment, Statistic]


def average(
    moments: Sequence[Moment], statistics: Mapping[str, Statistic], state: State, decay: float
) -> dict[str, Tensor]:
    """Put means into moments, on a GPU those of one shape in a few kernels.

    Args:
        moments: those of the optimizer; without a statistic they stay.
        statistics: sums and counts by the moments' keys.
        state: the optimizer's state.
        decay: of the running average, in [0, 1).

    Returns:
        By layer and kind of moment how many means were dropped as not finite: 0-d tensors.
    """

    def kind(one: Found) -> tuple:
        held, total = one[0].stored(state), one[1].sum
        return total.shape, total.dtype, total.device, held.dtype, held.device

    found = [(m, statistics[m.request.key]) for m in moments if m.request.key in statistics]
    dropped: dict[str, Tensor] = {}
    for alike in grouped(found, kind):
        total = alike[0][1].sum
        for part in in_batches(alike, total.numel(), CHUNK if total.is_cuda else 0):
            for (moment, _), flag in zip(part, _average(part, state, decay).unbind(), strict=True):
                name = f"{moment.request.matrix.name} ({moment.request.kind} moment)"
                dropped[name] = flag + dropped[name] if name in dropped else flag
    return dropped


def _average(found: Sequence[Found], state: State, decay: float) -> Tensor:
    """The same for moments of one kind; 1 where a mean was dropped, ``[len(found)]``."""
    held = [moment.stored(state) for moment, _ in found]
    updates = [moment.updates(state) for moment, _ in found]
    sums = _stacked([statistic.sum for _, statistic in found])
    counts = _stacked([statistic.count for _, statistic in found])
    means = mean_of(sums, counts.view(-1, *[1] * (sums.dim() - 1)))
    bad = update_moments(held, updates, pack(means).to(held[0].device), decay)
    # Without a single token, on any rank, there was nothing to drop.
    return bad * (counts > 0).to(bad)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
