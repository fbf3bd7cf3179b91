"""What each parameter of a model is: the routing table, the parameter groups, the head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_precond.architectures.modules import (
    CONVOLUTIONS,
    EMBEDDINGS,
    TRANSPOSED_CONVOLUTIONS,
    is_linear,
    is_norm,
    tied_names,
    weight_norm_scales,
)
from hf_precond.architectures.peft import base_of
from hf_precond.architectures.structure import (
    AttentionBlock,
    LayerMatrix,
    ModelStructure,
    NormParameter,
    Route,
    RoutingTable,
)

PRECONDITIONED, FROZEN = "preconditioned", "frozen"
_HEAD_CHILDREN = frozenset(
    {"lm_head", "classifier", "score", "head", "fc", "qa_outputs", "embed_out", "output_projection"}
)


class ParameterSurvey:
    """A model's parameters by name, and what each of them is.

    Made once while a model is read, and not kept: it holds parameters.

    Args:
        model: the model.

    Raises:
        ValueError: for trainable complex parameters and for embeddings that
            make sparse gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.tied = tied_names(model)
        self.heads = find_head(model) | _output_names(model)
        self.owners: dict[str, tuple[nn.Module, str]] = {}
        for module in model.modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                self.owners.setdefault(self.names[id(parameter)], (module, attribute))
        self._refuse()

    def _refuse(self) -> None:
        for name, parameter in self.parameters.items():
            module = self.owners[name][0]
            if not parameter.requires_grad:
                continue
            if parameter.is_complex():
                raise ValueError(
                    f"{name} is complex: hf_precond steps real parameters only; freeze it, or hold "
                    "its real and imaginary parts as two parameters."
                )
            if isinstance(module, EMBEDDINGS) and module.sparse:
                raise ValueError(
                    f"{name} makes sparse gradients, which no optimizer of hf_precond takes; "
                    "build the embedding with sparse=False."
                )

    def name_of(self, parameter: Tensor) -> str:
        """The (first) name of a parameter."""
        return self.names[id(parameter)]

    def matrix_names(self, matrix: LayerMatrix) -> list[str]:
        """Names of the parameters of a matrix that train."""
        parameters = [matrix.weight_parameter, matrix.bias_parameter]
        return [self.name_of(p) for p in parameters if p is not None and p.requires_grad]

    def describe(self, name: str) -> str:
        """What a parameter is, in a few words."""
        module, attribute = self.owners[name]
        if name in self.tied:
            return f"tied to {', '.join(self.tied[name])}"
        if not self.parameters[name].numel():
            return "empty"
        if isinstance(module, EMBEDDINGS):
            return "embedding"
        if is_norm(module):
            return f"{'scale' if attribute == 'weight' else 'shift'} of {type(module).__name__}"
        if attribute in weight_norm_scales(module):
            return "weight-norm scale"
        if ".lora_" in name or ".adapter" in name:
            return "adapter"
        if name in self.heads:
            return "output head"
        if "bias" in attribute:
            return "bias"
        if is_linear(module):
            return "linear layer"
        if isinstance(module, CONVOLUTIONS):
            return "convolution"
        if isinstance(module, TRANSPOSED_CONVOLUTIONS):
            return "transposed convolution"
        return f"{attribute} of {type(module).__name__}"

    def table(
        self, treated: Mapping[str, str], base: str, reasons: Mapping[str, str] | None = None
    ) -> RoutingTable:
        """The routing table.

        Args:
            treated: preconditioned parameter to reason.
            base: name of the base rule of all others that train.
            reasons: more to say of some of those than :meth:`describe` does.
        """
        routes = []
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                treatment, reason = FROZEN, "does not train"
            elif name in treated:
                treatment, reason = PRECONDITIONED, treated[name]
            else:
                treatment, reason = base, (reasons or {}).get(name) or self.describe(name)
            routes.append(Route(name, tuple(parameter.shape), treatment, reason))
        return RoutingTable(routes)


    def structure(
        self,
        config: Any,
        treated: Mapping[str, str],
        reasons: Mapping[str, str] | None = None,
        *,
        matrices: Sequence[LayerMatrix] = (),
        others: Sequence[LayerMatrix] = (),
        attention: Sequence[AttentionBlock] = (),
        norms: Sequence[NormParameter] = (),
    ) -> ModelStructure:
        """What an optimizer is given: its matrices or norms, and the routing table.

        Args:
            config: the optimizer's; ``base`` is read.
            treated: preconditioned parameter to reason.
            reasons: more to say of the others, see :meth:`table`.
            matrices: see :class:`~hf_precond.architectures.structure.ModelStructure`.
            others: the same.
            attention: the same.
            norms: the same.
        """
        return ModelStructure(
            matrices=list(matrices),
            others=list(others),
            attention=list(attention),
            norms=list(norms),
            routing=self.table(treated, getattr(config, "base", "adamw"), reasons),
            owners=[(name, *owner) for name, owner in self.owners.items()],
            model=self.model,
        )


def _output_names(model: nn.Module) -> set[str]:
    """Parameters of the layers that make the model's outputs, newly initialised or not."""
    inner = base_of(model)
    ends = [output_embedding(model)]
    if not hasattr(inner, "base_model_prefix"):
        ends += [child for name, child in inner.named_children() if name in _HEAD_CHILDREN]
    own = {id(p) for end in ends if isinstance(end, nn.Module) for p in end.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def add_reason(treated: dict[str, str], names: Iterable[str], reason: str) -> None:
    """Note a reason; a parameter of several matrices gathers theirs."""
    for name in names:
        known = treated.get(name)
        if known is None:
            treated[name] = reason
        elif reason not in known.split("; "):
            treated[name] = f"{known}; {reason}"


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
