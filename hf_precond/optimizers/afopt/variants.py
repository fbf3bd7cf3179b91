"""AFOpt beyond the default: other directions and scalings, frozen biases, adapters.

Directions, per head, with ``P = (A + λ·tr(A)/n·I)⁻¹`` and N the momentum::

    spectral  U = P_L^(1/2) msign(P_L^(1/2) N P_R^(1/2)) P_R^(1/2)     the default
    inverse   U = P_L N P_R                   the least-squares step along -∂L/∂S, S = QKᵀ/√d

Scalings of U, the direction of one matrix ``[W | b]``, all heads together; the step is ``lr``
times::

    adaptive       m·s·U·0.2·√numel/‖U‖_F, s = min(2, ‖M‖_F/(g r₀))   m = lr_scale; the default
    rms            m·βᵏ·U·0.2·√numel/‖U‖_F
    cap            as rms; of q and k at most βᵏ·U·ρ/c, c the rms change of the logits that U makes
    norm_recovery  the fallback optimizer steps with U·‖Ĝ‖_F/‖U‖_F, U of Ĝ without momentum

k counts the steps in a row without a gradient, β is the momentum's decay; c follows
:func:`logit_change`, with A_K (A_Q) undamped and as of the last refresh, as the square root of the
mean over query heads.

Left factors of adapters:

- LoRA's B: that of its role; LoRA's A: ``Σ_h B_hᵀ A_h B_h``
- outside attention: B the identity, A ``Bᵀ B``
- DoRA scales the rows of ``W + s B A`` by D = diag(m / norm), the norm held constant: its B has
  ``D_h A_h D_h`` (o's B the identity all the same), its A ``Σ_h B_hᵀ D_h A_h D_h B_h``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.architectures.computed import effective_step
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.linalg.inverses import root_without_last, without_last
from hf_precond.linalg.matrix_functions import frobenius_norm, largest_entry
from hf_precond.optimizers.afopt.factors import Factors, heads_of, quadratic, times_right
from hf_precond.optimizers.afopt.plan import MatrixPlan, RightFactor

if TYPE_CHECKING:
    from hf_precond.optimizers.afopt.optimizer import AFOpt

Batch = Sequence[MatrixPlan]

# Directions --------------------------------------------------------------------------


def without_bias(right: RightFactor, factor: Tensor) -> Tensor:
    """A right factor for steps that leave the bias as it is: frozen since it was joined.

    The least change of the output is then sought without the constant 1 among the inputs: the
    moment loses its last row and column.

    Args:
        right: what the factor is.
        factor: ``[c, c]`` or diagonal blocks.

    Returns:
        The same shape.
    """
    narrow = without_last if right.kind == "inverse" else root_without_last
    if factor.dim() == 2:
        return narrow(factor)
    block, last = divmod(right.columns - 1, factor.shape[-1])
    result = factor.clone()
    result[block, : last + 1, : last + 1] = narrow(factor[block, : last + 1, : last + 1])
    return result


# Scalings ------------------------------------------------------------------------------


def capped(optimizer: AFOpt, batch: Batch, directions: Tensor) -> Tensor:
    """``cap``: ``βᵏ·min(m·0.2·√numel/‖U‖_F, ρ/c)``."""
    lengths = optimizer.rms_lengths(directions)
    if batch[0].left_moment is not None:
        per_unit = logit_change(optimizer, batch, directions)[:, None, None]
        allowed = optimizer.config.rho / per_unit.clamp(min=torch.finfo(per_unit.dtype).tiny)
        lengths = torch.minimum(lengths, allowed)
    return lengths * optimizer.trends(batch)


def recover_norms(optimizer: AFOpt, batch: Batch, directions: Tensor) -> Tensor:
    """``norm_recovery``: ``‖Ĝ‖_F/‖U‖_F``."""
    gradients = optimizer.gradients(batch)
    size = largest_entry(gradients)
    return size * (frobenius_norm(gradients / size) / frobenius_norm(directions))


SCALINGS: dict[str, Callable[[AFOpt, Batch, Tensor], Tensor]] = {
    "cap": capped,
    "norm_recovery": recover_norms,
}
"""What a direction ``[n, out, c]`` is multiplied with, ``[n, 1, 1]``."""


def logit_change(optimizer: AFOpt, batch: Batch, steps: Tensor) -> Tensor:
    """Predicted rms change of the logits that a step of W_q, or of W_k, alone makes.

    ``mean over h, i, j of (s x̂_iᵀ δŴ_hᵀ k_j)² = s² mean_h tr(A_K,h δŴ_h A_X δŴ_hᵀ)`` for W_q, s
    what logits are multiplied with, over all pairs of a query and a key; with A_Q for W_k. Exact
    for one unmasked sequence, up to the independence of queries and keys for several, and to first
    order in the step.

    Args:
        optimizer: the optimizer.
        batch: queries or keys of one shape.
        steps: ``[n, out, c]``.

    Returns:
        ``[n]``.
    """
    block, factors = batch[0].block, optimizer.factors
    assert block is not None
    matrices = [plan.bound.matrix for plan in batch]
    if any(matrix.effective is not None for matrix in matrices):
        steps = torch.stack([effective_step(m, s) for m, s in zip(matrices, steps, strict=True)])
    left = torch.cat(optimizer.tensors(batch, "left_moment")).to(steps.dtype)
    moments = [factors.moment(plan.right)[0] for plan in batch]
    moved = times_right(steps, moments).view(len(left), -1, steps.shape[-1])
    gram = torch.bmm(moved, steps.reshape(moved.shape).mT)
    squares = (gram * left).sum((-2, -1)).view(len(batch), -1).clamp(min=0) * block.logit_scale**2
    attentions = len(block.meeting("q")) if block.serves(batch[0].role) == "k" else 1
    return (squares.sum(1) / (attentions * block.heads.query)).sqrt()


# Adapters ------------------------------------------------------------------------------


def up_input_moment(down: LayerMatrix, moment: Tensor, columns: int) -> Tensor:
    """The second moment of the input ``A x`` of LoRA's B: ``A A_X Aᵀ``.

    Args:
        down: LoRA's A.
        moment: A_X, ``[n, n]`` or diagonal blocks.
        columns: columns of B, its bias included: the second moment of the constant 1 is 1.

    Returns:
        ``[1, columns, columns]``.
    """
    moment = quadratic(down.read().to(moment.dtype)[None], moment)
    rank = moment.shape[-1]
    moment = F.pad(moment, (0, columns - rank, 0, columns - rank))
    moment.diagonal(dim1=-2, dim2=-1)[:, rank:] = 1.0
    return moment


def adapter_left_moment(factors: Factors, plan: MatrixPlan) -> Tensor:
    """The moments of the rows of LoRA's A (for all roles that share it) or B.

    Args:
        factors: reads moments and weights.
        plan: the adapter's plan.

    Returns:
        ``[heads, rows, rows]``.
    """
    block, terms = plan.block, []
    if plan.side == "up":
        assert block is not None  # B of other layers has no left factor
        moment = factors.output_moment(block, plan.role)
        pair = next(p for p in plan.pairs if p.up is plan.bound.matrix)
        scale = pair.row_scale(block.roles()[plan.role])
        assert moment is not None
        if scale is None:
            return moment
        rows = heads_of(scale, len(moment)).to(moment.dtype)
        return rows.unsqueeze(-1) * moment * rows.unsqueeze(-2)
    pairs = [("", pair) for pair in plan.pairs]
    if block is not None:  # roles may share an A
        pairs = [(role, pair) for role in block.adapters for pair in block.pairs(role)]
    for role, adapter in pairs:
        if adapter.down is not plan.bound.matrix:
            continue
        up = adapter.up.read()[:, : adapter.up.shape[1]].to(plan.bound.dtype)
        base = adapter.base if block is None else block.roles()[role]
        assert base is not None
        scale = adapter.row_scale(base)
        up = up if scale is None else scale[:, None].to(up.dtype) * up
        moment = None if block is None else factors.output_moment(block, role)
        parts = heads_of(up, 1 if moment is None else len(moment))
        weighed = parts if moment is None else torch.bmm(moment.to(up.dtype), parts)
        terms.append(torch.bmm(parts.mT, weighed).sum(0))
    return torch.stack(terms).sum(0, keepdim=True)
