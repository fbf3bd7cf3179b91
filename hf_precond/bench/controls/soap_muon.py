"""SOAP-Muon: the matrix sign of SOAP's step on hidden matrices, AdamW on the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hf_precond.bench.controls.common import ControlConfig, hidden_matrices, orthogonalised
from hf_precond.bench.controls.soap import SOAPConfig, project, refresh_bases, soap_direction
from hf_precond.config.base import decay, positive
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import Bound, BoundMatrix, Preconditioned


@dataclass(frozen=True)
class SOAPMuonConfig(SOAPConfig):
    """SOAP's fields for the hidden matrices, AdamW's for the rest.

    Args:
        betas: AdamW's decay rates of the other parameters, in [0, 1).
            Default 0.9 and 0.999.
        soap_betas: Adam's decay rates in the bases, each in [0, 1).
            Default 0.95 and 0.95.
        momentum: the first of ``soap_betas`` by itself, in [0, 1); ``None``
            leaves it. Default ``None``.
        lr_scale: learning rate of the matrices over ``lr``, > 0. Default 1.
    """

    name: ClassVar[str] = "soap_muon"
    unused: ClassVar[tuple[str, ...]] = (*ControlConfig.unused,)

    betas: tuple[float, float] = decay((0.9, 0.999))
    soap_betas: tuple[float, float] = decay((0.95, 0.95))
    momentum: float | None = decay(None)
    lr_scale: float = positive(1.0)

    def build(self, model: nn.Module, warmup: int) -> PrecondOptimizer:
        """:class:`SOAPMuon` of a model."""
        return SOAPMuon(self.groups(model), hidden_matrices(model, self), self)


class SOAPMuon(PrecondOptimizer):
    """The matrix sign of SOAP's direction (the modded-nanogpt track-3 record of 2026).

    ``U = msign(Q_L N' Q_Rᵀ) = Q_L msign(N') Q_Rᵀ``, N' SOAP's direction in the
    bases (:class:`~hf_precond.bench.controls.soap.SOAP`), and
    ``W ← (1 - lr·wd) W - lr·m·0.2·√max(rows, columns)·U`` as Muon with
    ``match_rms_adamw``. Without the record's row floor, cautious decay, tail
    average and EMA-Nesterov; its basis is refreshed every step, here every
    ``basis_interval``. The first step only makes the bases.

    Args:
        param_groups: as for any torch optimizer.
        structure: ``matrices`` are the hidden ones.
        config: the fields.
    """

    config: SOAPMuonConfig

    def precondition(self, ready: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """SOAP's step of each matrix, orthogonalised."""
        config = self.config
        first, second = config.soap_betas
        betas = (first if config.momentum is None else config.momentum, second)
        beta = second if config.stat_decay is None else config.stat_decay
        for bound in ready:
            gradient = bound.gradient()
            assert gradient is not None  # those in `ready` have one
            state = self.state[bound.weight].setdefault(bound.prefix + "soap", {})
            direction = soap_direction(state, gradient, betas, config.eps, beta, config)
            if direction is None:
                yield Preconditioned(bound, None, "applied")
                continue
            sign = orthogonalised(direction, config.lr_scale)
            found = project(sign, state["bases"], back=True)
            refresh_bases(state, gradient, beta, config.basis_interval)
            yield Preconditioned(bound, found, "direction")

    def uses_fallback(self, bound: Bound) -> bool:
        """No: AdamW never steps these matrices."""
        return False
