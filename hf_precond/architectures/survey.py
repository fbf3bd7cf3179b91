"""What a parameter is, in words: the reasons of the routing table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_precond.architectures.groups import find_head, output_embedding
from hf_precond.architectures.modules import (
    CONVOLUTIONS,
    EMBEDDINGS,
    TRANSPOSED_CONVOLUTIONS,
    is_linear,
    tied_names,
)
from hf_precond.architectures.norms import is_norm, weight_norm_scales
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
