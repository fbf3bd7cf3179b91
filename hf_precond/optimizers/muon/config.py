"""The fields of Muon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_precond.config.base import OptimizerConfig, bounded, decay, positive


@dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon: hidden matrices by the sign of their momentum, AdamW for the rest.

    ``state_dtype`` has no effect: no Kronecker factors are kept. ``betas`` and
    ``eps`` are those of the AdamW.

    Args:
        momentum: decay of the gradients' running average, in [0, 1).
            Default 0.95; runs of a few hundred steps took 0.8 better.
        nesterov: Nesterov's form of the momentum. Default ``True``.
        ns_steps: Newton–Schulz steps of the matrix sign, in [1, 99]. Default 5.
        lr_scale: learning rate of the matrices over that of their group, > 0;
            weight decay stays at the group's ``lr``. Default 1.
        adjust_lr_fn: how a step follows from a matrix's shape ``[m, n]``:
            ``match_rms_adamw``, times ``0.2·√max(m, n)``, for AdamW's learning
            rates; or ``original``, times ``√max(1, m/n)``, for larger ones
            (about 0.02). Default ``match_rms_adamw``.
        variant: ``muon``, or ``normuon``: rows of the sign divided by the root
            of a running mean of their squares. Default ``muon``.
        normuon_beta2: decay of that running mean, in [0, 1). Default 0.95.
    """

    name: ClassVar[str] = "muon"
    layout: ClassVar[tuple[str, ...]] = ("state_dtype", "variant")

    momentum: float = decay(0.95)
    nesterov: bool = True
    ns_steps: int = bounded(5, 1, 99)
    lr_scale: float = positive(1.0)
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    variant: Literal["muon", "normuon"] = "muon"
    normuon_beta2: float = decay(0.95)
