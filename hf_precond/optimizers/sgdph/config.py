"""The fields of SGD-PH."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_precond.config.base import OptimizerConfig, decay, interval, positive


@dataclass(frozen=True)
class SGDPHConfig(OptimizerConfig):
    """SGD-PH: norm parameters by their Hessian diagonal, the rest by AdamW or SGD.

    Args:
        momentum: SGD's momentum, in [0, 1). Default 0.9.
        base: the fallback optimizer of all other parameters: ``sgd`` (the
            thesis) or ``adamw`` (our extension for transformers).
            Default ``adamw``.
        probe: ``rademacher`` (unbiased estimate of the diagonal), ``ones`` (the
            authors': row sums) or ``exact`` (one product a channel).
            Default ``rademacher``.
        probe_interval: steps between two probes, >= 1. Default 20.
        probe_autocast: leave the passes of the steps that are probed under
            autocast, as all others are. Otherwise they run in float32: the
            curvature then has no rounding noise of bfloat16 or float16, at the
            time and memory of a float32 step every ``probe_interval``. ``None``
            leaves bfloat16 alone, and on accelerators alone: its rounding is
            half a percent of an estimate that random signs spread by far more
            than itself. Default ``None``.
        stat_decay: decay of the probe's running average, in [0, 1).
            Default 0.9.
        tau: second-order learning rate of ``base="sgd"``, > 0. Default 0.001.
        curvature_eps: added to the curvature under ``base="sgd"``, > 0.
            Default 0.0001.
        gamma: multiplier of the curvature in the denominator of
            ``base="adamw"``, > 0. Default 0.1.
        include_bias: treat biases as channel-wise parameters too.
            Default ``False``.
        reference: reproduce the authors' published code step by step, with
            ``base="sgd"`` and ``probe="ones"``: every one-dimensional
            parameter, one probed a step, averaged with ``momentum``
            (``probe_interval``, ``stat_decay`` and ``include_bias`` have no
            effect then, and autocast is left as it is). Default ``False``.

    Raises:
        ValueError: ``reference`` with another base or probe.
    """

    name: ClassVar[str] = "sgdph"
    layout: ClassVar[tuple[str, ...]] = ("state_dtype", "base", "include_bias", "reference")

    momentum: float = decay(0.9)
    base: Literal["adamw", "sgd"] = "adamw"
    probe: Literal["rademacher", "ones", "exact"] = "rademacher"
    probe_interval: int = interval(20)
    probe_autocast: bool | None = None
    stat_decay: float = decay(0.9)
    tau: float = positive(1e-3)
    curvature_eps: float = positive(1e-4)
    gamma: float = positive(0.1)
    include_bias: bool = False
    reference: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference and (self.base, self.probe) != ("sgd", "ones"):
            raise ValueError(
                f"reference=True: the authors' code is base='sgd' and probe='ones', not "
                f"base={self.base!r} and probe={self.probe!r}; set both, or leave reference out."
            )
