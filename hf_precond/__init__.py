"""Preconditioned optimizers for Hugging Face Transformers, selected by ``--optim``.

Importing this package registers the names ``adamr``, ``afopt``, ``nkfac`` and
``sgdph``; everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_precond.trainer.register import register_at_import

if TYPE_CHECKING:
    from hf_precond.configs import (
        AdamRConfig,
        AFOptConfig,
        NKFACConfig,
        OptimizerConfig,
        SGDPHConfig,
        load_config,
    )
    from hf_precond.model.attention import declare_attention
    from hf_precond.optim.adamr import AdamR
    from hf_precond.optim.afopt import AFOpt
    from hf_precond.optim.nkfac import NKFAC
    from hf_precond.optim.sgdph import SGDPH
    from hf_precond.registry import create_optimizer, list_optimizers
    from hf_precond.trainer.register import register
    from hf_precond.trainer.trainer import PrecondSeq2SeqTrainer, PrecondTrainer

__version__ = "0.1.0"

_WHERE = {
    "AFOpt": "optim.afopt",
    "AFOptConfig": "configs",
    "AdamR": "optim.adamr",
    "AdamRConfig": "configs",
    "NKFAC": "optim.nkfac",
    "NKFACConfig": "configs",
    "OptimizerConfig": "configs",
    "PrecondSeq2SeqTrainer": "trainer.trainer",
    "PrecondTrainer": "trainer.trainer",
    "SGDPH": "optim.sgdph",
    "SGDPHConfig": "configs",
    "create_optimizer": "registry",
    "declare_attention": "model.attention",
    "list_optimizers": "registry",
    "load_config": "configs",
    "register": "trainer.register",
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
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hf_precond' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_precond.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


register_at_import()
