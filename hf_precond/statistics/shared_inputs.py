"""Inputs that several layers share: one moment for all, and a check that they are the same."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_precond.compat.torch_internals import Hook, transforming
from hf_precond.compat.warn import warn
from hf_precond.distributed import collectives
from hf_precond.statistics.requests import MomentRequest, Statistic
from hf_precond.statistics.token_weights import TokenWeights

if TYPE_CHECKING:
    from hf_precond.architectures.attention_block import AttentionBlock

SEPARATE = (
    "{name} ({kind}) calls the layers of its queries, keys and values with different tensors, "
    "which was not known: each has a second moment of its own from the next statistics on. To have "
    "it from the start, pass separate_inputs={roles} to hf_precond.declare_attention({kind!r}, …) "
    "before the optimizer is created."
)


class SharedInputs:
    """The last input moments of a pass, so that layers called with one tensor compute one moment.

    q, k and v of an attention, or gate and up of an MLP, get the same tensor
    one after the other. Call :meth:`forget` before a moment is added to a
    buffer, which changes it in place.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[weakref.ref[Tensor], int, Statistic]] = {}

    def moment(
        self, variant: Hashable, inputs: Tensor, compute: Callable[[], Statistic]
    ) -> Statistic:
        """Returns the moment of ``inputs``, its memory not shared.

        Args:
            variant: what two layers must have in common besides the tensor.
            inputs: what the layer was called with.
            compute: computes the moment.
        """
        if variant in self._known:
            tensor, version, known = self._known[variant]
            if tensor() is inputs and version == inputs._version:
                return Statistic(known.sum.clone(), known.count.clone())
        result = compute()
        self._known[variant] = weakref.ref(inputs), inputs._version, result
        return result

    def forget(self) -> None:
        """Forgets every moment."""
        self._known.clear()


class InputCheck:
    """Compares, in the first collected pass, what the layers of an attention are called with.

    Those of q, k and v that are taken to read one tensor share its second moment. Where two of
    them turn out to be called with different tensors (in a class that is in no table and was
    not declared), :meth:`settle` corrects the attention's ``separate_inputs``.

    Args:
        requests: of a :class:`~hf_precond.statistics.collector.MomentCollector`.
        wrappers: each wrapped layer to the tuner layer around it.
        tokens: says whether passes are collected.
    """

    def __init__(
        self,
        requests: Iterable[MomentRequest],
        wrappers: Mapping[nn.Module, nn.Module],
        tokens: TokenWeights,
    ) -> None:
        self.tokens = tokens
        self.hooks: dict[AttentionBlock, ExitStack] = {}
        self.calls: dict[AttentionBlock, dict[str, tuple[Tensor, int]]] = {}
        self.differing: dict[AttentionBlock, set[str]] = {}
        blocks = (r.attention for r in requests if r.kind == "input" and r.attention is not None)
        for block in dict.fromkeys(blocks):
            layers = {role: matrix.module for role, matrix in block.roles().items()}
            pairs = [
                (role, other)
                for role, other in (("k", "q"), ("v", "k"))
                if {role, other} <= layers.keys()
                and block.reads(role) == block.reads(other)
                and layers[role] is not layers[other]
            ]
            for role in {role for pair in pairs for role in pair}:
                module = wrappers.get(layers[role], layers[role])
                hook = Hook(self._before_forward, block, pairs, role)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                self.hooks.setdefault(block, ExitStack()).callback(handle.remove)

    def _before_forward(
        self,
        block: AttentionBlock,
        pairs: Sequence[tuple[str, str]],
        role: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Notes a layer's first input, and compares when every layer has one."""
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        collecting = self.tokens.enabled and module.training and block not in self.differing
        if not collecting or transforming() or not isinstance(inputs, Tensor):
            return
        calls = self.calls.setdefault(block, {})
        calls.setdefault(role, (inputs, inputs._version))
        if all(role in calls for pair in pairs for role in pair):
            self.differing[block] = {a for a, b in pairs if not _is_same(calls[a], calls[b])}
            del self.calls[block]

    def settle(self) -> list[AttentionBlock]:
        """Corrects the attentions whose inputs were found to differ, on every rank alike.

        Returns:
            These attentions; a warning has named the first.
        """
        self.calls.clear()
        blocks = list(self.hooks)
        if not blocks:
            return []
        seen = [self.differing.get(block) for block in blocks]
        flags = torch.tensor([[s is not None, "k" in (s or ()), "v" in (s or ())] for s in seen])
        if collectives.world_size() > 1:
            layer = blocks[0].q.module
            held = next(itertools.chain(layer.parameters(), layer.buffers()))  # may be quantised
            flags = flags.to(held.device, torch.int32)
            collectives.sum_over_ranks(flags)
        corrected: list[AttentionBlock] = []
        for block, (compared, *differs) in zip(blocks, flags.tolist(), strict=True):
            if compared:
                self.hooks.pop(block).close()
            roles = {role for role, differ in zip("kv", differs, strict=True) if differ}
            if roles:
                block.separate_inputs |= roles
                corrected.append(block)
        if corrected:
            first = corrected[0]
            kind, own = type(first.module).__name__, sorted(first.separate_inputs)
            warn(SEPARATE.format(name=first.name, kind=kind, roles=own))
        return corrected

    def close(self) -> None:
        """Removes every hook."""
        for hooks in self.hooks.values():
            hooks.close()
        self.calls.clear()


def _is_same(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    """Returns whether two layers were called with the same numbers.

    Args:
        one: the input of a layer and its version at the call.
        other: that of another.
    """
    (a, before), (b, after) = one, other
    if a is b:
        return before == after
    if a.shape != b.shape or a.dtype != b.dtype or (a._version, b._version) != (before, after):
        return False
    return torch.equal(a, b)
