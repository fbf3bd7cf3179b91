"""Left factors: what stands between the rows of a weight and the attention space.

For a head h, in torch's layout (``Ŵ = [W | b]``, ``x̂ = (x, 1)``):

- q: ``A_K,h = E[k kᵀ] = Ŵ_k,h A_X Ŵ_k,hᵀ`` (its key-value head's, under grouped queries)
- k: ``A_Q,h = Ŵ_q,h A_X Ŵ_q,hᵀ``, summed over the query heads that share the key
- v: ``W_o,hᵀ W_o,h``, summed likewise
- LoRA's B: that of its role; LoRA's A: ``Σ_h B_hᵀ A_h B_h``
- DoRA scales the rows of ``W + s B A`` by D = diag(m / norm), the norm held constant: its B has
  ``D_h A_h D_h`` (o's B the identity all the same), its A ``Σ_h B_hᵀ D_h A_h D_h B_h``

Nothing is collected for A_K and A_Q unless queries and keys are rotated or normed on their way to
the logits: then they are the moments of the vectors that the logits are made of, which under RoPE
are averaged, ``(1/n) Σ_i R_iᵀ C R_i`` over the positions (``rope="averaged"``).

- ``center``: A_K of keys less their sequence's mean; k's right factor that of such inputs, the
  constant 1 among them
- ``space="product"``: ``A_K,h = W_k,h W_k,hᵀ``, A_Q likewise, without bias; no right factors
- damping: ``A + λ·tr(A)/n·I``, at least 1e-12. ``covariant_damping``: the left factors as if A_X
  were damped, ``A_K + λ·tr(A_X)/n·Ŵ_k Ŵ_kᵀ`` (v: ``(1 + λ) W_oᵀ W_o``), and ``8 ε·tr(A)/n·I``
- an input wider than ``max_dim``: ``⌈in / max_dim⌉`` diagonal blocks of equal width of A_X, with
  the mean eigenvalue of all, here too
- averages: ``A ← b A + (1 - b) E[·]``, ``b = min(stat_decay, 1 - 1/k)`` at the k-th statistic
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.architectures.structure import AttentionBlock
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.plan import AFOptPlan, MatrixPlan, Moment, State

JITTER = 8
"""Damping beside the covariant one, in units of rounding times the mean eigenvalue (1e-6)."""


def heads_of(matrix: Tensor, heads: int) -> Tensor:
    """``[out, …] -> [heads, out / heads, …]``."""
    return matrix.unflatten(0, (heads, -1))


def quadratic(weight: Tensor, moment: Tensor) -> Tensor:
    """``W A Wᵀ`` per head.

    Args:
        weight: ``[H, d_h, c]``; narrower than the moment: its leading block.
        moment: ``[n, n]``, or diagonal blocks ``[blocks, w, w]``.

    Returns:
        ``[H, d_h, d_h]``.
    """
    blocks = moment if moment.dim() == 3 else moment[None]
    count, width = blocks.shape[0], blocks.shape[-1]
    weight = F.pad(weight, (0, count * width - weight.shape[-1]))
    result = None
    for number in range(count):
        part = weight[..., number * width : (number + 1) * width]
        product = (part.flatten(0, 1) @ blocks[number]).view(part.shape)
        term = torch.bmm(product, part.mT)
        result = term if result is None else result + term
    assert result is not None
    return result


def _exact(weight: Tensor) -> Tensor:
    """A weight in the dtype of the mathematics: products of bfloat16 ones lose two digits."""
    return weight.to(compute_dtype(weight.dtype))


def merged(moment: Tensor, columns: int) -> Tensor:
    """Mean eigenvalue of a moment of ``columns`` columns kept as one or several blocks."""
    total = moment.diagonal(dim1=-2, dim2=-1).sum()
    return total / columns


class AttentionFactors:
    """Computes left factors from the moments and weights as they stand.

    Args:
        plan: who needs what.
        state: the optimizer's state.
        config: the config.
    """

    def __init__(self, plan: AFOptPlan, state: State, config: AFOptConfig) -> None:
        self.plan, self.state, self.config = plan, state, config

    def damping(self, dtype: torch.dtype) -> float:
        """λ of left factors: a jitter where they are damped through the input's moment."""
        covariant = self.config.covariant_damping
        return JITTER * torch.finfo(dtype).eps if covariant else self.config.damping

    def left(self, treatment: MatrixPlan, damped: bool = True) -> Tensor:
        """The left moment of a treatment, ``[heads, rows, rows]``.

        Args:
            treatment: one that has a left factor.
            damped: with the covariant damping, where the config asks for it.
        """
        assert treatment.block is not None
        block, damped = treatment.block, damped and self.config.covariant_damping
        if treatment.side == "down":
            return self._down(treatment, damped)
        moment = self.role(block, treatment.role, damped)
        assert moment is not None
        scale = block.row_scale(treatment.role) if treatment.side == "up" else None
        if scale is not None:
            rows = heads_of(scale, moment.shape[0]).to(moment.dtype)
            moment = rows.unsqueeze(-1) * moment * rows.unsqueeze(-2)
        return moment.to(treatment.bound.dtype)

    def role(self, block: AttentionBlock, role: str, damped: bool) -> Tensor | None:
        """The left moment of a role, per head; ``None`` for the identity."""
        group = block.heads.group
        if role == "q":
            return self.keys(block, damped).repeat_interleave(group, 0)
        if role == "k":
            return self.queries(block, damped).unflatten(0, (-1, group)).sum(1)
        if role == "v" and block.o is not None:
            return self._outputs(block, damped).unflatten(0, (-1, group)).sum(1)
        return None

    def keys(self, block: AttentionBlock, damped: bool = False) -> Tensor:
        """A_K, ``[H_kv, d_h, d_h]``."""
        which = "centered" if self.config.center else block.reads("k")
        return self._features(block, "k", "key", which, block.heads.key_value, damped)

    def queries(self, block: AttentionBlock, damped: bool = False) -> Tensor:
        """A_Q, ``[H, d_h, d_h]``."""
        return self._features(block, "q", "query", "x", block.heads.query, damped)

    def _features(
        self, block: AttentionBlock, role: str, vectors: str, which: str, heads: int, damped: bool
    ) -> Tensor:
        known: Mapping[str, Moment] = self.plan.known.get(block, {})
        matrix = block.roles()[role]
        weight = _exact(block.effective(role))
        if not self.plan.features:
            weight = heads_of(weight[:, : matrix.shape[1]], heads)
            moment = torch.bmm(weight, weight.mT)
            return moment * (1 + self.config.damping) if damped else moment
        weight = heads_of(weight, heads)
        features = known.get(which)
        if vectors in known:
            moment = known[vectors].read(self.state)
        else:
            assert features is not None
            weight = weight.to(features.anchor.dtype)
            moment = quadratic(weight, features.read(self.state))
        if damped:
            assert features is not None
            moment = moment + self._shift(weight, features)
        return moment

    def _shift(self, weight: Tensor, features: Moment) -> Tensor:
        """``λ·tr(A_X)/n · Ŵ Ŵᵀ``: what damping A_X does to ``Ŵ A_X Ŵᵀ``."""
        shift = torch.bmm(weight, weight.mT) * self.config.damping
        moment = features.read(self.state)
        return shift * merged(moment, features.request.matrix.columns)

    def _outputs(self, block: AttentionBlock, damped: bool) -> Tensor:
        """``W_o,hᵀ W_o,h``, ``[H, d_v, d_v]``."""
        assert block.o is not None
        heads, size = block.heads.query, block.heads.value_size
        weight = _exact(block.effective("o"))[:, : block.o.shape[1]]
        parts = weight.mT.reshape(heads, size, -1)
        moment = torch.bmm(parts, parts.mT)
        return moment * (1 + self.config.damping) if damped else moment

    def _down(self, treatment: MatrixPlan, damped: bool) -> Tensor:
        block = treatment.block
        assert block is not None
        dtype = treatment.bound.dtype
        total = None
        for role, adapter in block.adapters.items():
            if adapter.down is not treatment.bound.matrix:
                continue
            up = adapter.up.read()[:, : adapter.up.shape[1]].to(dtype)
            scale = block.row_scale(role)
            if scale is not None:
                up = scale[:, None].to(dtype) * up
            moment = self.role(block, role, damped)
            if moment is None:
                term = up.mT @ up
            else:
                parts = heads_of(up, moment.shape[0])
                term = torch.bmm(parts.mT, torch.bmm(moment.to(dtype), parts)).sum(0)
            total = term if total is None else total + term
        assert total is not None
        return total[None]
