"""The fields of AFOpt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_precond.config.base import (
    OptimizerConfig,
    Removed,
    bounded,
    decay,
    interval,
    one_of,
    positive,
)
from hf_precond.linalg.products import Precision


@dataclass(frozen=True)
class AFOptConfig(OptimizerConfig):
    """AFOpt: the gradient step of attention taken in the space of its logits.

    Start from the learning rate that suits AdamW.

    Args:
        momentum: decay of the gradients' running average under
            ``direction="spectral"``, ``base="sgd"`` and ``base="muon"``, in
            [0, 1). Default 0.8; 0.9 was worse in fine-tuning, else about even.
        base: the fallback optimizer of every parameter outside ``scope``:
            ``adamw``, ``sgd``, ``adamr`` or ``muon``. Default ``adamw``.
        scope: which matrices are preconditioned: ``query_key``, ``attention``
            (q, k, v, o), ``all_linear`` (linear layers of MLPs too) or ``auto``:
            ``attention`` where linear layers outside it were loaded by
            ``from_pretrained`` and train (in fine-tuning they were better left
            to AdamW), else ``all_linear``: from random weights, under LoRA. On
            layers with LoRA its A and B are meant. Default ``auto``.
        direction: ``spectral`` (msign between the inverse square roots of the
            factors) or ``inverse``. Default ``spectral``.
        scaling: what sets the length of a step: ``adaptive``, ``rms``, ``cap``
            or ``norm_recovery``. The root mean square of a step's entries is
            fixed under ``rms``; under ``adaptive`` it is up to twice as long
            where gradients agree, and shorter where they vanish, as Adam's.
            Default ``adaptive``.
        lr_scale: multiplier of ``lr`` for the preconditioned matrices under
            ``scaling="adaptive"``, ``"rms"`` and ``"cap"``, and for the matrices left to
            ``base="muon"``, > 0. Default 4.
        rho: the rms change of the logits per unit of lr that a step of q, and
            one of k, makes at most under ``scaling="cap"``, > 0. Default 10.
        damping: multiple of a factor's mean eigenvalue added to its diagonal,
            > 0. Default 1.
        stat_decay: decay of the factors' running average, in [0, 1).
            Default 0.95.
        stat_interval: steps between two statistics, >= 1. Default 5.
        stat_rows: at most so many tokens of a layer's call enter the moment of
            its input, evenly spaced, >= 0; 0 for all; ``None`` for all on CPUs
            and 4,096 on accelerators. Default ``None``.
        inverse_interval: steps between two refreshes of the roots, >= 1.
            Default 20.
        max_dim: a wider input side is divided into diagonal blocks of at most
            this size, >= 1. Default 1024.
        nesterov: Nesterov's form of the momentum of the spectral direction.
            Default ``True``.
        rope: the factor of rotated keys and queries: ``averaged`` over
            positions, or ``ignored``. Default ``averaged``.
        attention_entropy: report the entropy of each layer's attention weights
            in ``diagnostics()``, of eight query positions a sequence.
            Default ``False``.
        precision: of products with preconditioners on accelerators: ``auto``
            (TF32 where the device has it, else float32), ``highest`` (float32,
            as release 0.1), ``tf32`` or ``bf16``. Default ``auto``.

    Raises:
        ValueError: a value is not legal.
    """

    name: ClassVar[str] = "afopt"
    layout: ClassVar[tuple[str, ...]] = (
        *("state_dtype", "base", "scope", "direction", "scaling"),
        *("rope", "max_dim"),
    )
    from_model: ClassVar[tuple[str, ...]] = ("scope",)
    removed: ClassVar = {
        "center": Removed(False, "0.2.0"),
        "covariant_damping": Removed(False, "0.2.0"),
        "joint": Removed(False, "0.2.0"),
        "space": Removed("logits", "0.2.0"),
    }
    removed_values: ClassVar = {
        "direction": {"inverse_sqrt": "0.2.0"},
        "scaling": dict.fromkeys(("graft", "logit_rms"), "0.2.0"),
    }

    state_dtype: str | None = one_of("float32", "float64", "bfloat16")
    momentum: float = decay(0.8)
    base: Literal["adamw", "sgd", "adamr", "muon"] = "adamw"
    scope: Literal["auto", "query_key", "attention", "all_linear"] = "auto"
    direction: Literal["spectral", "inverse"] = "spectral"
    scaling: Literal["adaptive", "rms", "cap", "norm_recovery"] = "adaptive"
    lr_scale: float = positive(4.0)
    rho: float = positive(10.0)
    damping: float = positive(1.0)
    stat_decay: float = decay(0.95)
    stat_interval: int = interval(5)
    stat_rows: int | None = bounded(None, 0)
    inverse_interval: int = interval(20)
    max_dim: int = bounded(1024, 1)
    nesterov: bool = True
    rope: Literal["averaged", "ignored"] = "averaged"
    attention_entropy: bool = False
    precision: Precision = "auto"
