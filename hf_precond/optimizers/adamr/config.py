"""The fields of AdamR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_precond.config.base import OptimizerConfig, bounded, decay, interval, one_of
from hf_precond.linalg.products import Precision


@dataclass(frozen=True)
class AdamRConfig(OptimizerConfig):
    """AdamR: Adam in the eigenbasis of the gradient's Kronecker second moments.

    Args:
        basis: ``auto`` (two-sided while that is cheap, else one-sided),
            ``two_sided``, ``one_sided`` (the smaller side) or ``identity``
            (AdamW). Default ``auto``.
        basis_source: ``gradient``, second moments of the gradient, or
            ``feature``, of the layer's inputs and output gradients. Default
            ``gradient``.
        direction: ``adam``, Adam's step in the bases, or ``sign``: the matrix sign
            of that step, at its norm, for the matrices of hidden layers (as in
            SOAP-Muon). Default ``adam``.
        transport: how Adam's second moment follows a new basis: ``permute``,
            it stays with its columns, or ``overlap``, it is spread by their
            squared overlap with the old ones. Default ``permute``.
        floor: smallest denominator, relative to the rms of the square roots of
            the second moment, >= 0. Default 0.0001.
        stat_decay: decay of the factors' running average, in [0, 1).
            Default 0.95.
        stat_interval: steps between two updates of the factors, >= 1.
            Default 1.
        basis_interval: steps between two refreshes of a basis, give or take
            one, >= 1. Default 3.
        basis_tolerance: a basis is left as it is while the off-diagonal part of
            its factor holds less than this share of the energy, in [0, 1].
            Default 0.01.
        max_dim: a wider side has no basis, >= 1. Default 2048.
        max_state_ratio: a parameter whose state would pass 64 MiB in float32 keeps
            at most so many times what AdamW does, >= 1: only its smaller side is
            rotated, in blocks, or none. Default 6.
        precision: of products with preconditioners on accelerators: ``auto``
            (TF32 where the device has it, else float32), ``highest`` (float32,
            as release 0.1), ``tf32`` or ``bf16``. Default ``auto``.

    Raises:
        ValueError: ``direction="sign"`` with ``basis="identity"``, which is AdamW.
    """

    name: ClassVar[str] = "adamr"
    layout = (
        "state_dtype", "basis", "basis_source", "basis_interval", "max_dim", "max_state_ratio"
    )  # fmt: skip

    state_dtype: str | None = one_of("float32", "float64", "bfloat16")
    basis: Literal["auto", "two_sided", "one_sided", "identity"] = "auto"
    basis_source: Literal["gradient", "feature"] = "gradient"
    direction: Literal["adam", "sign"] = "adam"
    transport: Literal["overlap", "permute"] = "permute"
    floor: float = bounded(1e-4, 0.0)
    stat_decay: float = decay(0.95)
    stat_interval: int = interval(1)
    basis_interval: int = interval(3)
    basis_tolerance: float = bounded(0.01, 0.0, 1.0)
    max_dim: int = bounded(2048, 1)
    max_state_ratio: float = bounded(6.0, 1.0)
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction == "sign" and self.basis == "identity":
            raise ValueError(
                "direction='sign': with basis='identity' there are no bases to take Adam's step "
                "in; set basis='auto', or use --optim muon."
            )
