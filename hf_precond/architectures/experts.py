"""The experts of a model: stacks of their matrices, and the routers that choose among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.declarations import Declaration, Declarations
from hf_precond.architectures.modules import (
    PARAMETRISED,
    class_names,
    is_layer,
    owned_parameters,
    refusal,
)
from hf_precond.architectures.structure import LayerMatrix, Layout
from hf_precond.architectures.tables import (
    EXPERT,
    EXPERT_COUNTS,
    FLAT_EXPERTS,
    ROUTER,
    TRANSPOSED_EXPERTS,
)


@dataclass(eq=False)
class ExpertMatrix(LayerMatrix):
    """The matrices of all experts of a layer, in one weight: a stack of them.

    What is ``[out, in(+1)]`` of one matrix is ``[count, out, in(+1)]`` of these; :attr:`shape` is
    that of one expert's.

    Args:
        count: number of experts.
    """

    count: int = 1
    stacked: bool = True

    @property
    def stack(self) -> tuple[int, ...]:
        """``(count,)``."""
        return (self.count,)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of one expert as they are stored."""
        *rows, columns = self.weight_shape
        return (rows[1] if len(rows) == 2 else rows[0] // self.count), columns

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one expert's weight alone."""
        rows, columns = self.stored_shape
        return (columns, rows) if self.layout == "transposed" else (rows, columns)

    def weight_view(self, tensor: Tensor) -> Tensor:
        """A weight-shaped tensor as ``[count, out, in]``: a view where its memory allows."""
        tensor = tensor.reshape(self.count, *self.stored_shape)
        return tensor.mT if self.layout == "transposed" else tensor

    def bias_view(self, tensor: Tensor) -> Tensor:
        """A bias-shaped tensor as ``[count, out]``."""
        return tensor.reshape(self.count, -1)

    def join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[W | b]`` of every expert, ``[count, out, in(+1)]``."""
        matrices = self.weight_view(weight)
        if self.bias is None:
            return matrices
        if bias is None:
            column = matrices.new_zeros(*matrices.shape[:2], 1)
        else:
            column = self.bias_view(bias).unsqueeze(-1).to(matrices.dtype)
        return torch.cat([matrices, column], dim=-1)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[count, out, in(+1)]`` as weight and bias, shaped as they are."""
        weight = matrix if self.bias is None else matrix[..., :-1]
        weight = weight.mT if self.layout == "transposed" else weight
        weight = weight.reshape(self.weight_shape)
        bias = self.bias_parameter
        if bias is None:
            return weight.contiguous(), None
        return weight.contiguous(), matrix[..., -1].reshape(bias.shape).contiguous()


# Declarations ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertDeclaration(Declaration):
    """One call of :func:`declare_experts`, which explains the fields."""

    weights: Mapping[str, str | None]
    count: int | str | None = None
    transposed: bool | frozenset[str] = False
    routers: tuple[str, ...] = field(default=())

    def matrices(self, path: str, module: nn.Module) -> Iterator[ExpertMatrix]:
        """The stacks of a module.

        Raises:
            ValueError: it does not have what was declared.
        """
        for name, bias in self.weights.items():
            weight = module._parameters.get(name)
            count = self._count(module, weight)
            turned = self.transposed
            turned = turned if isinstance(turned, bool) else name in turned
            found = None
            if weight is not None and count and weight.dim() in (2, 3):
                whole = weight.shape[0] == count if weight.dim() == 3 else True
                if whole and weight.shape[0] % count == 0:
                    found = expert_matrix(path, module, name, bias, count, turned)
            if found is None:
                shape = None if weight is None else tuple(weight.shape)
                raise ValueError(
                    f"declare_experts: {path or 'the model'} ({type(module).__name__}) does not "
                    f"have what was declared for {self.target!r}: {name} is {shape}, not a stack "
                    f"of {count} matrices (with a bias {bias} of a row each)."
                )
            yield found

    def _count(self, module: nn.Module, weight: Tensor | None) -> int:
        if isinstance(self.count, str):
            return int(getattr(module, self.count, 0))
        if self.count is None:
            return 0 if weight is None or weight.dim() != 3 else weight.shape[0]
        return self.count


DECLARED = Declarations[ExpertDeclaration]()


def declare_experts(
    target: str | type[nn.Module],
    *,
    weights: Mapping[str, str | None] | tuple[str, ...],
    count: int | str | None = None,
    transposed: bool | tuple[str, ...] = False,
    routers: tuple[str, ...] = (),
) -> ExpertDeclaration:
    """Declare which parameters of a module are stacks of experts' matrices.

    Needed for modules that are not found by themselves: those whose class is named neither an
    expert nor states ``num_experts``, whose weights are not ``[experts, out, in]``, or whose router
    has a name of its own. The forward may compute with them by ``F.linear``, ``@``, ``torch.bmm``
    or ``grouped_mm`` on single experts (``self.w1[e]``), chosen ones (``self.w1[ids]``) or all::

        class Mixture(nn.Module):
            def __init__(self, width, inner, count):
                super().__init__()
                self.choose = nn.Linear(width, count)
                self.w1 = nn.Parameter(torch.randn(count, width, inner) / width**0.5)
                self.b1 = nn.Parameter(torch.zeros(count, inner))
                self.w2 = nn.Parameter(torch.randn(count, inner, width) / inner**0.5)

            def forward(self, x):  # [tokens, width]
                probability, expert = self.choose(x).softmax(-1).max(-1)
                y = torch.zeros_like(x)
                for e in range(len(self.w1)):
                    rows = (expert == e).nonzero().squeeze(1)
                    inner = (x[rows] @ self.w1[e] + self.b1[e]).relu()
                    y = y.index_add(0, rows, inner @ self.w2[e])
                return y * probability.unsqueeze(-1)

        declare_experts(
            Mixture, weights={"w1": "b1", "w2": None}, transposed=True, routers=("choose",)
        )

    Args:
        target: the module's class, its class name, or a pattern of module
            paths (``*`` stands for anything within one part of the path).
        weights: the parameters that are stacks, to the parameters with their
            biases, ``[count, out]`` (``None`` where there is none); or the
            former alone. Weights are ``[count, out, in]`` or ``[count · out, in]``.
        count: number of experts, or the attribute that holds it. Default
            ``None``: the first side of the weights.
        transposed: whether each matrix is stored ``[in, out]``, or the weights
            of which this is so. Default ``False``.
        routers: children of the module, or of its parent, that choose among the
            experts: the fallback optimizer steps them. Those named ``router``,
            ``gate`` and the like are found by themselves.

    Returns:
        The declaration, for :func:`forget_experts`. Later declarations win over
        earlier ones, and all of them over what is found.

    Raises:
        ValueError: ``weights`` is empty, or ``transposed`` names others.
    """
    if isinstance(weights, str):
        weights = (weights,)
    named = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights)
    turned = transposed if isinstance(transposed, bool) else frozenset(transposed)
    if not named or not (isinstance(turned, bool) or turned <= named.keys()):
        raise ValueError(
            f"declare_experts: name the weights, and in transposed only weights among them; got "
            f"weights={weights!r}, transposed={transposed!r}."
        )
    return DECLARED.add(ExpertDeclaration(target, named, count, turned, tuple(routers)))


