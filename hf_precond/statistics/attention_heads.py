"""Second moments of queries and keys per head, as they meet in the logits, and entropies.

The attentions of transformers look their kernel up by
``AttentionInterface.get_interface`` on every forward. While attentions are
observed, that method returns the kernel with an observer around it. Observers
are registered per attention module, so models do not mix.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.distributed import collectives
from hf_precond.linalg.products import compute_dtype, without_autocast
from hf_precond.statistics.moments import count_of, weighted
from hf_precond.statistics.passes import (
    OutputGradAccumulator,
    PassKind,
    StatisticsBuffer,
    on_gradient,
)
from hf_precond.statistics.requests import MomentRequest, Statistic
from hf_precond.statistics.rope import RopeReader, UnreadRotationError
from hf_precond.statistics.token_weights import Reader, TokenWeights


@dataclass(frozen=True)
class Call:
    """One call of an attention's kernel.

    Args:
        query: per head, ``[B, H, N, d_h]``, normed and rotated.
        key: per head, ``[B, H_kv, M, d_h]``, normed and rotated.
        output: the first value that the kernel returned.
        mask: its attention mask.
        options: its other arguments by name.
        kernel: its name.
    """

    query: Tensor
    key: Tensor
    output: Tensor
    mask: Any
    options: dict[str, Any]
    kernel: str


Observer = Callable[[nn.Module, Call], None]

OBSERVERS: dict[nn.Module, list[Observer]] = {}
_WRAPPERS: list[Any] = []


def observe(modules: Iterable[nn.Module], observer: Observer) -> None:
    """Calls ``observer(module, call)`` at every kernel call of some attentions.

    Args:
        modules: the attentions.
        observer: what is called.
    """
    for module in modules:
        OBSERVERS.setdefault(module, []).append(observer)
    interface = _interface()
    if interface is None or _WRAPPERS or not OBSERVERS:
        return
    original = interface.get_interface

    @functools.wraps(original)
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        kernel = original(self, *args, **kwargs)
        return _observed(kernel) if OBSERVERS else kernel

    _WRAPPERS.append(get_interface)
    interface.get_interface = get_interface


def stop_observing(modules: Iterable[nn.Module], observer: Observer) -> None:
    """Undoes :func:`observe`; the last one restores the look-up.

    Args:
        modules: the attentions.
        observer: what was called.
    """
    for module in modules:
        OBSERVERS[module].remove(observer)
        if not OBSERVERS[module]:
            del OBSERVERS[module]
    interface = _interface()
    # If something else has wrapped ours since, ours stays inside it, without observers.
    if interface is not None and not OBSERVERS and interface.get_interface in _WRAPPERS:
        interface.get_interface = _WRAPPERS.pop().__wrapped__


def _interface() -> type[Any] | None:
    """``AttentionInterface`` where this transformers has it with ``get_interface``."""
    module = sys.modules.get("transformers.modeling_utils")
    interface = getattr(module, "AttentionInterface", None)
    return interface if hasattr(interface, "get_interface") else None


def _observed(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = kernel(module, query, key, *args, **kwargs)
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        call = Call(query, key, output, mask, kwargs, getattr(kernel, "__name__", ""))
        for observer in OBSERVERS.get(module, ()):
            observer(module, call)
        return outputs

    return attend


@dataclass
class _ObservedAttention:
    """An attention whose queries or keys are collected, and who asks for them."""

    block: AttentionBlock
    path: str
    queries: Reader
    memory: Reader
    requests: list[MomentRequest] = field(default_factory=list)
    rope: RopeReader | None = None


class HeadMoments:
    """Collects what is requested of the heads; part of a ``MomentCollector``.

    Args:
        requests: ``query``, ``key`` and ``entropy``.
        tokens: the masks of the passes.
        paths: module to path.
        buffer: where sums are added.

    Raises:
        ValueError: an attention's queries and keys cannot be observed.
        RuntimeError: this version of transformers has no such look-up.
    """

    def __init__(
        self,
        requests: Sequence[MomentRequest],
        tokens: TokenWeights,
        paths: dict[nn.Module, str],
        buffer: StatisticsBuffer,
    ) -> None:
        self.enabled = False
        self.buffer = buffer
        self.attentions: dict[nn.Module, _ObservedAttention] = {}
        self.called: set[nn.Module] = set()  # their rotation was read, or was not to be read
        self.unread: set[nn.Module] = set()
        self.rotations: dict[str, Statistic] = {}  # of all ranks
        self.hooks = ExitStack()
        for request in requests:
            block = request.attention
            if block is None or not block.observed or block.module not in paths:
                raise ValueError(
                    f"{request.key}: the queries and keys of "
                    f"{block.name if block else request.matrix.name} cannot be observed: it does "
                    "not call transformers' attention look-up; use rope='ignored'."
                )
            path = paths[block.module]
            if block.module not in self.attentions:
                queries, memory = tokens.reader(path), tokens.reader(path, memory=block.cross)
                attention = _ObservedAttention(block, path, queries, memory)
                self.attentions[block.module] = attention
            attention = self.attentions[block.module]
            attention.requests.append(request)
            if request.average_rotation and attention.rope is None:
                attention.rope = RopeReader(block.module, path, self.hooks, block.plain)
        # Whether their rotations can be read is not known yet.
        self.pending = [module for module, found in self.attentions.items() if found.rope]
        if _interface() is None:
            raise RuntimeError(
                "queries and keys cannot be observed: this version of transformers has no "
                "AttentionInterface.get_interface; use rope='ignored', or transformers>=5.4,<6."
            )

    def _observe(self, module: nn.Module, call: Call) -> None:
        """Computes what one attention call brings, and adds it when its gradient comes."""
        if not (module.training and torch.is_grad_enabled() and call.output.requires_grad):
            return
        try:
            with torch.no_grad(), without_autocast(call.output.device):
                moments = self._moments(self.attentions[module], call)
        except UnreadRotationError:
            self.unread.add(module)
            return
        self.called.add(module)

        accumulator = OutputGradAccumulator(PassKind(None, module))
        buffer = self.buffer  # the graph, which the model may keep, does not hold the model

        def add(gradient: Tensor) -> None:
            changed = accumulator.add(gradient.new_zeros(()), buffer.epoch)
            if changed is not None and changed[2] is None:  # once, however many passes there are
                for key, moment in moments.items():
                    buffer.add(key, moment, changed[0])

        on_gradient(call.output, add)

    def _moments(self, attention: _ObservedAttention, call: Call) -> dict[Hashable, Statistic]:
        heads, moments = attention.block.heads, {}
        query, key = call.query.detach(), call.key.detach()
        dtype = compute_dtype(query.dtype)
        if key.shape[1] == heads.query:
            key = key[:, :: heads.group]
        for request in attention.requests:
            name = _key(attention, request)
            if name in moments:
                continue
            if request.kind == "entropy":
                moments[name] = self._entropies(attention, call, request.rows)
            elif request.kind == "query":
                moments[name] = _moment(query.to(dtype), attention.queries)
            else:
                moments[name] = _moment(key.to(dtype), attention.memory)
        if attention.rope is not None:
            moments[attention.path, "rotation"] = attention.rope.tables(query, attention.queries)
        return moments

    def _entropies(self, attention: _ObservedAttention, call: Call, rows: int) -> Statistic:
        """Sums over the query positions, at most ``rows`` of a sequence, per head."""
        batch, _, length, size = call.query.shape
        positions = spaced(length, rows)
        values = entropies(attention.block.module, call, positions)
        weights = attention.queries.read((batch, length, size), values.dtype)
        weights = values.new_ones(batch, length) if weights is None else weights
        weights = weights[:, positions]
        # A padded position may attend to nothing at all: its entropy is not finite.
        values = values.masked_fill(weights[:, None] == 0, 0)
        return Statistic((values * weights[:, None]).sum((0, 2)), weights.sum())

    def get(self, request: MomentRequest) -> Statistic | None:
        """Returns the answer to a request, or ``None`` when nothing was collected.

        Args:
            request: the request.
        """
        assert request.attention is not None
        attention = self.attentions[request.attention.module]
        moment = self.buffer.get(_key(attention, request))
        if moment is None or not request.average_rotation:
            return moment
        rotation = self.rotations.get(attention.path)
        rotation = self.buffer.get((attention.path, "rotation")) if rotation is None else rotation
        assert rotation is not None and attention.rope is not None
        return Statistic(attention.rope.average(moment.sum, rotation), moment.count)

    def share_rotations(self) -> None:
        """Adds the rotations over the ranks: the average is over the positions of all of them."""
        found = [attention for attention in self.attentions.values() if attention.rope is not None]
        if not found or collectives.world_size() == 1:
            return
        parts = []
        for attention in found:
            layer, size = attention.block.q.module, attention.block.heads.size
            held = next(itertools.chain(layer.parameters(), layer.buffers()))  # may be quantised
            dtype = torch.float64 if held.dtype == torch.float64 else torch.float32
            part = torch.zeros(3 * size**2 + 1, dtype=dtype, device=held.device)
            own = self.buffer.get((attention.path, "rotation"))
            if own is not None:
                part[:-1], part[-1] = own.sum.flatten(), own.count
            parts.append(part)
        bucket = torch.cat(parts)
        collectives.sum_over_ranks(bucket)
        for attention, total in zip(found, bucket.split([len(p) for p in parts]), strict=True):
            size = attention.block.heads.size
            tables = total[:-1].view(3, size, size)
            self.rotations[attention.path] = Statistic(tables, total[-1])

    def settle(self) -> bool:
        """Marks attentions whose rotation could not be read as not observed, on every rank alike.

        Returns:
            Whether there are new ones.
        """
        if not self.pending:
            return False
        flags = torch.tensor([[m in self.called, m in self.unread] for m in self.pending])
        if collectives.world_size() > 1:
            layer = self.attentions[self.pending[0]].block.q.module
            held = next(itertools.chain(layer.parameters(), layer.buffers()))  # may be quantised
            flags = flags.to(held.device, torch.int32)
            collectives.sum_over_ranks(flags)
        found = list(zip(self.pending, flags.tolist(), strict=True))
        self.pending = [module for module, (was_read, lost) in found if not (was_read or lost)]
        unread = [module for module, (_, lost) in found if lost]
        for module in unread:
            self.attentions[module].block.observed = False
        return bool(unread)

    def enable(self, due: bool) -> None:
        """Collects, or not.

        Args:
            due: whether to collect.
        """
        if due != self.enabled:
            self.enabled = due
            (observe if due else stop_observing)(self.attentions, self._observe)
            for attention in self.attentions.values():
                if attention.rope is not None:
                    attention.rope.enabled = due

    def close(self) -> None:
        """Removes the hooks, and the observer of the attention look-up."""
        self.enable(False)
        self.hooks.close()


def _moment(vectors: Tensor, reader: Reader) -> Statistic:
    """The moment per head of queries or keys ``[B, H, N, d_h]``."""
    batch, _, length, size = vectors.shape
    weights = reader.read((batch, length, size), vectors.dtype)
    spread = None if weights is None else weights[:, None].expand(vectors.shape[:-1])
    total = (weighted(vectors, spread).mT @ vectors).sum(0)
    return Statistic(total, count_of(batch * length, weights, vectors))


def _key(attention: _ObservedAttention, request: MomentRequest) -> Hashable:
    return attention.path, request.kind, request.rows


# Entropy of attention weights ---------------------------------------------------


def spaced(length: int, rows: int) -> slice:
    """Returns at most ``rows`` evenly spaced positions.

    Args:
        length: how many positions there are.
        rows: at most so many; 0 for all.
    """
    return slice(None, None, -(-length // rows) if rows else 1)


def entropies(module: nn.Module, call: Call, positions: slice) -> Tensor:
    """Returns ``-Σ_j p_ij log p_ij`` in nats at R query positions, ``[B, H, R]``.

    The weights are the softmax of the logits before dropout, masked as the
    kernel masks them.

    Args:
        module: the attention.
        call: what its kernel was called with.
        positions: which queries.

    Raises:
        RuntimeError: the mask is not a tensor (flex attention).
    """
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query, key = call.query[:, :, positions].to(dtype), call.key.to(dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scaling = call.options.get("scaling")
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap = call.options.get("softcap")
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    bias = call.options.get("position_bias")
    if isinstance(bias, Tensor):
        logits = logits + _rows(bias, positions).to(dtype)
    logits = _masked(module, call, positions, logits)
    sinks = call.options.get("s_aux")
    if isinstance(sinks, Tensor):
        column = sinks.to(dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def _rows(mask: Tensor, positions: slice) -> Tensor:
    """The rows of these positions in ``[…, N, M]``, where there is one per position."""
    return mask if mask.shape[-2] == 1 else mask[..., positions, :]


def _masked(module: nn.Module, call: Call, positions: slice, logits: Tensor) -> Tensor:
    mask, length, memory = call.mask, call.query.shape[2], logits.shape[-1]
    lowest = torch.finfo(logits.dtype).min
    if mask is not None and not isinstance(mask, Tensor):
        raise RuntimeError(
            f"attention_entropy: the mask of {call.kernel} ({type(mask).__name__}) cannot be read; "
            "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2', or "
            "set attention_entropy=False."
        )
    if mask is not None and mask.dim() == 4:
        rows = _rows(mask, positions)[..., :memory]
        return logits.masked_fill(~rows, lowest) if rows.dtype == torch.bool else logits + rows
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, -memory:].bool(), lowest)
    if call.kernel.startswith("eager") or length == 1:
        return logits
    ahead = torch.arange(memory, device=logits.device) - (
        torch.arange(length, device=logits.device)[positions, None] + memory - length
    )
    causal = call.options.get("is_causal")
    if getattr(module, "is_causal", True) if causal is None else causal:
        logits = logits.masked_fill(ahead > 0, lowest)
    window = call.options.get("sliding_window")
    return logits if window is None else logits.masked_fill(ahead.abs() >= window, lowest)
