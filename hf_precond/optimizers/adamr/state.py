"""The state of a leaf that AdamR rotates: momentum, factors and bases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.tiling import Tiling
from hf_precond.optimizers.base.parameters import RESHAPED, ParamView, fit


def allocate(view: ParamView, plan: Tiling, config: AdamRConfig) -> None:
    """The momentum, factors and bases of a leaf.

    ``left_factor`` is ``Q_Lᵀ L Q_L``, its lower triangle.
    """
    dtype, device = compute_dtype(view.param.dtype), view.param.device
    kept = config.factor_dtype(view.param.dtype)
    squares = {"left": (plan.tiles, plan.rows, plan.rows)}
    squares["right"] = (plan.tiles, plan.columns, plan.columns)
    # What turns together lies together, and is sent to other ranks without a copy.
    shapes = {"exp_avg": (plan.tiles, plan.rows, plan.columns)}
    if plan.left:
        shapes = {"left_factor": squares["left"], "left_basis": squares["left"]} | shapes
    if plan.right:
        shapes |= {"right_factor": squares["right"], "right_basis": squares["right"]}
    for name, tensor in _neighbours(shapes, dtype, kept, device).items():
        view[name] = tensor
    for side in plan.sides:
        view[f"{side}_energy"] = host_tensor((), device, dtype, float("inf"))
        view[f"{side}_strikes"] = 0
        view[f"{side}_updates"] = 0


def follow(view: ParamView, plan: Tiling, config: AdamRConfig) -> None:
    """Let the state follow its parameter to another dtype or device.

    Raises:
        RuntimeError: it is of another shape, or of other rotated sides.
    """
    dtype, device = compute_dtype(view.param.dtype), view.param.device
    shape, first = (plan.tiles, plan.rows, plan.columns), view["exp_avg"]
    lost = [side for side in plan.sides if f"{side}_factor" not in view]
    if tuple(first.shape) != shape or lost:
        name = f"{view.prefix}exp_avg"
        raise RuntimeError(RESHAPED.format(name=name, held=tuple(first.shape), wanted=shape))
    if first.dtype == dtype and first.device == device:
        return
    kinds = dict.fromkeys(("exp_avg", "exp_avg_sq", "mean_sq"), dtype)
    for side in plan.sides:
        kinds[f"{side}_factor"] = config.factor_dtype(view.param.dtype)
        kinds[f"{side}_basis"] = dtype
        energy = float(view[f"{side}_energy"])
        view[f"{side}_energy"] = host_tensor((), device, dtype, energy)
    for name, kind in kinds.items():
        fit(view.state, view.prefix + name, view[name].shape, kind, device)


def host_tensor(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype, value: float
) -> Tensor:
    """Numbers on the host that a GPU can write to without being waited for."""
    return torch.full(shape, value, dtype=dtype, pin_memory=device.type == "cuda")


def _neighbours(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, kept: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Zeros of these shapes, each after the one before in memory; factors in the dtype ``kept``."""
    dtypes = {name: kept if name.endswith("factor") else dtype for name in shapes}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    totals = dict.fromkeys(dtypes.values(), 0)
    for name, size in sizes.items():
        totals[dtypes[name]] += size
    rooms = {kind: torch.zeros(n, dtype=kind, device=device) for kind, n in totals.items()}
    found, places = {}, dict.fromkeys(rooms, 0)
    for name, shape in shapes.items():
        kind = dtypes[name]
        start, places[kind] = places[kind], places[kind] + sizes[name]
        found[name] = rooms[kind][start : places[kind]].view(shape)
    return found
