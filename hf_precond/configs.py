"""One frozen dataclass per optimizer: fields, legal ranges, parsing and JSON.

A config is plain data. It is validated when it is made, so a value that is
out of range never reaches an optimizer, and it holds only what JSON can hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

import torch

from hf_precond.fields import (
    bounded,
    conform,
    decay,
    from_text,
    hints_of,
    interval,
    one_of,
    positive,
    refuse_unknown,
)
from hf_precond.hub import HubMixin

ConfigT = TypeVar("ConfigT", bound="OptimizerConfig")

STATE_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class OptimizerConfig(HubMixin):
    """The fields every optimizer has.

    Args:
        lr: learning rate of all groups, > 0 or 0.
        weight_decay: decoupled weight decay of the decay group, >= 0.
        head_lr_scale: learning rate of a newly initialised head over the
            body's, > 0.
        betas: decay rates of the AdamW rule's two moments, each in [0, 1).
        eps: the AdamW rule's epsilon, >= 0.
        state_dtype: dtype of the Kronecker factors kept between steps (``sgdph``
            has none): ``float32``, ``float64``, ``bfloat16``, under ``nkfac``
            ``float16`` (others leave its range); ``None`` is float32, and
            float64 for float64 parameters.
        skip_nonfinite: leave a step out whose gradients are not all finite,
            as a loss scaler does: weights, moments and factors stay as they
            are (counted as ``skipped_steps``; ten in a row stop training).
            It costs one pass over the gradients and one reading from the
            device a step.

    Raises:
        ValueError: naming the field, its legal range and, for an unknown
            field, the nearest legal one.
    """

    name: ClassVar[str] = ""
    layout: ClassVar[tuple[str, ...]] = ("state_dtype",)
    """Fields that decide which tensors the state has: a checkpoint is refused under others."""

    lr: float = bounded(1e-3, 0.0)
    weight_decay: float = bounded(0.0, 0.0)
    head_lr_scale: float = positive(1.0)
    betas: tuple[float, float] = decay((0.9, 0.999))
    eps: float = bounded(1e-8, 0.0)
    state_dtype: str | None = one_of(*STATE_DTYPES)
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for item in fields(self):
            value = conform(type(self), item, hints[item.name], getattr(self, item.name))
            object.__setattr__(self, item.name, value)

    @classmethod
    def create(cls: type[ConfigT], **values: Any) -> ConfigT:
        """A config from keyword values, unknown names refused with the nearest legal one."""
        for key in values:
            refuse_unknown(cls, key)
        return cls(**values)

    @classmethod
    def from_strings(cls: type[ConfigT], values: Mapping[str, str]) -> ConfigT:
        """A config from ``key=value`` strings, as ``--optim_args`` hands them over."""
        return cls.create(**cls.parse(values))

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> dict[str, Any]:
        """Turn strings into the fields' types; a pair is written ``0.9:0.99``."""
        hints = hints_of(cls)
        parsed: dict[str, Any] = {}
        for key, text in values.items():
            refuse_unknown(cls, key)
            parsed[key] = from_text(cls, key, hints[key], str(text).strip())
        return parsed

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """A config from :meth:`to_dict`'s output, lists standing for pairs."""
        values = dict(values)
        name = values.pop("optimizer", cls.name)
        values.pop("hf_precond_version", None)
        if name != cls.name:
            raise ValueError(
                f"optimizer: this config is for {name!r}, and {cls.__name__} reads {cls.name!r}; "
                "use the config class of that optimizer."
            )
        return cls.create(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with the optimizer's name under ``optimizer``."""
        values = dataclasses.asdict(self)
        return {"optimizer": self.name} | {
            k: list(v) if isinstance(v, tuple) else v for k, v in values.items()
        }

    def replace(self: ConfigT, **values: Any) -> ConfigT:
        """The same config with some fields changed, validated again."""
        for key in values:
            refuse_unknown(type(self), key)
        return dataclasses.replace(self, **values)

    def factor_dtype(self, parameter_dtype: torch.dtype) -> torch.dtype:
        """The dtype of kept factors for a parameter of ``parameter_dtype``."""
        if self.state_dtype is not None:
            return STATE_DTYPES[self.state_dtype]
        return compute_dtype(parameter_dtype)


# The config saved in a folder or on the Hub, in the class that its "optimizer" names.
load_config = OptimizerConfig.from_pretrained


def compute_dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter_dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class AFOptConfig(OptimizerConfig):
    """AFOpt: the gradient step of attention taken in the space of its logits.

    Start from the learning rate that suits AdamW; for fine-tuning from that
    of its body, with a ``head_lr_scale`` that brings a new head to about
    1e-2 (measured on MiniLM only).

    Args:
        momentum: M's decay in the spectral direction, momentum of ``base="sgd"``
            and ``"muon"``, in [0, 1); 0.9 was worse in fine-tuning, else about
            even.
        base: the rule for every parameter outside ``scope``: ``adamw``,
            ``sgd``, ``adamr`` or ``muon``.
        scope: which matrices are preconditioned: ``query_key``,
            ``attention`` (q, k, v, o) or ``all_linear`` (MLP linears too).
            ``attention`` is cheaper, takes higher rates, and was better only
            where a task hangs on attention alone.
        direction: ``spectral`` (msign between the inverse square roots of the
            factors), ``inverse`` or ``inverse_sqrt``.
        scaling: ``rms``, ``logit_rms``, ``cap``, ``graft`` or
            ``norm_recovery``.
        lr_scale: multiplier of ``lr`` for the preconditioned matrices under
            ``scaling="rms"`` and ``"cap"``, and for the matrices left to
            ``base="muon"``, > 0.
        rho: the rms logit change per unit of lr that a step of q, and one of
            k, makes (``logit_rms``) or makes at most (``cap``), > 0.
        damping: multiple of a factor's mean eigenvalue added to its diagonal,
            > 0.
        covariant_damping: damp the per-head factors through the input factor
            (keeps the invariance to W_q -> W_q M, W_k -> W_k M^-T).
        stat_decay: decay of the factors' running average, in [0, 1).
        stat_interval: steps between two statistics, >= 1.
        inverse_interval: steps between two refreshes of the roots, >= 1.
        max_dim: a wider input side is treated in diagonal blocks of this
            size, >= 1.
        nesterov: Nesterov form of the momentum of the spectral direction.
        space: ``logits`` (factors of features) or ``product`` (of weights).
        joint: the joint least-squares correction of ``inverse``.
        center: leave row constants of the logits out of the metric.
        rope: the factor of rotated keys and queries: ``averaged`` over
            positions, or ``ignored``.
        attention_entropy: tell the entropy of each layer's attention weights
            in :meth:`diagnostics`, of eight query positions a sequence.
        precision: precision of large products on GPUs: ``highest``, ``tf32``
            or ``bf16``.
    """

    name: ClassVar[str] = "afopt"
    layout: ClassVar[tuple[str, ...]] = (
        *("state_dtype", "base", "scope", "direction", "scaling"),
        *("space", "joint", "center", "rope", "max_dim"),
    )

    state_dtype: str | None = one_of("float32", "float64", "bfloat16")
    momentum: float = decay(0.8)
    base: Literal["adamw", "sgd", "adamr", "muon"] = "adamw"
    scope: Literal["query_key", "attention", "all_linear"] = "all_linear"
    direction: Literal["spectral", "inverse", "inverse_sqrt"] = "spectral"
    scaling: Literal["rms", "logit_rms", "cap", "graft", "norm_recovery"] = "rms"
    lr_scale: float = positive(4.0)
    rho: float = positive(10.0)
    damping: float = positive(1.0)
    covariant_damping: bool = False
    stat_decay: float = decay(0.95)
    stat_interval: int = interval(5)
    inverse_interval: int = interval(20)
    max_dim: int = bounded(1024, 1)
    nesterov: bool = True
    space: Literal["logits", "product"] = "logits"
    joint: bool = False
    center: bool = False
    rope: Literal["averaged", "ignored"] = "averaged"
    attention_entropy: bool = False
    precision: Literal["highest", "tf32", "bf16"] = "highest"

    def __post_init__(self) -> None:
        super().__post_init__()
        for wrong, message in (
            (
                self.joint and (self.direction != "inverse" or self.space != "logits"),
                "joint=True: the joint correction exists for direction='inverse' in "
                "space='logits' only; set these, or joint=False.",
            ),
            (
                self.center and self.space != "logits",
                "center=True: space='product' has no features to center; set space='logits'.",
            ),
            (
                self.space != "logits" and self.scaling in ("logit_rms", "cap"),
                f"scaling={self.scaling!r}: the change of the logits is predicted from features; "
                "set space='logits', or scaling='rms'.",
            ),
            (
                self.scaling == "graft" and self.base not in ("adamw", "sgd"),
                f"scaling='graft': the norm of the step of base={self.base!r} is not defined for "
                "one matrix alone; set base='adamw' or 'sgd'.",
            ),
        ):
            if wrong:
                raise ValueError(message)


@dataclass(frozen=True)
class AdamRConfig(OptimizerConfig):
    """AdamR: Adam in the eigenbasis of the gradient's Kronecker second moments.

    Args:
        basis: ``auto`` (two-sided while cheap, else one-sided), ``two_sided``,
            ``one_sided`` (the smaller side) or ``identity`` (AdamW).
        basis_source: second moments of the ``gradient``, or of the layer's
            inputs and output gradients (``feature``).
        transport: how the second moment follows a new basis: it stays with
            its columns (``permute``) or spreads by ``overlap``.
        floor: smallest denominator, relative to the rms of the square roots
            of the second moment, >= 0.
        stat_decay: decay of the factors' running average, in [0, 1).
        stat_interval: steps between two updates of the factors, >= 1.
        basis_interval: steps between refreshes of a basis, give or take one, >= 1.
        basis_tolerance: a basis is left as it is while the off-diagonal part
            of its factor holds less than this share of the energy, in [0, 1].
        max_dim: a wider side is not rotated, >= 1.
        precision: precision of the rotations on GPUs: ``highest``, ``tf32``
            or ``bf16``.
    """

    name: ClassVar[str] = "adamr"
    layout = ("state_dtype", "basis", "basis_source", "basis_interval", "max_dim")

    state_dtype: str | None = one_of("float32", "float64", "bfloat16")
    basis: Literal["auto", "two_sided", "one_sided", "identity"] = "auto"
    basis_source: Literal["gradient", "feature"] = "gradient"
    transport: Literal["overlap", "permute"] = "permute"
    floor: float = bounded(1e-4, 0.0)
    stat_decay: float = decay(0.95)
    stat_interval: int = interval(1)
    basis_interval: int = interval(3)
    basis_tolerance: float = bounded(0.01, 0.0, 1.0)
    max_dim: int = bounded(2048, 1)
    precision: Literal["highest", "tf32", "bf16"] = "highest"


@dataclass(frozen=True)
class NKFACConfig(OptimizerConfig):
    """NKFAC: K-FAC whose inverses follow by Newton's iteration from the previous ones.

    Args:
        momentum: the SGD rule's momentum, in [0, 1).
        base: the rule that takes the preconditioned gradient: ``adamw``,
            ``sgd`` or ``adamr``.
        damping: multiple of a factor's largest eigenvalue added to its
            diagonal, > 0.
        stat_decay: decay of the factors' running average, in [0, 1).
        stat_interval: steps between two statistics, >= 1.
        stat_rows: at most so many rows (tokens, output positions) of a
            layer's call enter its statistics, evenly spaced; 0 for all.
        inverse_interval: steps between two refreshes of the inverses, >= 1.
        newton_steps: Newton iterations per refresh, >= 1.
        exact_interval: every this many refreshes the inverse is computed
            exactly, >= 1.
        solver: how inverses are refreshed: ``newton`` (from the previous
            ones), ``exact`` (anew each time), or ``auto``, the cheaper
            for a factor's size and device.
        max_dim: a wider side of a weight is not preconditioned, >= 1; a bias
            does not count.
        reference: reproduce the authors' published code step by step:
            NKFAC with ``base="sgd"``, AdaNKFAC with ``base="adamw"``.
        precision: precision of large products on GPUs: ``highest``, ``tf32``
            or ``bf16``.

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
    precision: Literal["highest", "tf32", "bf16"] = "highest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference and (self.base not in ("sgd", "adamw") or self.solver != "auto"):
            raise ValueError(
                f"reference=True: the authors' code is base='sgd' (NKFAC) or base='adamw' "
                f"(AdaNKFAC) with its own schedule of solvers, not base={self.base!r} and "
                f"solver={self.solver!r}; choose such a base and leave solver out, or leave "
                "reference out."
            )


@dataclass(frozen=True)
class SGDPHConfig(OptimizerConfig):
    """SGD-PH: norm parameters by their Hessian diagonal, the rest by a base rule.

    Args:
        momentum: the SGD rule's momentum, in [0, 1).
        base: the rule for all other parameters: ``sgd`` (the thesis) or
            ``adamw`` (our extension for transformers).
        probe: ``rademacher`` (unbiased estimate of the diagonal), ``ones``
            (the authors': row sums) or ``exact`` (one product a channel).
        probe_interval: steps between two probes, >= 1.
        probe_autocast: leave the passes of the steps that are probed under
            autocast, as all others are. By default they run in float32: the
            curvature then has no rounding noise of bfloat16 or float16, at
            the time and memory of a float32 step every ``probe_interval``.
        stat_decay: decay of the probe's running average, in [0, 1).
        tau: second-order learning rate of ``base="sgd"``, > 0.
        curvature_eps: added to the curvature under ``base="sgd"``, > 0.
        gamma: curvature multiplier in the denominator of ``base="adamw"``,
            > 0.
        include_bias: treat biases as channel-wise parameters too.
        reference: reproduce the authors' published code step by step, with
            ``base="sgd"`` and ``probe="ones"``: every one-dimensional
            parameter, one probed a step, averaged with ``momentum``
            (``probe_interval``, ``stat_decay`` and ``include_bias`` say
            nothing then, and autocast is left as it is).

    Raises:
        ValueError: ``reference`` with another base or probe.
    """

    name: ClassVar[str] = "sgdph"
    layout: ClassVar[tuple[str, ...]] = ("state_dtype", "base", "include_bias", "reference")

    momentum: float = decay(0.9)
    base: Literal["adamw", "sgd"] = "adamw"
    probe: Literal["rademacher", "ones", "exact"] = "rademacher"
    probe_interval: int = interval(20)
    probe_autocast: bool = False
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
