"""Which rule a config's ``base`` names."""

from __future__ import annotations

from typing import Any

from hf_precond.optim.muon import MuonRule
from hf_precond.optim.rotation.rule import RotatedAdamRule
from hf_precond.optim.rules import AdamWRule, Rule, SGDRule


def group_defaults(config: Any) -> dict[str, Any]:
    """What a parameter group has unless it says otherwise.

    Schedules that cycle the momentum (``OneCycleLR``, ``CyclicLR``) cycle
    ``betas`` where there are any: groups stepped by SGD have ``momentum`` alone.

    Args:
        config: the optimizer's.
    """
    values: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "step": 0}
    if getattr(config, "base", "adamw") != "sgd":
        values |= {"betas": config.betas, "eps": config.eps}
    if hasattr(config, "momentum"):
        values["momentum"] = config.momentum
    return values


def make_rule(name: str, config: Any) -> Rule:
    """The rule that a config's ``base`` names.

    Args:
        name: ``adamw``, ``sgd``, ``adamr`` or ``muon``.
        config: where the rule reads its fields.

    Raises:
        ValueError: for any other name.
    """
    reference = getattr(config, "reference", False)
    if name == "adamw":
        return AdamWRule(decay_in_step=reference)
    if name == "sgd":
        return SGDRule(coupled=reference)
    if name == "adamr":
        return RotatedAdamRule.under(config)
    if name == "muon":
        return MuonRule.under(config)
    raise ValueError(f"base={name!r}: no such rule; the rules are 'adamw', 'sgd', 'adamr', 'muon'.")
