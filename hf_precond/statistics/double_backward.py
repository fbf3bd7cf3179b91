"""Passes whose graph can be differentiated twice, in the precision of the weights.

torch's fused attention kernels have no second derivative, compiled graphs and
reentrant checkpointing none either. The switches for attention and compiled
code are global in torch; several models may hold them, and the last one
resets them.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_precond.compat.torch_internals import EagerCode, in_float32

_CHECKPOINT = "_gradient_checkpointing_func"


class DoubleBackward:
    """The switches that one model's Hessian-vector products need.

    :meth:`expect` is for the moment before the passes of a step; :meth:`acquire`
    for a forward pass; :meth:`release`, when its backward pass is done, takes
    both back. Each may be called repeatedly.

    Args:
        model: its modules' reentrant checkpointing (transformers') is run
            non-reentrant meanwhile.
    """

    holders = 0
    attention = ExitStack()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.code = EagerCode()
        self.held = False
        self.checkpoints: list[tuple[nn.Module, Any]] = []

    def expect(self, due: bool) -> None:
        """Undoes everything, and has compiled code run uncompiled if the next step is due.

        Args:
            due: whether the next step's passes are differentiated twice.
        """
        self.release()
        self.code.expect(due)

    def acquire(self) -> None:
        """Switches compiled code, attention (to the MATH kernel) and checkpointing."""
        self.code.acquire()
        if self.held:
            return
        self.held = True
        if DoubleBackward.holders == 0:
            DoubleBackward.attention.enter_context(sdpa_kernel(SDPBackend.MATH))
        DoubleBackward.holders += 1
        for module in self.model.modules():
            function = module.__dict__.get(_CHECKPOINT)
            if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
                keywords = function.keywords | {"use_reentrant": False}
                self.checkpoints.append((module, function))
                twice = functools.partial(function.func, *function.args, **keywords)
                setattr(module, _CHECKPOINT, twice)

    def release(self) -> None:
        """Undoes everything."""
        self.code.release()
        while self.checkpoints:
            module, function = self.checkpoints.pop()
            setattr(module, _CHECKPOINT, function)
        if self.held:
            self.held = False
            DoubleBackward.holders -= 1
            if DoubleBackward.holders == 0:
                DoubleBackward.attention.close()


class FullPrecision:
    """Runs modules in the precision of their weights, float32 or float64, inside autocast.

    A model with any weight of another dtype is left under autocast, which
    may be what makes its dtypes fit together.

    Args:
        model: the model the modules belong to.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.left: list[tuple[nn.Module, torch.autocast]] = []
        self._full: bool | None = None

    def expect(self) -> None:
        """Reads the weights' dtypes again at the next :meth:`enter`; they hold for a step."""
        self._full = None

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Leaves autocast before a module's forward pass.

        Args:
            module: the module.
            args: its positional inputs.
            kwargs: its other inputs.

        Returns:
            The inputs with what autocast made in lower precision, outside of
            the module, cast to float32; ``None`` to leave them as they are.
        """
        device = next(self.model.parameters()).device.type
        if not torch.is_autocast_enabled(device) or not self._is_full():
            return None
        low = torch.get_autocast_dtype(device)
        context = torch.autocast(device, enabled=False)
        context.__enter__()
        self.left.append((module, context))
        return in_float32((args, kwargs), low)

    def leave(self, module: nn.Module) -> None:
        """Enters autocast again after a module's forward pass, also one that failed.

        Args:
            module: the module.
        """
        if self.left and self.left[-1][0] is module:
            self.left.pop()[1].__exit__(None, None, None)

    def _is_full(self) -> bool:
        if self._full is None:
            allowed = (torch.float32, torch.float64)
            self._full = all(weight.dtype in allowed for weight in self.model.parameters())
        return self._full
