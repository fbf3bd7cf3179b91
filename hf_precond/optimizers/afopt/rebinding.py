"""What becomes of AFOpt's state when a model is read again, as after layers were unfrozen."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hf_precond.linalg.matrix_functions import packed_size
from hf_precond.optimizers.afopt.plan import (
    AFOptPlan,
    MatrixPlan,
    Moment,
    RightFactor,
    State,
    StateMatrix,
)


def carry_over(before: AFOptPlan, after: AFOptPlan, state: State) -> None:
    """Gives moments and factors to the matrices that hold them now.

    What the matrices of an attention share lies with the first that trains, which is another one
    where that was unfrozen or frozen. A matrix that got or lost its bias keeps the momentum of its
    weight; moments and factors of another size start anew.

    Args:
        before: the plan so far.
        after: the plan from now on.
        state: the optimizer's, changed in place.
    """
    weights = {item.matrix.name: item.weight for item in after.stored}
    found: dict[Hashable, list[Tensor]] = {}
    for bound, held in before.stored.items():
        own = state.get(weights.get(bound.matrix.name, bound.weight), {})
        for item in held:
            names = [name for name in (item.key, f"{item.key}_updates") if name in own]
            found[_identity(before, item)] = [own.pop(name) for name in names]
    for bound, held in after.stored.items():
        for item in held:
            values = found.get(_identity(after, item))
            if values and tuple(values[0].shape) == stored_shape(item):
                keys = (item.key, f"{item.key}_updates")
                state[bound.weight] |= zip(keys, values, strict=False)
    for plan in after.matrices:
        _fit_momentum(plan, state)


def stored_shape(item: StateMatrix) -> tuple[int, ...]:
    """The shape in which a moment or factor is kept."""
    *first, size = item.shape[:-1]
    return (*first, packed_size(size)) if item.packed else item.shape


def _fit_momentum(plan: MatrixPlan, state: State) -> None:
    bound = plan.bound
    held, name = state.get(bound.weight, {}), f"{bound.prefix}momentum"
    if name in held:
        held[name] = F.pad(held[name], (0, bound.matrix.columns - held[name].shape[1]))


def _identity(plan: AFOptPlan, item: StateMatrix) -> Hashable:
    """What a moment or factor is, whichever matrix holds it."""
    if isinstance(item, Moment):
        holder = plan.of[item.bound]
        if holder.block is not None:
            return holder.block.name, item.name
        pair = holder.pair
        layer = item.bound.matrix if pair is None or pair.base is None else pair.base
        return layer.name, item.name
    if isinstance(item, RightFactor):
        down = None if item.down is None else item.bound.matrix.name
        return _identity(plan, item.moment), item.columns, item.kind, down
    return item.bound.matrix.name, item.name


def with_momentum(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> set[int]:
    """``id`` of the parameters whose saved state has a momentum.

    Args:
        state_dict: in which state may be nested where a name has a dot.
        groups: the parameter groups of the optimizer that loads it.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    own = [parameter for group in groups for parameter in group["params"]]
    held = state_dict["state"]
    return {id(p) for i, p in zip(saved, own, strict=False) if _has_momentum(held.get(i, {}))}


def _has_momentum(state: Mapping[str, Any]) -> bool:
    return any(
        _has_momentum(value) if isinstance(value, Mapping) else name.endswith("momentum")
        for name, value in state.items()
    )


def begin_adapters(plan: AFOptPlan, state: State) -> int:
    """Drops the fallback optimizer's state of LoRA's A and B outside attention.

    Release 0.2 left these to it; with a state of that release they begin anew.

    Args:
        plan: the optimizer's.
        state: the optimizer's, changed in place.

    Returns:
        How many had such a state.
    """
    adapters = [each.bound for each in plan.matrices if each.pair is not None]
    held = [item for item in adapters if state.get(item.weight)]
    earlier = [
        item
        for item in held
        if state[item.weight].keys().isdisjoint(s.key for s in plan.stored[item])
    ]
    for item in earlier:
        del state[item.weight]
    return len(earlier)
