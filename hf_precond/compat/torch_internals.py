"""Private names of torch that this package relies on, as they are in torch 2.9 to 2.13.

No other module imports ``torch._C``, ``torch._dynamo`` or ``torch.utils._pytree``.
"""

from __future__ import annotations

import functools
import re
import sys
import types
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")

WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module)\.")
"""What ``torch.compile`` and checkpointing put into the names of a module's parameters."""
REPLICA = "module."
"""What DDP and DataParallel put before the names of a module's parameters."""


def loss_scale(scaler: torch.amp.GradScaler | None) -> Tensor | float | None:
    """Returns what a loss scaler multiplies the loss by now; ``None`` without an active scaler.

    The tensor ``GradScaler._scale`` where it exists: ``get_scale()`` waits for the device.

    Args:
        scaler: the scaler of float16 training, or ``None``.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor | None = getattr(scaler, "_scale", None)
    return scaler.get_scale() if scale is None else scale


# Hooks ------------------------------------------------------------------------


def inert(*args: Any, **kwargs: Any) -> None:
    """Does nothing: what a copied or unpickled :class:`Hook` becomes."""


class Hook:
    """A module hook that holds its method weakly and is inert in copies and in compiled code.

    The model holds its hooks: with a strong reference it would keep the
    optimizer's statistics alive. ``copy.deepcopy(model)`` and pickles copy
    hooks too; a copy's passes must not be counted.

    Args:
        method: a bound method, called as ``method(*first, *args, **kwargs)``.
        *first: its first arguments.
    """

    def __init__(self, method: Callable[..., Any], *first: Any) -> None:
        self.method = weakref.WeakMethod(method)
        self.first = first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method, while its object exists and nothing is being compiled."""
        if torch.compiler.is_compiling():
            return None
        method = self.method()
        return None if method is None else method(*self.first, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __copy__(self) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _make_inert, ()


def _make_inert() -> Callable[..., None]:
    return inert


# torch.func -------------------------------------------------------------------


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` wraps the tensor: ``grad``, ``vmap``, …."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is running."""
    return _functorch.peek_interpreter_stack() is not None


def untransformed(total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a sum and its count as plain tensors, out of all transforms of ``torch.func``.

    Under ``vmap`` (gradients of single samples) both are summed over the samples.

    Args:
        total: the sum.
        count: the count.
    """
    while _functorch.is_functorch_wrapped_tensor(total):
        if _functorch.is_batchedtensor(total):
            dim, total = _functorch.maybe_get_bdim(total), _functorch.get_unwrapped(total)
            samples, total = total.shape[dim], total.sum(dim)
            if _functorch.is_batchedtensor(count):
                dim = _functorch.maybe_get_bdim(count)
                count = _functorch.get_unwrapped(count).sum(dim)
            else:
                count = count * samples
        else:
            total = _functorch.get_unwrapped(total)
            if _functorch.is_gradtrackingtensor(count):
                count = _functorch.get_unwrapped(count)
    while _functorch.is_functorch_wrapped_tensor(count):
        count = _functorch.get_unwrapped(count)
    return total, count


# autograd ---------------------------------------------------------------------


def in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def keeps_graph() -> bool:
    """Whether the backward pass under way keeps its graph (``retain_graph=True``)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def will_run(node: torch.autograd.graph.Node) -> bool | None:
    """Whether the backward pass under way runs a node of its graph.

    ``None`` where ``torch.autograd.grad`` was asked for the gradient that the node accumulates.

    Args:
        node: of the graph.
    """
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return None


VIEWS = {"ViewBackward0", "SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0"}
FLIPS = {"TBackward0", "TransposeBackward0", "PermuteBackward0"}
COPIES = {"ToCopyBackward0", "CloneBackward0", "AliasBackward0"}


def source_of(weight: Tensor) -> tuple[Tensor, bool] | None:
    """The parameter that a tensor is, or is a view, cast or transpose of.

    Args:
        weight: with its graph.

    Returns:
        The parameter, and whether ``weight`` is it transposed; ``None`` where ``weight`` has other
        numbers or another shape.
    """
    node, names = weight.grad_fn, []
    while node is not None and not hasattr(node, "variable"):
        names.append(node.name())
        if names[-1] not in VIEWS | FLIPS | COPIES:
            return None
        node = node.next_functions[0][0]
    leaf = weight if node is None else node.variable
    if not isinstance(leaf, Tensor):
        return None
    flips = sum(name in FLIPS for name in names)
    if flips and (weight.dim() != 2 or not VIEWS.isdisjoint(names)):
        return None
    flipped = flips % 2 == 1
    shape = tuple(reversed(leaf.shape)) if flipped else tuple(leaf.shape)
    return (leaf, flipped) if tuple(weight.shape) == shape else None


INDEX = "hf_precond.index"
"""Under which a node of ``W[ids]`` keeps ids: to read those it saved would unpack them."""

GROUPED_PRODUCTS = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
"""Names of torch's products of rows that are sorted by expert, and of transformers' own."""


def expert_source_of(weight: Tensor) -> tuple[Tensor, bool, Any] | None:
    """The parameter whose matrices a tensor holds, all or some of them.

    Args:
        weight: with its graph.

    Returns:
        The parameter, whether the matrices are transposed, and which they are: a number, a tensor
        of numbers, or ``None`` for all; ``None`` where ``weight`` has other numbers.
    """
    node: Any = weight.grad_fn
    slot, flipped, chosen = weight.output_nr, False, None
    while node is not None and not hasattr(node, "variable"):
        name = node.name()
        if name in FLIPS:
            flipped = not flipped
        elif name in ("SelectBackward0", "UnbindBackward0") and _signed(node._saved_dim) == 0:
            if chosen is not None:
                return None
            chosen = slot if name == "UnbindBackward0" else _signed(node._saved_index)
        elif name == "IndexBackward0" and chosen is None:
            chosen = node.metadata.get(INDEX)
            if chosen is None:
                return None
        elif name not in VIEWS | COPIES | {"ReshapeAliasBackward0", "UnsafeViewBackward0"}:
            return None
        node, slot = node.next_functions[0]
    leaf = weight if node is None else node.variable
    return (leaf, flipped, chosen) if isinstance(leaf, Tensor) else None


def note_index(rows: Tensor, index: Tensor) -> None:
    """Notes for :func:`expert_source_of` by which index a tensor was made.

    Args:
        rows: ``W[index]``.
        index: the index.
    """
    node: Any = rows.grad_fn
    if node is not None:
        node.metadata[INDEX] = index


def _signed(number: int) -> int:
    """A number that autograd shows without its sign."""
    return number - 2**64 if number >= 2**63 else number


# Functions --------------------------------------------------------------------


def watch_functions(mode: TorchFunctionMode) -> None:
    """Puts a mode under those that are active, so that they end in their own order.

    Args:
        mode: sees every function of torch that this thread calls from now on.
    """
    above = [_pop_mode() for _ in range(_len_torch_function_stack())]
    if above and isinstance(above[-1], DeviceContext):  # must be the lowest
        _push_mode(above.pop())
    _push_mode(mode)
    for other in reversed(above):
        _push_mode(other)


def stop_watching(mode: TorchFunctionMode) -> None:
    """Takes a mode out of those that are active in this thread.

    Args:
        mode: see :func:`watch_functions`.
    """
    active = [_pop_mode() for _ in range(_len_torch_function_stack())]
    for other in reversed(active):
        if other is not mode:
            _push_mode(other)


@functools.cache
def opened(function: types.FunctionType) -> Callable[..., Any]:
    """A function written in Python that does not hide from a mode what it calls.

    Args:
        function: one that hands itself to the mode as a whole.
    """
    checks = ("has_torch_function", "has_torch_function_unary")
    names = function.__globals__ | dict.fromkeys(checks, lambda tensors: False)
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# Modules ----------------------------------------------------------------------


def padding_for_pad(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Returns a convolution's padding as ``torch.nn.functional.pad`` takes it, ``"same"`` too.

    Args:
        layer: the convolution.
    """
    return list(layer._reversed_padding_repeated_twice)


def convolution_as_called(
    layer: nn.Module, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> nn.Module:
    """A convolution with the weight of another and options of a call.

    Args:
        layer: whose weight the function was called with.
        stride: as ``torch.nn.functional.conv1d`` takes it.
        padding: the same.
        dilation: the same.
        groups: the same.
    """
    weight: Any = layer.weight
    out, columns, *kernel = weight.shape
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    options = (stride, padding, dilation, groups, False)
    called = kind(columns * groups, out, kernel, *options, device="meta")
    called.weight = weight
    return called


def in_float32(tree: T, low: torch.dtype) -> T | None:
    """Returns nested containers with their tensors of one dtype in float32, ``None`` without any.

    Containers are rebuilt only where they must be: the receiver may write to one.

    Args:
        tree: tensors and other values in lists, tuples, dictionaries, ….
        low: the dtype that is cast.
    """

    def is_low(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == low

    if not any(is_low(value) for value in tree_leaves(tree)):
        return None
    cast: T = tree_map(lambda value: value.float() if is_low(value) else value, tree)
    return cast


# torch.compile ----------------------------------------------------------------


class EagerCode:
    """Makes compiled functions run the Python that they were compiled from, in the whole process.

    The stance is global in torch: the first of several holders sets it, the last one resets it.
    """

    holders = 0
    stack = ExitStack()

    def __init__(self) -> None:
        self.held = False
        self.idled = False

    def expect(self, due: bool) -> None:
        """Holds the stance from now on if the step is due, else lets go of it.

        A compiled model has been compiled once a step that was not due is
        over. So the stance is held until then, and afterwards if anything was
        compiled; otherwise the process may compile what it likes, also after a
        training that ended before a step that would have been due.

        Args:
            due: whether the passes of the next step must run uncompiled.
        """
        self.release()
        self.idled = self.idled or not due
        if due and (not self.idled or compiled_code_runs()):
            self.acquire()

    def acquire(self) -> None:
        """Holds the stance."""
        if self.held:
            return
        self.held = True
        if EagerCode.holders == 0 and "torch._dynamo" in sys.modules:
            EagerCode.stack.enter_context(torch.compiler.set_stance("force_eager"))
        EagerCode.holders += 1

    def release(self) -> None:
        """Lets go of the stance."""
        if self.held:
            self.held = False
            EagerCode.holders -= 1
            if EagerCode.holders == 0:
                EagerCode.stack.close()


def compiled_code_runs() -> bool:
    """Whether anything was compiled in this process so far; True where torch does not say."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    counters = getattr(getattr(dynamo, "utils", None), "counters", None)
    return counters is None or bool(counters.get("frames"))
