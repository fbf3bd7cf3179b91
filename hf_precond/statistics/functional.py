"""Weights that are given to a function of torch instead of being used by their layer's module."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_precond.architectures.modules import CONVOLUTIONS, is_linear, is_transposed_linear
from hf_precond.compat.torch_internals import (
    EagerCode,
    Hook,
    convolution_as_called,
    opened,
    source_of,
    stop_watching,
    watch_functions,
)

if TYPE_CHECKING:
    from hf_precond.statistics.collector import HookedLayer
    from hf_precond.statistics.experts import ExpertCalls

CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
CONVOLVE_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
MULTIPLY = (
    *(torch.matmul, torch.mm, torch.mv),
    *(Tensor.matmul, Tensor.mm, Tensor.mv, Tensor.__matmul__),
)
FACTORS = ("input", "other", "mat2", "vec")
ADD_PRODUCT = (torch.addmm, Tensor.addmm)


@dataclass(frozen=True)
class FixedWeights:
    """Token weights that a function was called with; reads as ``Reader`` does.

    Args:
        kept: ones for the tokens that count, ``[T, B]``; ``None`` where all do.
        memory: distinguishes what shares no moments.
    """

    kept: Tensor | None
    memory: str = "given"

    def read(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Returns the weights for an input, ``None`` for all ones.

        Args:
            shape: of the input, ``[T, B, …]`` or ``[T · B, …]``.
            dtype: of the weights.
        """
        if self.kept is None:
            return None
        kept = self.kept.to(dtype)
        if shape[:2] == tuple(kept.shape):
            return kept
        return kept.flatten() if len(shape) == 2 and shape[0] == kept.numel() else None


