"""The fields of NKFAC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_precond.config.base import OptimizerConfig, bounded, decay, interval, positive
from hf_precond.linalg.products import Precision


@dataclass(frozen=True)
class NKFACConfig(OptimizerConfig):
    """NKFAC: K-FAC whose inverses follow by Newton's iteration from the previous ones.

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
            call enter its statistics, evenly spaced, >= 0; 0 for all.
            Default 0.
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
            (TF32 where the device has it, else float32), ``highest`` (float32,
            as release 0.1), ``tf32`` or ``bf16``. Default ``auto``.

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
    stat_rows: int = bounded(0, 0)
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
