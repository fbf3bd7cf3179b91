"""The fields of NKFAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hf_precond.config.base import OptimizerConfig, bounded, decay, interval, positive
from hf_precond.linalg.products import Precision

WELL_CONDITIONED = 5e-3
"""Damping from which float16 holds an inverse, and inversion by blocks is exact enough."""


@dataclass(frozen=True)
class NKFACConfig(OptimizerConfig):
    """NKFAC: K-FAC whose inverses follow by Newton's iteration from the previous ones.

    By default (``state_dtype=None``) factors and inverses are kept in float16
    where the weights are not float64, ``damping`` is at least 0.005, so that an
    inverse's eigenvalues differ by less than 200, and it is not ``reference``.
    Otherwise inverses are kept in float32 (float64), factors in
    ``state_dtype``. Factors are packed triangles.

    Args:
        momentum: SGD's momentum, in [0, 1). Default 0.9.
        base: the fallback optimizer, which also takes the preconditioned
            gradients: ``adamw``, ``sgd`` or ``adamr``. Default ``adamw``.
        damping: multiple of a factor's largest eigenvalue added to its
            diagonal, > 0. Default 0.01.
        stat_decay: decay of the factors' running average, in [0, 1).
            Default 0.95.
        stat_interval: steps between two statistics, >= 1. Default 10.
        stat_rows: at most so many rows (tokens, output positions) of a layer's
            call enter its statistics, evenly spaced, >= 0; 0 for all;
            ``None`` for all on CPUs and 4,096 on accelerators. Default ``None``.
        inverse_interval: steps between two refreshes of the inverses, >= 1.
            Default 100.
        newton_steps: Newton iterations per refresh, >= 1. Default 1.
        exact_interval: every this many refreshes the inverse is computed
            exactly, >= 1. Default 500.
        solver: how inverses are refreshed: ``newton`` (from the previous ones),
            ``exact`` (anew each time), or ``auto``, the cheaper for a factor's
            size and device. Default ``auto``.
        max_dim: a wider side of a weight has no factor, >= 1; a bias does not
            count. Default 4096.
        reference: reproduce the authors' published code step by step: NKFAC
            with ``base="sgd"``, AdaNKFAC with ``base="adamw"``.
            Default ``False``.
        precision: of products with preconditioners on accelerators: ``auto``
            (float16 where inverses are kept in it, with as many digits as TF32;
            else TF32 where the device has it), ``highest`` (float32, as
            release 0.1), ``tf32`` or ``bf16``. Default ``auto``.

    Raises:
        ValueError: ``reference`` with another base or with a solver.
    """

    name: ClassVar[str] = "nkfac"
    layout: ClassVar[tuple[str, ...]] = ("state_dtype", "base", "max_dim", "reference")

    momentum: float = decay(0.9)
    base: Literal["adamw", "sgd", "adamr"] = "adamw"
    damping: float = positive(0.01)
    stat_decay: float = decay(0.95)
    stat_interval: int = interval(10)
    stat_rows: int | None = bounded(None, 0)
    inverse_interval: int = interval(100)
    newton_steps: int = interval(1)
    exact_interval: int = interval(500)
    solver: Literal["auto", "newton", "exact"] = "auto"
    max_dim: int = bounded(4096, 1)
    reference: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference and (self.base not in ("sgd", "adamw") or self.solver != "auto"):
            raise ValueError(
                f"reference=True: the authors' code is base='sgd' (NKFAC) or base='adamw' "
                f"(AdaNKFAC) with its own schedule of solvers, not base={self.base!r} and "
                f"solver={self.solver!r}; choose such a base and leave solver out, or leave "
                "reference out."
            )

    def factor_dtype(self, parameter_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which factors of a parameter are kept: float16 by default, see above.

        Args:
            parameter_dtype: the parameter's.
        """
        if self.halves(parameter_dtype):
            return torch.float16
        return super().factor_dtype(parameter_dtype)

    def halves(self, parameter_dtype: torch.dtype) -> bool:
        """Whether factors and inverses of a parameter are kept in float16.

        Args:
            parameter_dtype: the parameter's.
        """
        wide = parameter_dtype == torch.float64 or self.reference
        return self.state_dtype is None and not wide and self.damping >= WELL_CONDITIONED
