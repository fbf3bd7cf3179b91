"""Parameter groups: what decays, and which parameters are a newly initialised head."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from hf_precond.architectures.peft import base_of

DECAY, NO_DECAY = "decay", "no decay"
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def undecayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay, by the Trainer's rule.

    Those are parameters inside an ``nn.LayerNorm``, and those whose name has
    ``bias``, ``layernorm``, ``rmsnorm``, or a part ``norm`` or ``…_norm``.
    """
    inside = [
        f"{path}."
        for path, module in model.named_modules()
        if path and isinstance(module, nn.LayerNorm)
    ]
    return {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if _UNDECAYED.search(name.lower()) or name.startswith(tuple(inside))
    }


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to the vocabulary, or ``None``."""
    get = getattr(base_of(model), "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None


def find_head(model: nn.Module) -> set[str]:
    """Names of the parameters of a newly initialised task head.

    In a ``transformers`` model: the parameters outside its base model, none of
    which the base model shares. A model with output embeddings (a language
    model) has no new head. In a PEFT model: the trainable modules that are
    saved along with the adapter, and the unwrapped model's head where that
    trains. A plain module has no head that could be told.
    """
    inner = base_of(model)
    names = _saved_names(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", "") or "", None)
    if output_embedding(model) is not None or not isinstance(body, nn.Module) or body is inner:
        return names
    shared = {id(parameter) for parameter in body.parameters()}
    outside = {id(p) for p in inner.parameters() if id(p) not in shared}
    return names | {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in outside and ".lora_" not in name
    }


def _saved_names(model: nn.Module) -> set[str]:
    """Parameters that PEFT trains whole, vocabularies (which are not new) left out."""
    output = output_embedding(model)
    names: set[str] = set()
    for path, module in model.named_modules():
        saved = getattr(module, "modules_to_save", None)
        original = getattr(module, "original_module", None)
        vocabulary = isinstance(original, nn.Embedding) or (
            output is not None and output in (module, original)
        )
        if isinstance(saved, nn.ModuleDict) and not vocabulary:
            for name, parameter in saved.named_parameters():
                if parameter.requires_grad:
                    names.add(f"{path}.modules_to_save.{name}")
    return names


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, head_lr_scale: float = 1.0
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Parameter groups of the trainable parameters.

    Args:
        model: the model.
        lr: learning rate of the body.
        weight_decay: weight decay of the groups that decay.
        head_lr_scale: learning rate of the head over the body's; at 1 the
            head has no groups of its own.

    Returns:
        The groups (``decay``, ``no decay``, and with a head of its own
        ``head decay``, ``head no decay``; empty ones left out), each with
        ``params``, ``lr``, ``weight_decay`` and ``name``, and the group name
        of every trainable parameter.

    Raises:
        ValueError: when nothing trains, or ``head_lr_scale`` is not 1 and the
            model has no head that could be told.
    """
    undecayed = undecayed_names(model)
    head = find_head(model) if head_lr_scale != 1.0 else set()
    if head_lr_scale != 1.0 and not head:
        raise ValueError(
            f"head_lr_scale={head_lr_scale}: this model has no newly initialised head that could "
            "be told from its body; leave head_lr_scale at 1, or pass parameter groups with the "
            "learning rates you want."
        )
    labels: dict[str, str] = {}
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            label = NO_DECAY if name in undecayed else DECAY
            labels[name] = f"head {label}" if name in head else label
            members.setdefault(labels[name], []).append(parameter)
    if not members:
        raise ValueError("the model has no trainable parameter; unfreeze something to train.")
    groups = [
        {
            "params": members[label],
            "lr": lr * head_lr_scale if label.startswith("head") else lr,
            "weight_decay": 0.0 if label.endswith(NO_DECAY) else weight_decay,
            "name": label,
        }
        for label in (DECAY, NO_DECAY, f"head {DECAY}", f"head {NO_DECAY}")
        if label in members
    ]
    return groups, labels
