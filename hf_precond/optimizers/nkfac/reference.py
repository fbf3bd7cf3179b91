"""The published code of NKFAC and AdaNKFAC (Sun, PolyU 2024), formula by formula.

What it does otherwise than :class:`~hf_precond.optimizers.nkfac.optimizer.NKFAC`:
averages that start from zero and are not corrected for it, a power iteration
from the vector of ones, a Newton step whose rate depends on the size of the
matrix, a schedule of exact inverses counted in steps of the optimizer, not of
the layer, and a weight decay that is not decoupled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.linalg.matrix_functions import pack
from hf_precond.optimizers.base.fallback import (
    AdamWFallback,
    CoupledSGD,
    FallbackOptimizer,
)
from hf_precond.optimizers.base.parameters import ParamView
from hf_precond.optimizers.nkfac.factors import FLOOR, Count, KroneckerFactor
from hf_precond.optimizers.nkfac.optimizer import NKFAC
from hf_precond.statistics.requests import MomentRequest, Statistic

NORM_EPS = 1e-12


class NKFACReference(NKFAC):
    """NKFAC with ``reference=True``: reproduces the authors' trajectories.

    With ``base="sgd"`` their NKFAC, with ``base="adamw"`` their AdaNKFAC.
    """

    def make_fallback(self) -> FallbackOptimizer:
        """The authors' SGD or Adam."""
        return CoupledSGD() if self.config.base == "sgd" else AdaNKFACAdam()

    def requests(self) -> Sequence[MomentRequest]:
        """Those of NKFAC, whose sums are as they are."""
        return [factor.request(self.config.stat_rows or 0, 1.0) for factor in self.all_factors()]

    def average(
        self, factors: Sequence[KroneckerFactor], statistics: Sequence[Statistic]
    ) -> Tensor:
        """Of inputs the mean of outer products is averaged, of output gradients their sum."""
        flags = []
        for factor, statistic in zip(factors, statistics, strict=True):
            count = statistic.count if factor.side == "input" else 1
            moment, updates = factor["factor"], factor["updates"]
            mean = statistic.sum / count
            flags.append(average_moment(moment, updates, mean, self.config.stat_decay))
        return torch.stack(flags)

    def factors_to_invert(self, factors: Sequence[KroneckerFactor]) -> Sequence[KroneckerFactor]:
        """All that are due."""
        return factors

    def newton_steps(self, factor: KroneckerFactor) -> int:
        """0 at the first three refreshes and at every ``exact_interval``-th."""
        step, interval = self.steps, self.config.inverse_interval
        exact = step <= 2 * interval or step % (self.config.exact_interval * interval) == 0
        return 0 if exact else self.config.newton_steps

    def invert(
        self, factors: Tensor, previous: Tensor, newton_steps: int, count: Count
    ) -> tuple[Tensor, list[int]]:
        """``(A + λ I)⁻¹``, exact or by the authors' Newton steps; nothing is retried."""
        matrices = damp(factors, self.config.damping)
        if newton_steps == 0:
            return devices.kernel(torch.linalg.inv, matrices), []
        for _ in range(newton_steps):
            previous = newton_step_reference(matrices, previous)
        return previous, []

    @staticmethod
    def recovery(norms: Tensor, found: Tensor) -> Tensor:
        """The factor from directions to the gradients' norms, with the authors' epsilon.

        Args:
            norms: of the gradients.
            found: of the directions, shaped like ``norms``.
        """
        return norms / (found + NORM_EPS)


class AdaNKFACAdam(AdamWFallback):
    """Adam of AdaNKFAC: ``p ← p - lr / (1 - β₁ᵗ) · (m / (√v̂ + ε) + wd·p)``.

    The first moment's bias correction thus multiplies the weight decay too.
    """

    def decay(self, views: Sequence[ParamView], params: list[Tensor]) -> float:
        """Decay the parameters; leaves nothing to be decayed by torch."""
        group = views[0].group
        if group["weight_decay"] != 0:
            for view, param in zip(views, params, strict=True):
                step = view["step"].to(devices.widest(param.device)) + 1
                correction = 1 - group["betas"][0] ** step
                param.mul_(1 - group["lr"] * group["weight_decay"] / correction)
        return 0.0


def average_moment(moment: Tensor, updates: Tensor, mean: Tensor, decay: float) -> Tensor:
    """``A ← A + (1 - b) (S / (‖S‖_F + 1e-12) - A)`` in place, A starting from zero.

    A sum that is not finite changes nothing.

    Args:
        moment: A, ``[n, n]`` or packed, changed in place.
        updates: statistics averaged so far, a 0-d tensor, changed in place.
        mean: S, ``[n, n]``.
        decay: b, in [0, 1).

    Returns:
        1 where S was not finite, else 0: a 0-d tensor.
    """
    norm = torch.linalg.vector_norm(mean)
    usable = torch.isfinite(norm)
    updates += usable
    mean = pack(mean) if moment.dim() == 1 else mean
    change = (mean / (norm + NORM_EPS) - moment) * (1 - decay)
    moment.add_(torch.where(usable, change, 0.0))
    return (~usable).to(torch.int64)


def damp(factors: Tensor, damping: float) -> Tensor:
    """``A + λ I``, ``λ = max(1e-4, damping · λmax)``, 1e-4 where λmax is not a number."""
    shift = damping * largest_eigenvalue_from_ones(factors)
    shift = torch.where(shift > FLOOR, shift, FLOOR)
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    return factors + shift[..., None, None] * identity


def largest_eigenvalue_from_ones(matrix: Tensor, rounds: int = 10) -> Tensor:
    """The authors' estimate of ``λmax``: power iteration from the vector of ones.

    ``v = 1``; each round ``u = A v / ‖A v‖``, ``v = A u``; the answer is ``‖v‖``
    of the last round. Not a number where the ones lie in A's null space (the
    output-gradient factor of a softmax classifier, or a zero matrix).

    Args:
        matrix: A, symmetric positive semi-definite, ``[…, n, n]``.
        rounds: rounds, each of two products.

    Returns:
        ``[…]``.
    """
    vector = matrix.new_ones(*matrix.shape[:-1], 1)
    for _ in range(rounds):
        vector = matrix @ vector
        vector = matrix @ (vector * (1 / vector.norm(dim=(-2, -1), keepdim=True)))
    return vector.norm(dim=(-2, -1))


def newton_step_reference(matrix: Tensor, inverse: Tensor) -> Tensor:
    """The authors' step, ``B' = (1 + a) B - a B A B``.

    ``a = 1`` where ``‖I - B A‖_F < 1``, else ``1 / ‖B A‖_F`` (the supplement of
    NKFAC, section 6). With ``E = I - B A`` the next residual is
    ``(1 - a) E + a E²``. The test's norm grows like √n, so large matrices take
    the slow branch and hardly move;
    :func:`~hf_precond.linalg.inverses.newton_step` does not.

    Args:
        matrix: A, symmetric positive definite, ``[…, n, n]``.
        inverse: B, an approximation of its inverse, symmetric positive
            definite, shaped like A.
    """
    product = inverse @ matrix
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    far = (identity - product).norm(dim=(-2, -1), keepdim=True) >= 1
    scale = torch.where(far, 1 / product.norm(dim=(-2, -1), keepdim=True), 1.0)
    return ((1 + scale) * identity - scale * product) @ inverse
