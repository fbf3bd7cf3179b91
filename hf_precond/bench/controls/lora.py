"""Optimizers for LoRA's adapters: LoRA+ and LoRA-Muon. AdamW steps whatever is no adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_precond.architectures.parameters import ParameterSurvey, add_reason
from hf_precond.architectures.peft import find_adapter, wrappers_of
from hf_precond.architectures.structure import LowRankAdapter, ModelStructure
from hf_precond.bench.controls.common import RMS, ControlConfig
from hf_precond.config.base import decay, positive
from hf_precond.linalg.matrix_functions import largest_entry, newton_schulz
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.base.parameters import Bound, BoundMatrix, Preconditioned, allocate
from hf_precond.registry import create_optimizer


@dataclass(frozen=True)
class LoRAPlusConfig(ControlConfig):
    """AdamW with a larger learning rate for LoRA's B.

    Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models",
    2024.

    Args:
        ratio: B's learning rate over ``lr``, > 0. Default 16, the authors'.
    """

    name: ClassVar[str] = "lora_plus"

    ratio: float = positive(16.0)

    def build(self, model: nn.Module, warmup: int) -> PrecondOptimizer:
        """AdamW (``adamr basis=identity``) with B in groups of its own."""
        upper = {id(pair.up.weight_parameter) for pair in adapters(model)}
        groups: list[dict[str, Any]] = []
        for group in self.groups(model):
            for inside in (False, True):
                params = [p for p in group["params"] if (id(p) in upper) is inside]
                own = {k: v for k, v in group.items() if k != "lr"} | {"params": params}
                if (
                    inside
                ):  # the others have no rate of their own: a new head is stepped by its rule
                    own |= {"lr": self.lr * self.ratio, "name": f"{group['name']} of B"}
                groups += [own] if params else []
        fields = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "head": self.head}
        return create_optimizer(model, "adamr", params=groups, basis="identity", **fields)


@dataclass(frozen=True)
class LoRAMuonConfig(ControlConfig):
    """The fields of LoRA-Muon.

    Args:
        momentum: μ, in [0, 1). Default 0.95.
        nesterov: Nesterov's form. Default ``True``.
        lr_scale: learning rate of the adapters over ``lr``, > 0. Default 1.
        damping: δ, in units of a Gram matrix' mean eigenvalue, > 0.
            Default 1e-4.
    """

    name: ClassVar[str] = "lora_muon"

    momentum: float = decay(0.95)
    nesterov: bool = True
    lr_scale: float = positive(1.0)
    damping: float = positive(1e-4)

    def build(self, model: nn.Module, warmup: int) -> PrecondOptimizer:
        """:class:`LoRAMuon` of a model."""
        pairs = adapters(model)
        optimizer = LoRAMuon(self.groups(model), _structure(model, self, pairs), self)
        optimizer.pairs = {
            each.name: (pair, each is pair.up) for pair in pairs for each in (pair.down, pair.up)
        }
        return optimizer


class LoRAMuon(PrecondOptimizer):
    """Muon on the product ``s B A`` of LoRA, stepped by its factors in turn.

    ``R_A = (A Aᵀ + δ tr(A Aᵀ)/r I)^-½`` and R_B of ``Bᵀ B`` alike; M the momenta
    (with Nesterov's look ahead)::

        B ← B - lr·m·0.2·√max(out, in) / (2 s) · msign(M_B R_A) R_A
        A ← A - lr·m·0.2·√max(out, in) / (2 s) · R_B msign(R_B M_A)

    so that each changes the product by a matrix whose singular values are equal,
    whatever the sizes of A and B are. A zero matrix (B at first) has R = 0.

    Source: "LoRA-Muon", 2026, arXiv 2606.12921, without its weight decay of the
    product; its scale is here Muon's ``match_rms_adamw``.

    Args:
        param_groups: as for any torch optimizer.
        structure: ``matrices`` are the A and B.
        config: the fields.

    Attributes:
        pairs: of a matrix' name its pair, and whether it is the pair's B.
    """

    config: LoRAMuonConfig
    pairs: dict[str, tuple[LowRankAdapter, bool]]

    def allocate(self, bound: BoundMatrix) -> None:
        """Make the momentum, where it is missing."""
        state, shape = self.state[bound.weight], bound.matrix.shape
        allocate(state, "momentum", shape, bound.dtype, bound.weight.device)

    def precondition(self, ready: Sequence[BoundMatrix]) -> Iterable[Preconditioned]:
        """The step of each A and B; both from the weights before it."""
        config = self.config
        steps = []
        for bound in ready:
            gradient = bound.gradient()
            assert gradient is not None  # those in `ready` have one
            momentum = self.state[bound.weight]["momentum"]
            beta = self.param_groups[bound.group]["momentum"]
            momentum.mul_(beta).add_(gradient)
            ahead = gradient + beta * momentum if config.nesterov else momentum
            pair, is_up = self.pairs[bound.matrix.name]
            other = (pair.down if is_up else pair.up).read().to(ahead.dtype)
            root = inverse_root(other @ other.mT if is_up else other.mT @ other, config.damping)
            inside = ahead @ root if is_up else root @ ahead
            sign = newton_schulz(inside / largest_entry(inside))
            found = sign @ root if is_up else root @ sign
            longest = max(pair.up.shape[0], pair.down.shape[1])
            length = config.lr_scale * RMS * longest**0.5 / (2 * pair.scaling)
            steps.append(Preconditioned(bound, found * length, "direction"))
        return steps

    def uses_fallback(self, bound: Bound) -> bool:
        """No: AdamW never steps these matrices."""
        return False


def adapters(model: nn.Module) -> list[LowRankAdapter]:
    """The LoRA pairs that train.

    Args:
        model: the model.

    Raises:
        ValueError: there is none.
    """
    names = {module: name for name, module in model.named_modules()}
    found = [find_adapter(each, names[each]) for each in wrappers_of(model).values()]
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        raise ValueError("the model has no LoRA adapter that trains; give its task a lora_rank.")
    return pairs


def inverse_root(gram: Tensor, damping: float) -> Tensor:
    """``(G + δ tr(G)/r I)^-½``; zeros where G is zero.

    Args:
        gram: G, ``[r, r]``.
        damping: δ.
    """
    values, vectors = torch.linalg.eigh(gram)
    ridge = damping * values.mean()
    powers = torch.where(ridge > 0, (values.clamp_min(0) + ridge).rsqrt(), 0.0)
    return (vectors * powers) @ vectors.mT


def _structure(
    model: nn.Module, config: LoRAMuonConfig, pairs: Sequence[LowRankAdapter]
) -> ModelStructure:
    """The A and B as the matrices of an optimizer."""
    survey, treated = ParameterSurvey(model), dict[str, str]()
    matrices = [matrix for pair in pairs for matrix in (pair.down, pair.up)]
    for matrix in matrices:
        add_reason(treated, survey.matrix_names(matrix), "LoRA")
    return survey.structure(config, treated, matrices=matrices)
