"""Muon for the matrices that a preconditioner leaves, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon

from hf_precond.optimizers.base.fallback import AdamWFallback, compute_copies
from hf_precond.optimizers.base.parameters import ParamView, by_group


class MuonFallback(AdamWFallback):
    """Muon (Jordan et al., 2024) by torch's functional form, beside AdamW.

    ``M ← β M + (1-β) G``, ``U = msign(β M + (1-β) G)`` (Nesterov),
    ``p ← (1 - lr·wd) p - lr·m·0.2·√max(rows, columns)·U``: the entries of a
    step have AdamW's usual root mean square (Liu et al., "Muon is scalable
    for LLM training", 2025). It steps the views that are marked ``hidden``.

    Args:
        lr_scale: m, learning rate of the matrices over the group's, > 0.
        nesterov: Nesterov form of the momentum.
    """

    def __init__(self, lr_scale: float = 1.0, nesterov: bool = True) -> None:
        super().__init__()
        self.lr_scale, self.nesterov = lr_scale, nesterov

    def allocate(self, views: Sequence[ParamView]) -> None:
        """Makes the momentum of hidden matrices, and AdamW's moments of all others."""
        for view in views:
            if view.hidden:
                view.zeros("momentum_buffer")
        super().allocate([view for view in views if not view.hidden])

    def update(self, views: Sequence[ParamView]) -> None:
        """Steps hidden matrices by Muon and all others by AdamW."""
        super().update([view for view in views if not view.hidden])
        hidden = [view for view in views if view.hidden]
        self.allocate(hidden)
        for batch in by_group(hidden):
            group = batch[0].group
            with compute_copies(batch) as (params, grads):
                matrices = _as_matrices(params, batch)
                muon(
                    matrices,
                    _as_matrices(grads, batch),
                    _as_matrices([view["momentum_buffer"] for view in batch], batch),
                    lr=group["lr"] * self.lr_scale,
                    weight_decay=group["weight_decay"] / self.lr_scale,
                    momentum=group["momentum"],
                    nesterov=self.nesterov,
                    ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
                    eps=EPS,
                    ns_steps=DEFAULT_NS_STEPS,
                    adjust_lr_fn="match_rms_adamw",
                    has_complex=False,
                )
                for param, matrix in zip(params, matrices, strict=True):
                    if param is not matrix:
                        param.copy_(matrix.view(param.shape))


def _as_matrices(tensors: Sequence[Tensor], views: Sequence[ParamView]) -> list[Tensor]:
    """Tensors in two dimensions: rows interleaved per head (a copy where they are no view)."""
    pairs = zip(tensors, views, strict=True)
    return [t if t.dim() == 2 else t.reshape(view.shape) for t, view in pairs]
