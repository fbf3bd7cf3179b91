"""Calls of experts: which rows of a product fall to which expert, and which of them are tokens.

The weights of experts are parameters of three dimensions that no module multiplies with. They are
read where a function of torch is given one expert's (``F.linear(x, W[e])``, ``x @ W[e]``), those of
chosen experts, one a row (``torch.bmm(W[ids], x)``), or all of them, with rows sorted by expert
(``grouped_mm``) or laid out expert by expert (``torch.bmm(x, W)``): so in every
``experts_implementation`` of transformers that calls functions. A fused kernel is not read.

Rows that an expert gets were picked from a sequence by an index. That is followed too, so that
padded tokens are left out as anywhere; also where experts are a list of modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_precond.architectures.experts import ExpertMatrix
from hf_precond.compat.torch_internals import GROUPED_PRODUCTS, expert_source_of, note_index

if TYPE_CHECKING:
    from hf_precond.statistics.collector import HookedLayer

ARGUMENTS = ("input", "weight", "other", "mat2")
GATHERS = (
    *(Tensor.__getitem__, Tensor.index_select, torch.index_select, Tensor.repeat),
    *(Tensor.repeat_interleave, torch.repeat_interleave, Tensor.expand),
)
"""Functions that pick rows."""
LAYOUTS = (
    *(Tensor.reshape, Tensor.view, Tensor.flatten, Tensor.unflatten, Tensor.unsqueeze),
    *(Tensor.squeeze, Tensor.split, Tensor.chunk, torch.split, torch.chunk, Tensor.contiguous),
    *(torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze, Tensor.transpose),
)
"""Functions that keep them."""
CASTS = (Tensor.to, Tensor.float, Tensor.bfloat16, Tensor.half, Tensor.type, Tensor.type_as)
PRODUCTS = (
    *(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm),
    Tensor.__matmul__,
)
FUNCTIONS = {F.linear, *GATHERS, *LAYOUTS, *CASTS, *PRODUCTS}


@dataclass(frozen=True)
class Segments:
    """The rows of a call, expert by expert.

    Args:
        order: puts the rows in the order of their experts; ``None`` where they stand in it.
        parts: expert, first and last (exclusive) of its rows in that order.
        weights: of the rows as they come, ``[rows]``; ``None`` for ones.
    """

    order: Tensor | None
    parts: list[tuple[int, int, int]]
    weights: Tensor | None

    def of(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Every expert that got rows, its rows of ``[rows, d]``, and their weights."""
        weights = self.weights
        if self.order is not None:
            rows = rows[self.order]
            weights = None if weights is None else weights[self.order]
        for expert, first, last in self.parts:
            own = None if weights is None else weights[first:last]
            yield expert, rows[first:last], own


@dataclass(frozen=True)
class _Origin:
    """Where rows were picked: the shape of what they are from, and the functions that did it."""

    result: weakref.ref[Tensor]
    shape: tuple[int, ...]
    steps: tuple[Callable[[Tensor], Tensor], ...]


