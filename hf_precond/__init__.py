"""Preconditioned optimizers for Hugging Face Transformers, selected by ``--optim``.

Importing this package makes ``--optim`` take the names of :func:`list_optimizers`;
everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_precond.integrations.registration import register_at_import

if TYPE_CHECKING:
    from hf_precond.architectures.attention_block import declare_attention as declare_attention
    from hf_precond.architectures.experts import declare_experts as declare_experts
    from hf_precond.architectures.pretrained import starting_lr as starting_lr
    from hf_precond.config.base import OptimizerConfig as OptimizerConfig
    from hf_precond.config.base import load_config as load_config
    from hf_precond.integrations.registration import register as register
    from hf_precond.integrations.trainer import PrecondSeq2SeqTrainer as PrecondSeq2SeqTrainer
    from hf_precond.integrations.trainer import PrecondTrainer as PrecondTrainer
    from hf_precond.optimizers.adamr.config import AdamRConfig as AdamRConfig
    from hf_precond.optimizers.adamr.optimizer import AdamR as AdamR
    from hf_precond.optimizers.afopt.config import AFOptConfig as AFOptConfig
    from hf_precond.optimizers.afopt.optimizer import AFOpt as AFOpt
    from hf_precond.optimizers.muon.config import MuonConfig as MuonConfig
    from hf_precond.optimizers.muon.optimizer import Muon as Muon
    from hf_precond.optimizers.nkfac.config import NKFACConfig as NKFACConfig
    from hf_precond.optimizers.nkfac.optimizer import NKFAC as NKFAC
    from hf_precond.optimizers.sgdph.config import SGDPHConfig as SGDPHConfig
    from hf_precond.optimizers.sgdph.optimizer import SGDPH as SGDPH
    from hf_precond.registry import create_optimizer as create_optimizer
    from hf_precond.registry import list_optimizers as list_optimizers
    from hf_precond.registry import register_optimizer as register_optimizer

__version__ = "0.3.0.dev0"

_WHERE = {
    "AFOpt": "optimizers.afopt.optimizer",
    "AFOptConfig": "optimizers.afopt.config",
    "AdamR": "optimizers.adamr.optimizer",
    "AdamRConfig": "optimizers.adamr.config",
    "Muon": "optimizers.muon.optimizer",
    "MuonConfig": "optimizers.muon.config",
    "NKFAC": "optimizers.nkfac.optimizer",
    "NKFACConfig": "optimizers.nkfac.config",
    "OptimizerConfig": "config.base",
    "PrecondSeq2SeqTrainer": "integrations.trainer",
    "PrecondTrainer": "integrations.trainer",
    "SGDPH": "optimizers.sgdph.optimizer",
    "SGDPHConfig": "optimizers.sgdph.config",
    "create_optimizer": "registry",
    "declare_attention": "architectures.attention_block",
    "declare_experts": "architectures.experts",
    "list_optimizers": "registry",
    "load_config": "config.base",
    "register": "integrations.registration",
    "register_optimizer": "registry",
    "starting_lr": "architectures.pretrained",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hf_precond' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_precond.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


register_at_import()