def forget_experts(declaration: ExpertDeclaration) -> None:
    """Undo one :func:`declare_experts`.

    Args:
        declaration: what it returned.
    """
    DECLARED.forget(declaration)


# Reading a model ------------------------------------------------------------------------------


def find_experts(model: nn.Module) -> list[ExpertMatrix]:
    """The stacks of experts' matrices that train, in model order, their biases joined.

    A parameter is one where it was declared (:func:`~hf_precond.declare_experts`), or where it has
    three dimensions and its module says so: by ``num_experts``, or by the name of its class.

    Args:
        model: any module.

    Raises:
        ValueError: a declared module does not have what the declaration names.
    """
    found: list[ExpertMatrix] = []
    known: dict[nn.Module, dict[str, ExpertMatrix]] = {}
    for path, module, attribute in owned_parameters(model):
        if module not in known:
            known[module] = {m.weight: m for m in _stacks(path, module)}
        matrix = known[module].get(attribute)
        weight = module._parameters[attribute]
        if matrix is not None and weight is not None and weight.requires_grad:
            found.append(matrix)
    return found


def _stacks(path: str, module: nn.Module) -> Iterator[ExpertMatrix]:
    """The stacks of one module."""
    declaration = DECLARED.of(path, module)
    if declaration is not None:
        yield from declaration.matrices(path, module)
        return
    own = {n: p for n, p in module._parameters.items() if p is not None and not refusal(p)}
    flat = next((FLAT_EXPERTS[n] for n in class_names(module) if n in FLAT_EXPERTS), None)
    if flat is not None:
        count = next(getattr(module, n) for n in EXPERT_COUNTS if hasattr(module, n))
        for name, turned in flat.items():
            if name in own:
                matrix = expert_matrix(path, module, name, None, count, turned)
                if matrix is not None:
                    yield matrix
        return
    if is_layer(module) or PARAMETRISED in path:
        return
    stated = {getattr(module, name, None) for name in EXPERT_COUNTS}
    named = any(EXPERT.search(cls.__name__) for cls in type(module).__mro__)
    turned = _is_transposed(module)
    for name, weight in own.items():
        if weight.dim() == 3 and (named or weight.shape[0] in stated):
            bias = "bias" if name == "weight" else f"{name}_bias"
            found = expert_matrix(path, module, name, bias, weight.shape[0], turned)
            found = found or expert_matrix(path, module, name, None, weight.shape[0], turned)
            if found is not None:
                yield found