class ExpertCalls:
    """Reads the calls of experts, among the functions that a mode sees.

    Args:
        stacks: what is hooked for each stack of experts; its first collection has its matrix.
        masked: says whether the pass has masks.
        observe: is called with what is hooked, the inputs ``[rows, in]``, the result as it was
            returned, what makes ``[rows, out]`` of it, and the rows' experts.
    """

    def __init__(
        self,
        stacks: Sequence[HookedLayer],
        masked: Callable[[], bool],
        observe: Callable[..., None],
    ) -> None:
        self.stacks, self.masked = list(stacks), masked
        self.observe = weakref.WeakMethod(observe)
        self.by_weight: dict[int, HookedLayer] = {}
        self.origins: dict[int, _Origin] = {}
        self.last: dict[tuple[str, int], tuple[int, Tensor | None]] = {}
        self.offsets: tuple[weakref.ref[Tensor], list[int]] | None = None

    def begin(self) -> None:
        """Forgets the rows of the pass before."""
        self.origins.clear()
        self.last.clear()
        self.offsets = None

    def note(self, function: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> bool:
        """Looks at a call of one of :data:`FUNCTIONS`, or of a grouped product.

        Returns:
            Whether it was an expert's.
        """
        if function in GATHERS or function in LAYOUTS or function in CASTS:
            self._follow(function, args, kwargs, result)
            return False
        given = [*args, *(kwargs[name] for name in ARGUMENTS if name in kwargs)]
        if len(given) < 2 or not all(isinstance(tensor, Tensor) for tensor in given[:2]):
            return False
        left, right = given[:2]
        if function not in FUNCTIONS:  # grouped
            offsets = kwargs["offs"] if "offs" in kwargs else given[2]
            return self._note(left, right, False, result, offsets)
        if function is F.linear:
            return self._note(left, right, True, result)
        return self._note(left, right, False, result) or self._note(right, left, True, result, True)

    # Rows and their experts --------------------------------------------------------------

    def _note(
        self, inputs: Tensor, weight: Tensor, out_in: bool, result: Tensor, other: Any = None
    ) -> bool:
        """Observes a product with a stack's weight.

        Args:
            inputs: ``[…, in]``; ``[…, in, n]`` where ``other`` is true.
            weight: what may be a stack's, or a part of it.
            out_in: the product takes it as ``[…, out, in]``.
            result: ``[…, out]``, or ``[…, out, n]``.
            other: true for ``W xᵀ``; the last rows of each expert in a grouped product.
        """
        found = self._find(weight)
        if found is None:
            return False
        hooked, flipped, chosen = found
        matrix = next(iter(hooked.collections.values())).matrix
        assert isinstance(matrix, ExpertMatrix)
        if ((matrix.layout == "transposed") != flipped) == out_in:
            return False
        turned = other is True
        if turned and (inputs.dim() != 3 or not out_in):
            return False
        rows = inputs.mT if turned else inputs
        if rows.shape[-1] != matrix.shape[1]:
            return False
        segments = self._segments(hooked, matrix, inputs, rows, chosen, other, turned)
        observe = self.observe()

        def laid_out(tensor: Tensor) -> Tensor:
            return (tensor.mT if turned else tensor).flatten(0, -2)

        if segments is not None and observe is not None:
            observe(hooked, rows.flatten(0, -2), result, laid_out, segments)
        return segments is not None

    def _find(self, weight: Tensor) -> tuple[HookedLayer, bool, Any] | None:
        """The stack that a weight is of, whether it is transposed, and which expert's or experts'.

        The latter is a number, numbers (one a row), or ``None`` for all.
        """
        if not weight.requires_grad:
            return None
        source = expert_source_of(weight)
        if source is None:
            return None
        leaf, flipped, chosen = source
        hooked = self.by_weight.get(id(leaf))
        if hooked is None or _weight(hooked) is not leaf:
            self.by_weight = {id(_weight(hooked)): hooked for hooked in self.stacks}
            hooked = self.by_weight.get(id(leaf))
        return None if hooked is None else (hooked, flipped, chosen)

    def _segments(
        self,
        hooked: HookedLayer,
        matrix: ExpertMatrix,
        inputs: Tensor,
        rows: Tensor,
        chosen: Any,
        offsets: Any,
        turned: bool,
    ) -> Segments | None:
        """The experts of rows ``[…, in]``; ``None`` where they cannot be told."""
        number, count = rows.shape[:-1].numel(), matrix.count
        expert = chosen % count if isinstance(chosen, int) else -1
        weights = self._weights(hooked, inputs, rows, expert, turned)
        if expert >= 0:
            return Segments(None, [(expert, 0, number)] if number else [], weights)
        if chosen is not None:
            if chosen.dim() != 1 or len(chosen) != rows.shape[0]:
                return None
            chosen = chosen.repeat_interleave(number // max(1, len(chosen)))
            order = chosen.argsort(stable=True)
            ends = chosen.bincount(minlength=count).cumsum(0).tolist()
            return Segments(order, _parts(ends, number), weights)
        if isinstance(offsets, Tensor):
            return Segments(None, _parts(self._ends(offsets), number), weights)
        if rows.dim() != 3 or rows.shape[0] != count:
            return None
        # All rows are given to every expert: those it did not get are zero (Llama 4).
        routed = rows.detach().ne(0).any(-1).flatten()
        weights = routed if weights is None else weights & routed
        size = rows.shape[1]
        return Segments(None, _parts([size * (e + 1) for e in range(count)], number), weights)

    def _ends(self, offsets: Tensor) -> list[int]:
        """The last rows of each expert as numbers, read from the device once."""
        if self.offsets is None or self.offsets[0]() is not offsets:
            self.offsets = weakref.ref(offsets), offsets.tolist()
        return self.offsets[1]

    # Rows and their tokens ---------------------------------------------------------------

    def _follow(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Notes how rows were picked; on an index into a weight, which experts were chosen."""
        source = args[0] if args else None
        if not isinstance(source, Tensor):
            return
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor):
            note_index(result, args[1])
        if not source.is_floating_point() or source.dim() < 2 or not self.masked():
            return
        known = self._origin(source)
        parts = list(result) if isinstance(result, (tuple, list)) else [result]
        if known is None:
            first = parts[0]
            picks = function in GATHERS and isinstance(first, Tensor) and first.dim() > 1
            if not picks or first.shape[-1] != source.shape[-1]:
                return
            known = _Origin(weakref.ref(source), tuple(source.shape), ())
        for place, part in enumerate(parts):
            if isinstance(part, Tensor) and part is not source:
                steps = known.steps
                if function not in CASTS:
                    index = place if isinstance(result, (tuple, list)) else None
                    steps = (*steps, _Step(function, args[1:], kwargs, index))
                self.origins[id(part)] = _Origin(weakref.ref(part), known.shape, steps)

    def _origin(self, tensor: Tensor) -> _Origin | None:
        found = self.origins.get(id(tensor))
        return found if found is not None and found.result() is tensor else None

    def _weights(
        self, hooked: HookedLayer, inputs: Tensor, rows: Tensor, expert: int, turned: bool
    ) -> Tensor | None:
        """Which rows are tokens, ``[rows]``, ``None`` for all."""
        known, weights = self._read(hooked, inputs, rows, turned)
        key, number = (hooked.path.rpartition(".")[0], expert), rows.shape[:-1].numel()
        if known:
            self.last[key] = number, weights
        elif key in self.last and self.last[key][0] == number:
            return self.last[key][1]  # the second product of an expert has the rows of the first
        return weights

    def _read(
        self, hooked: HookedLayer, inputs: Tensor, rows: Tensor, turned: bool
    ) -> tuple[bool, Tensor | None]:
        origin = self._origin(inputs)
        shape = tuple(rows.shape) if origin is None else origin.shape
        if origin is None and len(shape) == 3 and not turned:
            shape = shape[1:]  # as many for every expert
        weights = hooked.reader.read(shape, torch.float32)
        if weights is None:
            return origin is not None, None
        kept = weights.ne(0)
        if origin is None:
            return True, kept.flatten().repeat(rows.shape[:-1].numel() // max(1, kept.numel()))
        kept = kept.reshape(shape[:-1])
        kept = kept.unsqueeze(-1).expand(shape)
        for step in origin.steps:
            kept = step(kept)
        return True, (kept.mT if turned else kept)[..., 0].flatten()

    def of_layer(self, hooked: HookedLayer, inputs: Tensor) -> tuple[bool, Tensor | None]:
        """Which rows of a linear layer's input are tokens, if they were picked from a sequence.

        Args:
            hooked: the layer.
            inputs: what it was called with.

        Returns:
            Whether they were, and ``[…]`` for ``[…, in]``, ``None`` for all.
        """
        origin, key = self._origin(inputs), (hooked.path.rpartition(".")[0], -1)
        number = inputs.shape[:-1].numel()
        if origin is None:
            last = self.last.get(key)
            if last is None or last[0] != number or inputs.dim() != 2:
                return False, None
            return True, last[1]
        weights = self._read(hooked, inputs, inputs, False)[1]
        self.last[key] = number, weights
        return True, None if weights is None else weights.view(inputs.shape[:-1])


@dataclass(frozen=True)
class _Step:
    """A function that was applied, to be applied to the tokens' weights."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None

    def __call__(self, tensor: Tensor) -> Tensor:
        result = self.function(tensor, *self.args, **self.kwargs)
        return result if self.index is None else result[self.index]


def is_seen(function: Any) -> bool:
    """Whether :meth:`ExpertCalls.note` looks at a function."""
    return function in FUNCTIONS or getattr(function, "__name__", "") in GROUPED_PRODUCTS


def _weight(hooked: HookedLayer) -> Tensor:
    return next(iter(hooked.collections.values())).matrix.weight_parameter


def _parts(ends: Sequence[int], number: int) -> list[tuple[int, int, int]]:
    """Experts with rows, by the ends of their rows."""
    starts = [0, *ends[:-1]]
    spans = zip(range(len(ends)), starts, ends, strict=True)
    return [(expert, first, last) for expert, first, last in spans if first < last <= number]


def list_experts(path: str, module: nn.Module) -> bool:
    """Whether a linear layer may be called with rows that were picked: its path names experts."""
    return isinstance(module, nn.Linear) and "expert" in path.lower()
