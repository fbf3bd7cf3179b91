"""Switches to kernels that can be differentiated twice, and back.

torch's fused attention kernels have no second derivative, compiled graphs and
reentrant checkpointing none either. The switches for attention and compiled
code are global in torch; they are held by however many want them and released
by the last.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_CHECKPOINT = "_gradient_checkpointing_func"


class _Shared(ABC):
    """A global context, entered for the first holder and left by the last."""

    def __init__(self) -> None:
        self.holders = 0
        self.stack = ExitStack()

    def acquire(self) -> None:
        if self.holders == 0:
            self.enter(self.stack)
        self.holders += 1

    def release(self) -> None:
        self.holders -= 1
        if self.holders == 0:
            self.stack.close()

    @abstractmethod
    def enter(self, stack: ExitStack) -> None:
        """Put what is to hold into ``stack``."""


class _MathAttention(_Shared):
    """``scaled_dot_product_attention`` by the MATH kernel."""

    def enter(self, stack: ExitStack) -> None:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))


class _EagerCode(_Shared):
    """Compiled functions run the Python they were compiled from."""

    def enter(self, stack: ExitStack) -> None:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))


def compiled_code_runs() -> bool:
    """Whether anything was compiled in this process so far; True where torch does not say."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    counters = getattr(getattr(dynamo, "utils", None), "counters", None)
    return counters is None or bool(counters.get("frames"))


_MATH_ATTENTION = _MathAttention()
_EAGER_CODE = _EagerCode()


class DoubleBackward:
    """The switches that one model's products need.

    :meth:`expect` is for the moment before the passes of a step; :meth:`acquire`
    for a forward pass; :meth:`release`, when its backward pass is done, takes
    both back. Each may be called repeatedly.

    Args:
        model: its modules' reentrant checkpointing (transformers') is run
            non-reentrant meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.held: list[_Shared] = []
        self.checkpoints: list[tuple[nn.Module, Any]] = []
        self.idled = False

    def expect(self, due: bool) -> None:
        """Let compiled code run uncompiled from now on, where the step is due; undo the rest.

        A compiled model has been compiled once a step that was not due is
        over. So until then, and from then on if anything was; otherwise the
        process may compile what it likes, also after a training that ended
        before a step that would have been due.
        """
        self.release()
        self.idled = self.idled or not due
        if due and (not self.idled or compiled_code_runs()):
            self._hold(_EAGER_CODE)

    def acquire(self) -> None:
        """Switch compiled code, attention and checkpointing."""
        self._hold(_EAGER_CODE)
        if _MATH_ATTENTION in self.held:
            return
        self._hold(_MATH_ATTENTION)
        for module in self.model.modules():
            function = module.__dict__.get(_CHECKPOINT)
            if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
                keywords = function.keywords | {"use_reentrant": False}
                self.checkpoints.append((module, function))
                twice = functools.partial(function.func, *function.args, **keywords)
                setattr(module, _CHECKPOINT, twice)

    def release(self) -> None:
        """Undo everything."""
        while self.checkpoints:
            module, function = self.checkpoints.pop()
            setattr(module, _CHECKPOINT, function)
        while self.held:
            self.held.pop().release()

    def _hold(self, shared: _Shared) -> None:
        if shared not in self.held:
            shared.acquire()
            self.held.append(shared)
