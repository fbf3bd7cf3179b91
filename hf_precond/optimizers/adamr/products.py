"""The large products of AdamR: what enters a factor, and what turns with a basis."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_precond.linalg import eigenbasis
from hf_precond.linalg.workspace import Workspace
from hf_precond.optimizers.base.parameters import ParamView


def accumulate(factor: Tensor, root: Tensor, keep: float, weight: float) -> None:
    """``B ← keep B + weight X Xᵀ``, at least in the lower triangle.

    Args:
        factor: B, ``[n, n]`` or ``[b, n, n]``, changed in place.
        root: X, ``[…, n, k]``.
        keep: multiplier of B.
        weight: multiplier of ``X Xᵀ``.
    """
    if factor.dtype != root.dtype:
        wide = factor.to(root.dtype).mul_(keep)
        factor.copy_(wide.add_(root @ root.mT, alpha=weight))
    elif factor.dim() == 3:
        factor.baddbmm_(root, root.mT, beta=keep, alpha=weight)
    elif len(factor) < eigenbasis.BANDED or not factor.is_cpu:
        factor.addmm_(root, root.mT, beta=keep, alpha=weight)
    else:
        for rows in eigenbasis.bands(len(factor)):
            band, before = factor[rows, : rows.stop], root[: rows.stop]
            band.addmm_(root[rows], before.mT, beta=keep, alpha=weight)


def observe(view: ParamView, side: str, mean: Tensor, decay: float) -> Tensor:
    """``B ← decay B + (1-decay) Qᵀ S Q`` with a second moment S of the layer's features.

    Args:
        leaf: the leaf.
        side: ``left`` or ``right``.
        mean: S, ``[n, n]``; one that is not finite changes nothing.
        decay: in [0, 1).

    Returns:
        1 where S was dropped, else 0: a 0-d tensor.
    """
    factor = view[f"{side}_factor"]
    mean = mean.to(view["exp_avg"].dtype)[None]
    usable = torch.isfinite(mean).all()
    weight = torch.where(usable, 1 - decay, 0.0)
    mean = torch.where(usable, mean, 0.0)
    if view["step"] > 0:
        mean = eigenbasis.congruence(view[f"{side}_basis"], mean)
    factor.copy_(factor.to(mean.dtype).mul_(1 - weight).add_(mean * weight))
    return (~usable).to(torch.int64)


def turn(
    side: str,
    rotation: Tensor,
    matrix: Tensor,
    workspace: Workspace | None = None,
    role: str = "turn",
) -> Tensor:
    """``Pᵀ M`` on the left, ``M P`` on the right.

    With a workspace the result's memory is taken over by the next call of the
    same role and shape.
    """
    out = (workspace or Workspace()).take(role, matrix.shape, matrix)
    if side == "left":
        return eigenbasis.product(rotation.mT, matrix, out)
    return eigenbasis.product(matrix, rotation, out)
