"""Parameters as the optimizers step them: views, matrices bound to their groups, and checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from operator import attrgetter, methodcaller
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hf_precond.architectures.structure import LayerMatrix, NormParameter, Owner, RowSelection
from hf_precond.compat import devices
from hf_precond.compat.warn import warn
from hf_precond.distributed.collectives import full, is_sharded, like
from hf_precond.linalg.products import compute_dtype
from hf_precond.optimizers.base import messages
from hf_precond.optimizers.base.layout import CLOSED, Layout, kept

Item = TypeVar("Item")
Groups = Sequence[Mapping[str, Any]]
Parts = tuple[Tensor, Tensor | None]

PATIENCE = 2
"""Steps in which another optimizer would move an unfrozen parameter (AdamR's first moves none)."""


@dataclass(eq=False)
class ParamView:
    """A parameter, or the rows of a fused one, with what it takes to step it.

    Args:
        param: the tensor to change in place.
        grad: its gradient, or what stands for it: a preconditioned gradient, a direction.
        state: the optimizer's state of the parameter.
        prefix: put before the names of the state (``"q."`` of a fused weight).
        group: the parameter group: ``lr``, ``weight_decay``, the fallback optimizer's constants.
        matrix_shape: ``[out, in]``, where ``param`` is not two-dimensional: rows interleaved per
            head lie in ``[groups, rows, in]``.
        matrix: what the model says of the weight, where an optimizer asks for it.
        hidden: a matrix of a hidden layer that no preconditioner takes (Muon steps these).
        settled: whether its state is known to be there and to fit.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    prefix: str
    group: dict[str, Any]
    matrix_shape: tuple[int, ...] | None = None
    matrix: LayerMatrix | None = None
    hidden: bool = False
    settled: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, …]``, as an optimizer of matrices sees the parameter."""
        return tuple(self.param.shape) if self.matrix_shape is None else self.matrix_shape

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state

    def __getitem__(self, name: str) -> Any:
        return self.state[self.prefix + name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.state[self.prefix + name] = value

    def zeros(self, name: str) -> None:
        """Allocate state ``name`` like the parameter, in float32 (float64 for float64)."""
        shape, dtype = tuple(self.param.shape), compute_dtype(self.param.dtype)
        allocate(self.state, self.prefix + name, shape, dtype, self.param.device, self.param)

    def counter(self, name: str) -> None:
        """Allocate a float32 count where torch's AdamW reads it: on the parameter's device."""
        allocate(self.state, self.prefix + name, (), torch.float32, self.param.device)


def states(views: Sequence[ParamView], name: str) -> list[Any]:
    """State ``name`` of every view."""
    return [view.state[view.prefix + name] for view in views]


def allocate(
    state: dict[str, Any],
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    parameter: Tensor | None = None,
) -> None:
    """Make a zero tensor of the state where it is missing; otherwise see :func:`fit`.

    Args:
        state: holds it, changed in place.
        name: its name there.
        shape: what is needed.
        dtype: the same.
        device: the same.
        parameter: what it is to be sharded like.
    """
    if name in state:
        fit(state, name, shape, dtype, device)
    elif parameter is None:
        state[name] = torch.zeros(tuple(shape), dtype=dtype, device=device)
    else:
        layout = torch.contiguous_format
        state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=layout)


def fit(
    state: dict[str, Any], name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Convert or move a tensor of the state as its parameter was since the last step.

    Kernels that take a state of another size than the parameter's would write
    beyond its memory.

    Args:
        state: holds it, changed in place.
        name: its name there.
        shape: what the parameter has now.
        dtype: the same.
        device: the same.

    Raises:
        RuntimeError: it has another shape.
    """
    tensor: Tensor = state[name]
    if tuple(tensor.shape) != tuple(shape):
        held, wanted = tuple(tensor.shape), tuple(shape)
        raise RuntimeError(messages.RESHAPED.format(name=name, held=held, wanted=wanted))
    if tensor.dtype != dtype or tensor.device != device:
        state[name] = tensor.to(device=device, dtype=dtype)


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Lists of the items with equal ``key``, in order of first appearance."""
    items = list(items)
    return listed(items, map(key, items))


def listed(items: Iterable[Item], keys: Iterable[Any]) -> list[list[Item]]:
    """Lists of the items with equal keys, in order of first appearance.

    Args:
        items: the items.
        keys: one an item.
    """
    lists: defaultdict[Any, list[Item]] = defaultdict(list)
    for item, key in zip(items, keys, strict=True):
        lists[key] += (item,)  # by no call: a step does so for every matrix
    return list(lists.values())


def in_batches(items: Sequence[Item], size: int, limit: int) -> Iterator[Sequence[Item]]:
    """Runs of items that have at most ``limit`` elements together, and one item at least.

    Args:
        items: of one size.
        size: elements of each.
        limit: elements of a run.
    """
    length = max(1, limit // size)
    for start in range(0, len(items), length):
        yield items[start : start + length]


def by_group(views: Sequence[ParamView]) -> list[list[ParamView]]:
    """Views of one parameter group, dtype, device and mesh together."""
    params = [view.param for view in views]
    groups = map(id, [view.group for view in views])
    kinds = map(attrgetter("dtype", "device"), params)
    meshes = map(getattr, params, repeat("device_mesh"), repeat(None))
    return listed(views, zip(groups, kinds, meshes, strict=False))


def group_of(name: str, parameter: Tensor, groups: Mapping[int, int]) -> int:
    """The number of the parameter group that holds a parameter now.

    Args:
        name: the layer or parameter, for the message.
        parameter: the parameter, as the model holds it.
        groups: ``id`` of every parameter in the groups to its group's number.

    Raises:
        RuntimeError: none holds it any more. Its layer would silently stop training.
    """
    if id(parameter) not in groups:
        raise RuntimeError(messages.REPLACED.format(name=name))
    return groups[id(parameter)]


@dataclass(eq=False)
class BoundNorm:
    """A channel-wise parameter with the number of its parameter group.

    Args:
        norm: the parameter.
        group: the number.
        layout: of the optimizer's step.
    """

    norm: NormParameter
    group: int
    layout: Layout = field(default=CLOSED, repr=False)
    fused = False
    prefix = ""

    @property
    def weight(self) -> Tensor:
        """The parameter as the module holds it now."""
        layout = self.layout
        return layout.weights[self] if layout.open else self.norm.parameter

    @property
    def parameters(self) -> list[Tensor]:
        """What a step of this item changes."""
        return [self.norm.parameter]

    @property
    def members(self) -> list[Tensor]:
        """What is read of it at a step."""
        return [self.norm.parameter]

    def whole_views(
        self, groups: Sequence[dict[str, Any]], state: dict[Tensor, dict[str, Any]]
    ) -> list[ParamView] | None:
        """See :meth:`BoundMatrix.whole_views`."""
        return None if is_sharded(self.weight) else self.views(self.weight, groups, state, {})

    def split(self, direction: Tensor) -> Parts:
        """A direction as the part of each view."""
        return direction, None

    def locate(self, groups: Mapping[int, int]) -> None:
        """Find the group again; see :func:`group_of`."""
        self.group = group_of(self.norm.name, self.weight, groups)

    def views(
        self,
        direction: Tensor,
        groups: Sequence[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        gathered: dict[Tensor, Tensor],
        parts: Parts | None = None,
    ) -> list[ParamView]:
        """``direction``, shaped like the parameter, as its one view."""
        held = state.setdefault(self.weight, {})
        return [ParamView(self.weight, direction, held, "", groups[self.group])]


@dataclass(eq=False)
class BoundMatrix:
    """A matrix with the numbers of the parameter groups of its weight and bias.

    Groups may change between steps: :meth:`locate`.

    Args:
        matrix: the matrix.
        group: number of the weight's group.
        bias_group: number of the bias's group; ``None`` where no group holds one.
        layout: of the optimizer's step.
    """

    matrix: LayerMatrix
    group: int
    bias_group: int | None
    layout: Layout = field(default=CLOSED, repr=False)

    @cached_property
    def prefix(self) -> str:
        """Put before the names of this matrix's state: empty unless the weight is fused."""
        return f"{self.matrix.part}." if self.matrix.part else ""

    @property
    def weight(self) -> Tensor:
        """The weight as the module holds it now; its state is the matrix's state."""
        layout = self.layout
        return layout.weights[self] if layout.open else self.matrix.weight_parameter

    @property
    def parameters(self) -> list[Tensor]:
        """What a step of this matrix changes, if it has gradients: weight and bias."""
        bias = None if self.bias_group is None else self.matrix.bias_parameter
        return [self.weight] if bias is None else [self.weight, bias]

    @property
    def members(self) -> list[Tensor]:
        """What is read of the matrix at a step: weight and bias, in a parameter group or not."""
        bias = self.matrix.bias_parameter
        return [self.weight] if bias is None else [self.weight, bias]

    def whole_views(
        self, groups: Sequence[dict[str, Any]], state: dict[Tensor, dict[str, Any]]
    ) -> list[ParamView] | None:
        """Views of weight and bias, those that have a gradient, to be given it or a direction.

        Args:
            groups: the optimizer's parameter groups.
            state: the optimizer's state.

        Returns:
            ``None`` where a view takes more than that: of some rows of a weight, and of shards.
        """
        if self.fused or any(map(is_sharded, self.members)):
            return None
        bias = self.matrix.bias_parameter
        parts = self.weight, self.weight if bias is None else bias
        return self.views(self.weight, groups, state, {}, parts)

    def split(self, matrix: Tensor) -> Parts:
        """``[out, in(+1)]`` as the part of each view."""
        return self.matrix.split(matrix)

    @property
    def fused(self) -> bool:
        """Whether the matrix is only some rows of its weight."""
        return self.matrix.rows is not None

    @property
    def bias_rests(self) -> bool:
        """Whether the weight's step leaves the bias as it is: frozen since they were joined."""
        bias = self.matrix.bias_parameter
        return bias is not None and bias.grad is None and self.weight.grad is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the mathematics: float64 for float64 weights, else float32."""
        return compute_dtype(self.weight.dtype)

    def locate(self, groups: Mapping[int, int]) -> None:
        """Find the groups of weight and bias again; see :func:`group_of`."""
        self.group = group_of(self.matrix.name, self.weight, groups)
        bias = self.matrix.bias_parameter
        self.bias_group = None if bias is None else groups.get(id(bias))

    def gradient(self) -> Tensor | None:
        """``[dW | db]``, ``[out, in(+1)]`` in ``dtype``, gathered; ``None`` without a gradient."""
        if self.weight.grad is None:
            return None
        bias = self.matrix.bias_parameter
        bias_grad = None if bias is None or bias.grad is None else full(bias.grad)
        return self.matrix.join(full(self.weight.grad), bias_grad).to(self.dtype)

    def views(
        self,
        matrix: Tensor,
        groups: Sequence[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        gathered: dict[Tensor, Tensor],
        parts: Parts | None = None,
    ) -> list[ParamView]:
        """A gradient or direction as views of weight and bias, those that have a gradient.

        Rows of a sharded fused weight have no view in the shards: their view
        steps a copy gathered into ``gathered``, to be scattered afterwards.

        Args:
            matrix: ``[out, in(+1)]``.
            groups: the optimizer's parameter groups.
            state: the optimizer's state.
            gathered: sharded fused weights to their gathered copies; added to.
            parts: ``matrix`` as weight and bias parts, where they are known.
        """
        weight_part, bias_part = self.matrix.split(matrix) if parts is None else parts
        views = []
        if self.weight.grad is not None:
            group = groups[self.group]
            views.append(self._view(self.weight, weight_part, group, state, gathered))
        bias = self.matrix.bias_parameter
        trains = bias is not None and bias.grad is not None and self.bias_group is not None
        if trains and bias_part is not None:
            assert bias is not None and self.bias_group is not None
            group = groups[self.bias_group]
            views.append(self._view(bias, bias_part, group, state, gathered))
        return views

    def _view(
        self,
        parameter: Tensor,
        part: Tensor,
        group: dict[str, Any],
        state: dict[Tensor, dict[str, Any]],
        gathered: dict[Tensor, Tensor],
    ) -> ParamView:
        whole, is_weight, shape = parameter, parameter is self.weight, None
        if self.fused:
            shape = self.matrix.shape if is_weight else self.matrix.shape[:1]
            if is_sharded(parameter):
                if parameter not in gathered:
                    gathered[parameter] = full(parameter).clone()
                whole = gathered[parameter]
        target = self.matrix.target(whole) if is_weight else self.matrix.bias_view(whole)
        held = state.setdefault(parameter, {})
        return ParamView(target, like(target, part), held, self.prefix, group, shape)

    def raw_views(
        self,
        groups: Sequence[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        gathered: dict[Tensor, Tensor],
    ) -> list[ParamView]:
        """Views of weight and bias with their raw gradients, those of them that have one.

        A fused weight is always split into its parts, so that its state has
        one layout whichever parts are preconditioned.
        """
        parameters = [self.weight, self.matrix.bias_parameter]
        if all(p is None or p.grad is None for p in parameters):
            return []
        gradients = [
            None if p is None
            else torch.zeros_like(full(p.detach())) if p.grad is None
            else full(p.grad)
            for p in parameters
        ]  # fmt: skip
        assert gradients[0] is not None
        matrix = self.matrix.join(gradients[0], gradients[1])
        return self.views(matrix.to(self.dtype), groups, state, gathered)


Bound = BoundMatrix | BoundNorm
Kind = Literal["gradient", "direction", "applied"]


@dataclass(eq=False)
class Preconditioned:
    """What a preconditioner made of one matrix's gradient.

    Args:
        bound: the matrix or norm parameter.
        matrix: ``[out, in(+1)]``, or shaped like the norm parameter; ``None`` for ``applied``.
        kind: ``gradient``, for the fallback optimizer; ``direction``, to descend along with
            decoupled weight decay; ``applied`` where the parameters were changed already.
        parts: ``matrix`` as its weight and bias parts, where they are known.
    """

    bound: Bound
    matrix: Tensor | None
    kind: Kind = "gradient"
    parts: Parts | None = None


def stacked_gradients(bound: Sequence[BoundMatrix]) -> Tensor:
    """``[dW | db]`` of matrices of one shape and dtype that have gradients, ``[n, out, in(+1)]``.

    A copy; a few kernels for all of them where they are whole layers alike.
    """
    if len(bound) == 1 or not are_alike(bound):
        gradients = [item.gradient() for item in bound]
        return torch.stack([gradient for gradient in gradients if gradient is not None])
    weights, biases = gradient_stacks(bound)
    return weights if biases is None else torch.cat([weights, biases[..., None]], 2)


def gradient_stacks(bound: Sequence[BoundMatrix]) -> tuple[Tensor, Tensor | None]:
    """Gradients of weights, ``[n, out, in]``, and of joined biases, ``[n, out]``: copies.

    Of matrices of one shape and dtype; zeros for a bias without a gradient.
    """
    matrix, dtype, whole = bound[0].matrix, bound[0].dtype, whole_layers(bound)
    if whole is None:
        joined = torch.stack([g for item in bound if (g := item.gradient()) is not None])
        if matrix.bias is None:
            return joined, None
        return joined[..., :-1].contiguous(), joined[..., -1].contiguous()
    weights = torch.stack([weight.grad for weight in whole[0] if weight.grad is not None])
    weights = weights.mT if matrix.layout == "transposed" else weights.flatten(2)
    weights = weights.contiguous().to(dtype)
    if matrix.bias is None:
        return weights, None
    return weights, torch.stack([b.grad for b in whole[1] if b.grad is not None]).to(dtype)


def split_stack(
    bound: Sequence[BoundMatrix], matrices: Tensor, scales: Tensor | None = None
) -> Sequence[Parts | None]:
    """The weight and bias parts of matrices; ``None`` where each is split by itself.

    Args:
        bound: what the matrices are the directions of.
        matrices: ``[n, out, in(+1)]``.
        scales: what the parts are multiplied by on the way, ``[n, 1, 1]``.
    """
    if len(bound) == 1 or not are_alike(bound):
        return [None] * len(bound)
    weights, biases = matrices, None
    if bound[0].matrix.bias is not None:
        weights, biases = matrices[..., :-1], matrices[..., -1]
    if scales is not None:
        weights, biases = weights * scales, None if biases is None else biases * scales[..., 0]
    return split_stacks(bound, weights, None if biases is None else biases.contiguous())


def split_stacks(
    bound: Sequence[BoundMatrix], weights: Tensor, biases: Tensor | None
) -> Sequence[Parts]:
    """The parts of each matrix, shaped like its weight and bias, of :func:`gradient_stacks`."""
    if not are_alike(bound):
        joined = weights if biases is None else torch.cat([weights, biases[..., None]], 2)
        return [item.matrix.split(matrix) for item, matrix in zip(bound, joined, strict=True)]
    weights = weights.mT if bound[0].matrix.layout == "transposed" else weights
    weights = weights.reshape(len(bound), *bound[0].weight.shape).contiguous()
    columns = [None] * len(bound) if biases is None else biases.unbind()
    return list(zip(weights.unbind(), columns, strict=True))


def are_alike(bound: Sequence[BoundMatrix]) -> bool:
    """Whether these are whole, unsharded weights of one layout, all or none with a bias."""
    return whole_layers(bound) is not None


def whole_layers(bound: Sequence[BoundMatrix]) -> tuple[list[Tensor], list[Tensor]] | None:
    """The weights and biases of matrices; ``None`` where they are not :func:`are_alike`."""
    return kept("whole layers", bound, lambda: _whole_layers(bound))


def _whole_layers(bound: Sequence[BoundMatrix]) -> tuple[list[Tensor], list[Tensor]] | None:
    first, weights = bound[0].matrix, [item.weight for item in bound]
    biases: list[Tensor] = []
    for item, weight in zip(bound, weights, strict=True):
        matrix, bias = item.matrix, item.matrix.bias_parameter
        if item.fused or is_sharded(weight) or matrix.layout != first.layout:
            return None
        if weight.shape != weights[0].shape or (bias is None) != (first.bias is None):
            return None
        if bias is not None and (bias.grad is None or is_sharded(bias)):
            return None
        biases += [] if bias is None else [bias]
    return weights, biases


def padded_stack(
    parts: Sequence[Tensor], shape: tuple[int, int]
) -> tuple[Tensor, Sequence[Tensor] | None]:
    """Matrices of one shape in one stack with zeros beyond them, ``[n, rows, columns]``.

    Args:
        parts: the matrices; nothing is copied where they are views of such a stack.
        shape: rows and columns of the stack.

    Returns:
        The stack; and the matrices as views of it where they were none, which are to take the
        place of ``parts``.
    """
    first, (rows, columns) = parts[0], shape
    size, start = rows * columns, first.storage_offset()
    places = range(start, start + len(parts) * size, size)
    storage, memory = first.untyped_storage(), map(Tensor.untyped_storage, parts)
    # What is asked of every part is asked in C: a step does so for every matrix.
    if (
        set(map(Tensor.stride, parts)) == {(columns, 1)}
        and list(map(Tensor.storage_offset, parts)) == list(places)
        and len(set(map(methodcaller("data_ptr"), memory))) == 1
        and storage.nbytes() >= len(parts) * size * first.element_size()
    ):
        return first.as_strided((len(parts), *shape), (size, columns, 1), start), None
    stack = first.new_zeros(len(parts), *shape)
    views = list(stack[:, : first.shape[0], : first.shape[1]].unbind())
    torch._foreach_copy_(views, list(parts))
    return stack, views


def fused_remainders(bound: Sequence[Bound]) -> list[BoundMatrix]:
    """The rows of fused weights that no matrix of ``bound`` holds: the fallback optimizer's."""
    fused = [item for item in bound if isinstance(item, BoundMatrix) and item.fused]
    remainders = []
    for parts in grouped(fused, lambda item: id(item.weight)):
        selections = [part.matrix.rows for part in parts if part.matrix.rows is not None]
        for number, rows in enumerate(RowSelection.complement(selections)):
            owner = parts[0].matrix
            name = f"{owner.name.split('[')[0]}[rest{number}]"
            matrix = replace(owner, name=name, rows=rows)
            remainders.append(BoundMatrix(matrix, parts[0].group, parts[0].bias_group))
    return remainders


def gradients_of(groups: Groups) -> list[Tensor]:
    """Every gradient there is, in the order of the parameter groups."""
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def refuse_complex(parameters: Iterable[Tensor], name: str) -> None:
    """Refuse complex parameters.

    Args:
        parameters: of a parameter group.
        name: the optimizer's, for the message.

    Raises:
        ValueError: for a complex one, with what to do.
    """
    for parameter in parameters:
        if parameter.is_complex():
            shape = tuple(parameter.shape)
            raise ValueError(messages.COMPLEX.format(name=name, shape=shape))


def refuse_sparse(groups: Groups, name: str) -> None:
    """Refuse sparse gradients.

    Args:
        groups: parameter groups.
        name: the optimizer's, for the message.

    Raises:
        RuntimeError: for a sparse gradient, with what to do.
    """
    for gradient in gradients_of(groups):
        if gradient.is_sparse:
            shape = tuple(gradient.shape)
            raise RuntimeError(messages.SPARSE.format(name=name, shape=shape))


class ParamGroupValidator:
    """Checks at every step that the parameter groups hold what the model trains.

    Modules are kept, no parameters.

    Args:
        owners: name, module and attribute of the model's parameters.
        groups: ``id`` of every parameter in the groups to its group's number.
    """

    def __init__(self, owners: Sequence[Owner], groups: Mapping[int, int]) -> None:
        held = [(owner, _parameter(owner)) for owner in owners]
        self.stepped = [owner for owner, p in held if p is not None and id(p) in groups]
        frozen = [owner for owner, p in held if p is not None and not p.requires_grad]
        known = {owner[0] for owner in (*self.stepped, *frozen)}
        self.left_out = [owner for owner in owners if owner[0] not in known]
        self.idle = [*frozen, *self.left_out]
        self.checksums: dict[str, list[tuple[float, float]]] = {}  # of unfrozen ones, by step

    def joined(self, model: nn.Module, groups: Mapping[int, int]) -> list[str]:
        """The parameters that train now, did not when the optimizer was made, and are in no group.

        Args:
            model: the model.
            groups: as they are now.
        """
        others = {id(_parameter(owner)) for owner in self.left_out} | groups.keys()
        held = model.named_parameters()
        return [name for name, p in held if p.requires_grad and id(p) not in others]

    def moved(self, groups: Mapping[int, int]) -> list[Owner]:
        """The parameters that their modules hold under another name now: pruned, parametrised.

        Args:
            groups: as they are now.

        Raises:
            RuntimeError: what stands in the place of one is in no group.
        """
        gone = [owner for owner in self.stepped if owner[2] not in owner[1]._parameters]
        if not gone:
            return gone
        from hf_precond.architectures.computed import successors

        moved = []
        for owner in gone:
            found = successors(*owner[1:])
            for parameter in found:
                if parameter.requires_grad:
                    group_of(owner[0], parameter, groups)
            moved += [owner] if found else []
        self.stepped = [owner for owner in self.stepped if owner not in gone or owner in moved]
        return moved

    def known(self) -> set[int]:
        """The ``id`` of every parameter that is stepped, as modules hold it now."""
        return {id(_parameter(owner)) for owner in self.stepped}

    def check(self, groups: Mapping[int, int], bound: Sequence[Bound]) -> None:
        """Refuse parameters that were replaced or tied.

        Args:
            groups: as they are now.
            bound: what is preconditioned.

        Raises:
            RuntimeError: see :func:`group_of`; or a matrix has become the
                weight of two layers, whose gradient is a sum that the
                statistics of neither describe.
        """
        first: dict[int, str] = {}
        for owner in self.stepped:
            parameter = _parameter(owner)
            if parameter is None or not _trains(parameter):
                continue
            group_of(owner[0], parameter, groups)
            other = first.setdefault(id(parameter), owner[0])
            if other != owner[0] and any(item.weight is parameter for item in bound):
                raise RuntimeError(messages.TIED.format(name=owner[0], other=other))

    def warn_of_idle(self, groups: Groups, name: str) -> None:
        """Warn once of those that had gradients and did not change for :data:`PATIENCE` steps.

        Args:
            groups: the parameter groups.
            name: the optimizer's.
        """
        if not self.idle:
            return
        held = [(key, module._parameters.get(attribute)) for key, module, attribute in self.idle]
        trains = {key: p for key, p in held if p is not None and p.requires_grad and _trains(p)}
        ids = {id(p) for group in groups for p in group["params"]} if trains else ()
        unfrozen = {key: p for key, p in trains.items() if id(p) not in ids}
        # Another optimizer may step them, by fused kernels that leave their version as it is.
        sums = {key: [*self.checksums.get(key, ()), _checksum(p)] for key, p in unfrozen.items()}
        moved = {key for key, values in sums.items() if values[-1] != values[0]}
        missing = [k for k, values in sums.items() if len(values) > PATIENCE and k not in moved]
        done = moved | set(missing)
        self.idle = [owner for owner in self.idle if owner[0] not in done]
        self.checksums = {key: values for key, values in sums.items() if key not in done}
        outside = {owner[0] for owner in self.left_out}
        left_out = [key for key in missing if key in outside]
        frozen = [key for key in missing if key not in outside]
        for message, keys in ((messages.LEFT_OUT, left_out), (messages.UNFROZEN, frozen)):
            if keys:
                text = message.format(name=name, count=len(keys), first=keys[0])
                warn(text)


def _parameter(owner: Owner) -> Tensor | None:
    """The parameter as its module holds it now; ``None`` where it holds none of that name."""
    _, module, attribute = owner
    return module._parameters.get(attribute)


def _checksum(parameter: Tensor) -> tuple[float, float]:
    """Numbers that change with this rank's entries; read from the device at few steps only."""
    local: Tensor = getattr(parameter, "_local_tensor", parameter).detach()
    local = local.to(devices.widest(local.device))
    return float(local.sum()), float(local.square().sum())


def _trains(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.grad is not None
