"""What each parameter of a model is: the routing table, the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_precond.architectures.modules import (
    CONVOLUTIONS,
    EMBEDDINGS,
    PARAMETRISED,
    TRANSPOSED_CONVOLUTIONS,
    base_of,
    has_adapters,
    has_experts,
    is_linear,
    is_norm,
    layer_of,
    owned_parameters,
    weight_norm_scales,
)
from hf_precond.architectures.structure import (
    FROZEN,
    PRECONDITIONED,
    LayerMatrix,
    LowRankAdapter,
    ModelStructure,
    NormParameter,
    Route,
    RoutingTable,
)
from hf_precond.architectures.tables import FOR_TASK, HEAD_CHILDREN, LORA_MARK, NECKS

if TYPE_CHECKING:
    from hf_precond.architectures.attention_block import AttentionBlock
    from hf_precond.architectures.experts import ExpertMatrix


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
        self.head = find_head(model) | _output_names(model)
        self.adapters: set[int] = set()
        if has_adapters(model):
            from hf_precond.architectures.peft import adapter_parameters

            self.adapters = {id(parameter) for parameter in adapter_parameters(model)}
        self.experts: list[ExpertMatrix] = []
        self.routers: set[str] = set()
        if has_experts(model):
            from hf_precond.architectures.experts import find_experts, find_routers

            self.experts, self.routers = find_experts(model), find_routers(model)
        self.owners: dict[str, tuple[nn.Module, str]] = {}
        self.layers: dict[str, tuple[nn.Module, str]] = {}
        self.computed: dict[str, str] = {}
        modules = dict(model.named_modules())
        for path, module, attribute in owned_parameters(model):
            name = self.name_of(getattr(module, attribute))
            self.owners[name] = module, attribute
            _, layer, tensor = layer_of(modules, path, attribute)
            self.layers[name] = layer, tensor
            if module is layer and (PARAMETRISED in path or attribute.endswith("_v")):
                self.computed[name] = _computed(modules, path, attribute)
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
        module, attribute = self.layers[name]
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
        if self.computed.get(name):
            return self.computed[name]
        if LORA_MARK in name or id(self.parameters[name]) in self.adapters:
            return "adapter"
        if name in self.head:
            return "output head"
        if name in self.routers:
            return "router"
        if "bias" in attribute:
            return "bias"
        if is_linear(module):
            return "linear layer"
        if isinstance(module, CONVOLUTIONS):
            return "convolution"
        if isinstance(module, TRANSPOSED_CONVOLUTIONS):
            return "transposed convolution"
        return f"{attribute} of {type(module).__name__}"

    def structure(
        self,
        config: Any,
        treated: Mapping[str, str],
        reasons: Mapping[str, str] | None = None,
        *,
        matrices: Sequence[LayerMatrix] = (),
        hidden: Sequence[LayerMatrix] = (),
        attention: Sequence[AttentionBlock] = (),
        adapters: Sequence[LowRankAdapter] = (),
        norms: Sequence[NormParameter] = (),
    ) -> ModelStructure:
        """The structure that an optimizer is given.

        Args:
            config: the optimizer's; ``base`` is read.
            treated: preconditioned parameter to reason.
            reasons: what to say of some of the others in place of :meth:`describe`.
            matrices: see :class:`~hf_precond.architectures.structure.ModelStructure`.
            hidden: the same.
            attention: the same.
            adapters: the same.
            norms: the same.
        """
        routes = []
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                treatment, reason = FROZEN, "does not train"
            elif name in treated:
                treatment, reason = PRECONDITIONED, treated[name]
            else:
                treatment = getattr(config, "base", "adamw")
                reason = (reasons or {}).get(name) or self.describe(name)
            routes.append(Route(name, tuple(parameter.shape), treatment, reason))
        return ModelStructure(
            matrices=list(matrices),
            hidden=list(hidden),
            attention=list(attention),
            adapters=list(adapters),
            norms=list(norms),
            routing=RoutingTable(routes),
            owners=[(name, *owner) for name, owner in self.owners.items()],
            model=self.model,
        )


def _computed(modules: Mapping[str, nn.Module], path: str, attribute: str) -> str:
    """What is computed from a parameter that is no matrix of its layer; empty where nothing is."""
    from hf_precond.architectures.computed import computed_by, layer_above

    above = layer_above(modules, path, attribute)
    if above is None:
        return ""
    _, layer, name = above
    return f"its layer's {name} is computed from it by {computed_by(layer, name)}"


def add_reason(treated: dict[str, str], names: Iterable[str], reason: str) -> None:
    """Note why parameters are treated as they are; one of several matrices gathers their reasons.

    Args:
        treated: parameter to reason, changed in place.
        names: the parameters.
        reason: the reason.
    """
    for name in names:
        known = treated.get(name)
        if known is None:
            treated[name] = reason
        elif reason not in known.split("; "):
            treated[name] = f"{known}; {reason}"


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each tied parameter to its other names.

    A module that stands under two names (a wrapper with a ``model`` and its ``encoder``) is one
    module, whose parameters are not tied.
    """
    names: dict[int, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}".lstrip(".")
            names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return {tied[0]: tied[1:] for tied in names.values() if len(tied) > 1}


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that maps hidden states to the vocabulary; ``None`` where there is none."""
    get = getattr(base_of(model), "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None


def find_head(model: nn.Module) -> set[str]:
    """Names of the parameters of a newly initialised task head.

    In a ``transformers`` model: the parameters outside its base model, none of
    which the base model shares, without necks; where it has no base model by
    that name (CLIP's classifier), the children that are called heads. A model
    with output embeddings (a language model) has no new head, nor has a class
    of ``transformers`` that is for no task (``DINOv3ViTModel``). In a PEFT
    model: the trainable modules that are saved along with the adapter, and the
    unwrapped model's head where that trains. Of a plain module no head is known.
    """
    inner, vocabulary = base_of(model), output_embedding(model)
    names: set[str] = set()
    if has_adapters(model):
        from hf_precond.architectures.peft import saved_names

        names = saved_names(model, vocabulary)
    prefix = getattr(inner, "base_model_prefix", None)
    body = getattr(inner, prefix or "", None)
    kind = type(inner)
    taskless = kind.__module__.startswith("transformers.") and not FOR_TASK.search(kind.__name__)
    if vocabulary is not None or prefix is None or taskless or body is inner:
        return names
    children = dict(inner.named_children())
    if isinstance(body, nn.Module):
        inside = [body, *(children[name] for name in NECKS if name in children)]
        shared = {id(parameter) for module in inside for parameter in module.parameters()}
        outside = {id(p) for p in inner.parameters() if id(p) not in shared}
    else:
        heads = (c for n, c in children.items() if n in HEAD_CHILDREN or n.endswith("_head"))
        outside = {id(parameter) for head in heads for parameter in head.parameters()}
    return names | {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in outside and LORA_MARK not in name
    }


def _output_names(model: nn.Module) -> set[str]:
    """Parameters of the layers that make the model's outputs, newly initialised or not."""
    inner = base_of(model)
    ends = [output_embedding(model)]
    if not hasattr(inner, "base_model_prefix"):
        ends += [child for name, child in inner.named_children() if name in HEAD_CHILDREN]
    own = {id(p) for end in ends if isinstance(end, nn.Module) for p in end.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}
