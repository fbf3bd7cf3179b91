"""Preconditioned optimizers for Hugging Face Transformers, selected by ``--optim``.

Importing this package makes ``--optim`` take the names of :func:`list_optimizers`;
everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_precond.integrations.registration import register_at_import

if TYPE_CHECKING:
    from hf_precond.architectures.attention_block import declare_attention
    from hf_precond.config.base import OptimizerConfig, load_config
    from hf_precond.integrations.registration import register
    from hf_precond.integrations.trainer import PrecondSeq2SeqTrainer, PrecondTrainer
    from hf_precond.optimizers.adamr.config import AdamRConfig
    from hf_precond.optimizers.adamr.optimizer import AdamR
    from hf_precond.optimizers.afopt.config import AFOptConfig
    from hf_precond.optimizers.afopt.optimizer import AFOpt
    from hf_precond.optimizers.nkfac.config import NKFACConfig
    from hf_precond.optimizers.nkfac.optimizer import NKFAC
    from hf_precond.optimizers.sgdph.config import SGDPHConfig
    from hf_precond.optimizers.sgdph.optimizer import SGDPH
    from hf_precond.registry import create_optimizer, list_optimizers, register_optimizer

__version__ = "0.1.0"

_WHERE = {
    "AFOpt": "optimizers.afopt.optimizer",
    "AFOptConfig": "optimizers.afopt.config",
    "AdamR": "optimizers.adamr.optimizer",
    "AdamRConfig": "optimizers.adamr.config",
    "NKFAC": "optimizers.nkfac.optimizer",
    "NKFACConfig": "optimizers.nkfac.config",
    "OptimizerConfig": "config.base",
    "PrecondSeq2SeqTrainer": "integrations.trainer",
    "PrecondTrainer": "integrations.trainer",
    "SGDPH": "optimizers.sgdph.optimizer",
    "SGDPHConfig": "optimizers.sgdph.config",
    "create_optimizer": "registry",
    "declare_attention": "architectures.attention_block",
    "list_optimizers": "registry",
    "load_config": "config.base",
    "register": "integrations.registration",
    "register_optimizer": "registry",
}

__all__ = [
    "NKFAC",
    "SGDPH",
    "AFOpt",
    "AFOptConfig",
    "AdamR",
    "AdamRConfig",
    "NKFACConfig",
    "OptimizerConfig",
    "PrecondSeq2SeqTrainer",
    "PrecondTrainer",
    "SGDPHConfig",
    "create_optimizer",
    "declare_attention",
    "list_optimizers",
    "load_config",
    "register",
    "register_optimizer",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hf_precond' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_precond.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


register_at_import()