def expert_matrix(
    path: str, module: nn.Module, name: str, bias: str | None, count: int, transposed: bool
) -> ExpertMatrix | None:
    """A stack; ``None`` where its bias is not one row an expert, or its matrices are vectors.

    Args:
        path: of the module.
        module: holds the stack.
        name: the parameter.
        bias: the parameter with the biases, joined where it trains; ``None`` for none.
        count: number of experts.
        transposed: each is stored ``[in, out]``.
    """
    layout: Layout = "transposed" if transposed else "linear"
    full = f"{path}.{name}".lstrip(".")
    matrix = ExpertMatrix(full, module, name, layout=layout, count=count)
    if min(matrix.shape) == 1:
        return None
    vectors = None if bias is None else module._parameters.get(bias)
    if bias is not None:
        if vectors is None or vectors.numel() != count * matrix.shape[0]:
            return None
        matrix.bias = bias if vectors.requires_grad else None
    return matrix


def _is_transposed(module: nn.Module) -> bool:
    """Whether stacks are ``[in, out]``: as stated, or as the shapes of a gated pair tell."""
    stated = getattr(module, TRANSPOSED_EXPERTS, None)
    if isinstance(stated, bool):
        return stated
    pair = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    if any(weight is None or weight.dim() != 3 for weight in pair):
        return False
    (_, a, b), (_, c, d) = (weight.shape for weight in pair if weight is not None)
    return bool(a == d and b == 2 * c)


def find_routers(model: nn.Module) -> set[str]:
    """The names of the parameters of routers, which choose among the experts of their block.

    A router is a child of the block around the experts, stacked or listed, that is named one, or
    was declared.

    Args:
        model: any module.
    """
    blocks: set[str] = set()
    named: set[str] = set()
    for path, module in model.named_modules():
        declaration = DECLARED.of(path, module)
        if declaration is not None:
            parent = path.rpartition(".")[0]
            bases = {path, parent} if path else {path}
            named |= {f"{b}.{n}".lstrip(".") for b in bases for n in declaration.routers}
            blocks |= bases
        elif _is_listed(path, module) or any(True for _ in _stacks(path, module)):
            parts = path.split(".")
            blocks.add(".".join(parts[:-1]))
            places = [i for i, part in enumerate(parts) if EXPERT.search(part)]
            blocks |= {".".join(parts[:place]) for place in places}
    if not blocks:
        return set()
    return {name for name, _ in model.named_parameters() if _is_routing(name, blocks, named)}


def _is_listed(path: str, module: nn.Module) -> bool:
    """Whether a module is a list of experts."""
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return listed and bool(EXPERT.search(path.rpartition(".")[2]))


def _is_routing(name: str, blocks: set[str], named: set[str]) -> bool:
    parts: list[Any] = name.split(".")
    for place in range(len(parts) - 1):
        above, child = ".".join(parts[:place]), ".".join(parts[: place + 1])
        if child in named or (above in blocks and ROUTER.fullmatch(parts[place])):
            return True
    return False
