"""Name -> config, optimizer and how it reads a model; ``create_optimizer``."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_precond.architectures.parameters import parameter_groups
from hf_precond.architectures.structure import ModelStructure, RoutingTable
from hf_precond.config.base import OptimizerConfig
from hf_precond.distributed.strategies import unsupported_strategy
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.optimizer import AdamR, every_matrix
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.optimizer import AFOpt
from hf_precond.optimizers.afopt.plan import attention_matrices
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.optimizers.nkfac.optimizer import NKFAC, layer_matrices
from hf_precond.optimizers.sgdph.config import SGDPHConfig
from hf_precond.optimizers.sgdph.optimizer import SGDPH, norm_parameters


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer of the package.

    Args:
        name: what stands behind ``--optim``.
        config_cls: its fields.
        optimizer_cls: built as ``optimizer_cls(param_groups, blocks, config)``.
        select: reads a model: which of its parameters are preconditioned.
        description: one line.
        memory: the numbers kept for a matrix ``[m, n]``, one line.
    """

    name: str
    config_cls: type[OptimizerConfig]
    optimizer_cls: type[PrecondOptimizer]
    select: Callable[[nn.Module, Any], ModelStructure]
    description: str
    memory: str


_OPTIMIZERS = {
    info.name: info
    for info in (
        OptimizerInfo(
            "adamr",
            AdamRConfig,
            AdamR,
            every_matrix,
            "Adam in the eigenbasis of the gradient's Kronecker second moments",
            "2mn, and 2m² (2n²) where its left (right) side is rotated",
        ),
        OptimizerInfo(
            "afopt",
            AFOptConfig,
            AFOpt,
            attention_matrices,
            "attention's gradient step taken in logit space, from its features",
            "mn; a layer's input n(n+1)/2 and a root, n(n+1)/2 or n²; its heads",
        ),
        OptimizerInfo(
            "nkfac",
            NKFACConfig,
            NKFAC,
            layer_matrices,
            "K-FAC, each inverse by Newton's iteration from the one before",
            "2m² + 2n², factor and inverse of each side, and the base rule's",
        ),
        OptimizerInfo(
            "sgdph",
            SGDPHConfig,
            SGDPH,
            norm_parameters,
            "norm parameters by their Hessian diagonal, the rest by a base rule",
            "the base rule's, and one number more a norm parameter",
        ),
    )
}


def list_optimizers() -> list[str]:
    """The names that ``--optim`` and :func:`create_optimizer` take."""
    return sorted(_OPTIMIZERS)


def get_info(name: str) -> OptimizerInfo:
    """The entry of an optimizer.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if not isinstance(name, str) or name not in _OPTIMIZERS:
        near = difflib.get_close_matches(str(name).lower(), _OPTIMIZERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"optimizer {name!r} is unknown{hint} The names are {', '.join(list_optimizers())}."
        )
    return _OPTIMIZERS[name]


def make_config(name_or_config: str | OptimizerConfig, **values: Any) -> OptimizerConfig:
    """A validated config from a name and fields, or a config with some fields changed."""
    if isinstance(name_or_config, OptimizerConfig):
        return name_or_config.replace(**values)
    return get_info(name_or_config).config_cls.create(**values)


def create_optimizer(
    model: nn.Module, name_or_config: str | OptimizerConfig, **values: Any
) -> PrecondOptimizer:
    """Build an optimizer for a model.

    Weight decay applies by the Trainer's rule: not to biases and norms. With
    ``head_lr_scale`` other than 1 the newly initialised head has groups of its
    own. The routing table (``print(optimizer.routing)``) says what becomes of
    every parameter.

    Args:
        model: any ``nn.Module``; attention is found in the families of
            transformers, or declared.
        name_or_config: ``"afopt"``, ``"adamr"``, ``"nkfac"``, ``"sgdph"``, or
            a config.
        **values: fields of the config.

    Raises:
        TypeError: ``model`` is no module (its parameters alone do not tell
            where its layers are).
        ValueError: an unknown name or field, a value out of range, complex
            parameters, a model in which nothing would be preconditioned, or a
            training under DeepSpeed, FSDP1, Megatron-LM or tensor parallelism.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"create_optimizer: the first argument is a {type(model).__name__} and must be the "
            "model (an nn.Module), not its name or parameters: create_optimizer(model, 'afopt')."
        )
    config = make_config(name_or_config, **values)
    info = get_info(config.name)
    structure = read_model(model, config)
    groups, labels = parameter_groups(
        model, config.lr, config.weight_decay, config.head_lr_scale
    )
    structure.routing = RoutingTable(
        [replace(route, group=labels.get(route.name, "")) for route in structure.routing]
    )
    return info.optimizer_cls(groups, structure, config)


def read_model(model: nn.Module, config: OptimizerConfig) -> ModelStructure:
    """What the optimizer of ``config`` would precondition in ``model``.

    Raises:
        ValueError: nothing would be, or what runs the training cannot be served.
    """
    refused = unsupported_strategy(model, config.name)
    if refused is not None:
        raise ValueError(refused)
    structure = get_info(config.name).select(model, config)
    structure.reread = functools.partial(read_model, config=config)
    return structure