class FunctionalCalls(TorchFunctionMode):
    """Sees which layers' weights are given to functions of torch, and what goes in and comes out.

    Read are ``torch.nn.functional.linear``, products with the transposed weight, convolutions, and
    the projections inside ``torch.nn.functional.multi_head_attention_forward``. The weight may be a
    view or a cast of the parameter. What a layer's own module computes is left to its hooks, unless
    what enters and leaves it does not fit its weight; a fused kernel cannot be read.

    It is active from the first pass of a step whose statistics are collected until these are taken.

    Args:
        layers: hooked module to layer.
        observe: method that is called as ``observe(hooked, inputs, result, transposed)``; held
            weakly.
        switch: keeps compiled code, which shows no functions, from running meanwhile.
    """

    def __init__(
        self,
        layers: Mapping[nn.Module, HookedLayer],
        observe: Callable[..., None],
        switch: EagerCode,
    ) -> None:
        super().__init__()
        self.switch = switch
        self.layers, self.observe = layers, weakref.WeakMethod(observe)
        self.found = False  # any such call, since the mode was entered
        self.inside: set[nn.Module] = set()  # hooked modules whose forward runs
        self.unlike: set[nn.Module] = set()  # subclasses that compute more than their weight does
        self.by_weight: dict[int, HookedLayer] = {}
        self.unknown: dict[int, Tensor] = {}
        self.experts: ExpertCalls | None = None  # where there are some
        self.experts_see: Callable[[Any], bool] = lambda function: False
        self.reader: FixedWeights | None = None
        self.memory: tuple[Any, ...] = ()
        self.hooks = ExitStack()
        self.entered = False

    def enter(self, model: nn.Module) -> None:
        """Looks from now on.

        Args:
            model: whose forward pass begins.
        """
        if self.experts is not None:
            self.experts.begin()
        if self.entered:
            return
        self.entered, self.found = True, False
        self.switch.acquire()
        self._index()
        for module in self.layers:
            hook = Hook(self._before_forward)
            self.hooks.callback(module.register_forward_pre_hook(hook).remove)
        self.inside |= ({model} & self.layers.keys()) - self.unlike
        watch_functions(self)

    def leave(self) -> None:
        """Looks no longer."""
        if self.entered:
            self.entered = False
            stop_watching(self)
            self.hooks.close()
            self.inside.clear()
            self.by_weight.clear()
            self.unknown.clear()
            if self.experts is not None:
                self.experts.begin()

    def _index(self) -> None:
        read = (hooked for hooked in self.layers.values() if _is_read(hooked))
        self.by_weight = {id(hooked.layer.weight): hooked for hooked in read}

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Of calls without gradients the collector does not hear the end.
        if module not in self.unlike and torch.is_grad_enabled():
            self.inside.add(module)

    def find(self, weight: Any) -> tuple[HookedLayer, bool] | None:
        """The layer whose weight a tensor is, and whether it is transposed.

        ``None`` for any other tensor, and while the layer's own module runs.

        Args:
            weight: what a function was called with.
        """
        if not isinstance(weight, Tensor) or not weight.requires_grad:
            return None
        source = source_of(weight)
        if source is None:
            return None
        leaf, flipped = source
        hooked = self.by_weight.get(id(leaf))
        if (hooked is None or hooked.layer.weight is not leaf) and id(leaf) not in self.unknown:
            self._index()  # FSDP2 swaps parameters
            hooked = self.by_weight.get(id(leaf))
            if hooked is None:
                self.unknown[id(leaf)] = leaf
        if hooked is None or hooked.layer.weight is not leaf or hooked.module in self.inside:
            return None
        return hooked, flipped

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        read = READERS.get(func)
        seen = self.experts is not None and self.experts_see(func)
        if not (read or seen) or not self.entered or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        result = (
            func(*args, **(kwargs or {})) if read is None else read(self, func, args, kwargs or {})
        )
        if seen and self.experts is not None:
            self.found |= self.experts.note(func, args, kwargs or {}, result)
        return result

    def linear(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``x Wᵀ + b``."""
        result = function(*args, **kwargs)
        given = _given(("input", "weight"), args, kwargs)
        found = self.find(given.get("weight"))
        if found is not None and found[1] == is_transposed_linear(found[0].layer):
            self._note(found[0], given["input"], result)
        return result

    def multiply(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``x Wᵀ``, or ``W xᵀ``, which is its transpose (Mamba's step sizes)."""
        result = function(*args, **kwargs)
        factors = (*args, *(kwargs[name] for name in FACTORS if name in kwargs))
        if len(factors) == 2 and "out" not in kwargs:
            self._note_product(*factors, result)
        return result

    def add_product(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``b + x Wᵀ``; with factors of their own (``alpha``) it is not read."""
        result = function(*args, **kwargs)
        if len(args) == 3 and not kwargs:
            self._note_product(*args[1:], result)
        return result

    def _note_product(self, left: Any, right: Any, result: Tensor) -> None:
        found = self.find(right)
        if found is not None and found[1] != is_transposed_linear(found[0].layer):
            self._note(found[0], left, result)
        found = self.find(left)
        if found is not None and found[1] == is_transposed_linear(found[0].layer):
            vector = right.dim() == 1
            inputs = right if vector else right.mT
            self._note(found[0], inputs, result, transposed=not vector)

    def convolve(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A convolution, by the options that it is called with."""
        result = function(*args, **kwargs)
        given = _given(CONVOLVE_ARGUMENTS, args, kwargs)
        found = self.find(given.get("weight"))
        if found is not None and isinstance(found[0].layer, CONVOLUTIONS) and not found[1]:
            options = {name: given[name] for name in CONVOLVE_ARGUMENTS[3:] if name in given}
            called = convolution_as_called(found[0].layer, **options)
            self._note(replace(found[0], layer=called), given["input"], result)
        return result

    def attend(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The projections inside attention: their inputs and outputs are seen one by one."""
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight")
        if all(self.find(given.get(name)) is None for name in names):
            return function(*args, **kwargs)
        mask, kept = given.get("key_padding_mask"), None
        if mask is not None:
            kept = (~mask if mask.dtype == torch.bool else mask == 0).mT
        same = given["query"] is given["key"]
        self.reader = FixedWeights(kept)
        self.memory = () if same else (given["key"], given["value"])
        try:
            with self:
                return opened(function)(*args, **kwargs)
        finally:
            self.reader, self.memory = None, ()

    def go_backward(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A backward pass, in which checkpointed forward passes are run again."""
        with self:
            return opened(function)(*args, **kwargs)

    def _note(
        self, hooked: HookedLayer, inputs: Tensor, result: Tensor, transposed: bool = False
    ) -> None:
        self.found = True
        if self.reader is not None:
            own = not self.memory or any(inputs is tensor for tensor in self.memory)
            hooked = replace(hooked, reader=self.reader if own else FixedWeights(None))
        observe = self.observe()
        if observe is not None:
            observe(hooked, inputs, result, transposed)


READERS: dict[Any, Callable[..., Any]] = {
    F.linear: FunctionalCalls.linear,
    F.multi_head_attention_forward: FunctionalCalls.attend,
    Tensor.backward: FunctionalCalls.go_backward,
    torch.autograd.backward: FunctionalCalls.go_backward,
    **dict.fromkeys(CONVOLVE, FunctionalCalls.convolve),
    **dict.fromkeys(MULTIPLY, FunctionalCalls.multiply),
    **dict.fromkeys(ADD_PRODUCT, FunctionalCalls.add_product),
}
"""The functions that are read."""


def _given(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _is_read(hooked: HookedLayer) -> bool:
    """Whether a layer has a weight of its own that functions may be given."""
    layer = hooked.layer
    if isinstance(hooked.module, nn.MultiheadAttention):
        return False
    known = is_linear(layer) or isinstance(layer, CONVOLUTIONS)
    return known and isinstance(layer._parameters.get("weight"), Tensor)
