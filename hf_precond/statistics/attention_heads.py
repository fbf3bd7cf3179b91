"""Second moments of queries and keys per head, as they meet in the logits; entropies of both."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_precond.architectures.structure import AttentionBlock
from hf_precond.compat.torch_internals import Hook
from hf_precond.statistics.moments import Part, centred, count_of, moment, no_autocast
from hf_precond.statistics.requests import MomentRequest, Statistic
from hf_precond.statistics.rope import (
    Layout,
    average,
    from_complex,
    interleaved,
    read_layout,
    tables,
)
from hf_precond.statistics.token_weights import Reader, TokenWeights

if TYPE_CHECKING:
    from hf_precond.statistics.collector import StatisticsBuffer


@dataclass(frozen=True)
class Call:
    """One call of an attention's kernel.

    Args:
        query, key: per head, ``[B, H, N, d_h]`` and ``[B, H_kv, M, d_h]``, normed and rotated.
        output: what the kernel returned first.
        mask: its attention mask, as the kernel was given it.
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

_OBSERVERS: weakref.WeakKeyDictionary[nn.Module, list[weakref.WeakMethod[Observer]]] = (
    weakref.WeakKeyDictionary()
)
_STATE: dict[str, Any] = {"installed": 0, "enabled": 0, "original": None}


def _interface_class() -> type[Any] | None:
    """``AttentionInterface`` where this transformers has it with ``get_interface``."""
    module = sys.modules.get("transformers.modeling_utils")
    found = getattr(module, "AttentionInterface", None)
    return found if hasattr(found, "get_interface") else None


class Observation:
    """Calls ``observer(module, call)`` at every attention of ``modules``.

    It begins disabled; while no observation is enabled the kernels are handed
    out as they are. The observer (a bound method) is held weakly, and the
    observation ends with it.

    Args:
        modules: the attentions.
        observer: what is called.

    Raises:
        RuntimeError: when this version of transformers has no such look-up.
    """

    def __init__(self, modules: list[nn.Module], observer: Observer) -> None:
        interface = _interface_class()
        if interface is None:
            raise RuntimeError(
                "queries and keys cannot be observed: this version of transformers has no "
                "AttentionInterface.get_interface; use rope='ignored', or transformers>=5.4,<6."
            )
        if _STATE["installed"] == 0:
            _install(interface)
        _STATE["installed"] += 1
        self.live = {"enabled": False}
        reference = weakref.WeakMethod(observer)
        for module in modules:
            _OBSERVERS.setdefault(module, []).append(reference)
        keys = [weakref.ref(module) for module in modules]
        owner = observer.__self__  # type: ignore[attr-defined]
        self.close = weakref.finalize(owner, _end, interface, keys, reference, self.live)

    def enable(self, due: bool) -> None:
        """Observe, or not."""
        if self.close.alive and due != self.live["enabled"]:
            _STATE["enabled"] += 1 if due else -1
            self.live["enabled"] = due


def _end(
    interface: type[Any],
    keys: list[weakref.ref[nn.Module]],
    reference: weakref.WeakMethod[Observer],
    live: dict[str, bool],
) -> None:
    for key in keys:
        module = key()
        if module is not None and module in _OBSERVERS:
            rest = [other for other in _OBSERVERS[module] if other is not reference]
            if rest:
                _OBSERVERS[module] = rest
            else:
                del _OBSERVERS[module]
    _STATE["enabled"] -= live["enabled"]
    live["enabled"] = False
    _STATE["installed"] -= 1
    if _STATE["installed"] == 0:
        interface.get_interface = _STATE["original"]
        _STATE["original"] = None


def _install(interface: type[Any]) -> None:
    original = interface.get_interface

    @functools.wraps(original)
    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        kernel = original(self, *args, **kwargs)
        return _observed(kernel) if _STATE["enabled"] else kernel

    _STATE["original"] = original
    interface.get_interface = get_interface


def _observed(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = kernel(module, query, key, *args, **kwargs)
        for reference in _OBSERVERS.get(module, ()):
            observer = reference()
            if observer is not None:
                output = outputs[0] if isinstance(outputs, tuple) else outputs
                mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
                name = getattr(kernel, "__name__", "")
                observer(module, Call(query, key, output, mask, kwargs, name))
        return outputs

    return attend


def observing() -> int:
    """How many observations there are."""
    return _STATE["installed"]


HEADS = ("query", "key", "entropy")
"""Kinds of requests that are answered from the calls of an attention's kernel."""


@dataclass(frozen=True)
class _Rotation:
    """Cosines and sines of one call; ``paired`` when they came as complex numbers."""

    cos: Tensor
    sin: Tensor
    paired: bool = False


@dataclass
class _Head:
    """An attention whose queries or keys are collected."""

    block: AttentionBlock
    path: str
    requests: list[MomentRequest]
    queries: Reader
    memory: Reader
    layout: Layout | None = None
    rotation: _Rotation | None = None
    unrotated: bool = False

    @property
    def averaged(self) -> bool:
        """Whether a request wants the average over rotations."""
        return any(request.average_rotation for request in self.requests)


class HeadMoments:
    """Collects the ``query``, ``key`` and ``entropy`` requests of a :class:`MomentCollector`.

    Args:
        model: the model.
        requests: of these kinds.
        tokens: the masks of the passes.
        paths: module to path.
        stage: where sums are staged.

    Raises:
        ValueError: when an attention's queries and keys cannot be observed.
    """

    def __init__(
        self,
        model: nn.Module,
        requests: Sequence[MomentRequest],
        tokens: TokenWeights,
        paths: dict[nn.Module, str],
        stage: StatisticsBuffer,
    ) -> None:
        self.enabled = False
        self.tokens = tokens
        self.stage = stage
        self.heads: dict[nn.Module, _Head] = {}
        self.handles: list[RemovableHandle] = []
        self.observation: Observation | None = None
        for request in requests:
            self._add(request, paths)
        if not self.heads:
            return
        for head in self.heads.values():
            if head.averaged:
                self._watch_rotation(head)
        self.observation = Observation(list(self.heads), self._observe)

    def _add(self, request: MomentRequest, paths: dict[nn.Module, str]) -> None:
        block = request.attention
        if block is None or not block.observed or block.module not in paths:
            raise ValueError(
                f"{request.key}: the queries and keys of "
                f"{block.name if block else request.matrix.name} cannot be observed: it does not "
                "call transformers' attention look-up; use rope='ignored'."
            )
        head = self.heads.get(block.module)
        if head is None:
            path = paths[block.module]
            readers = self.tokens.reader(path), self.tokens.reader(path, memory=block.cross)
            head = self.heads[block.module] = _Head(block, path, [], *readers)
        head.requests.append(request)

    def _watch_rotation(self, head: _Head) -> None:
        """See the cosines and sines that an attention is called with, or that its child makes."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.enabled:
                head.unrotated = kwargs.get("position_embeddings", head) is None
                found = map(_as_rotation, (kwargs.get("position_embeddings"), *args))
                head.rotation = next((pair for pair in found if pair is not None), None)

        def see_child(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.enabled:
                head.rotation = _as_rotation(output) or head.rotation

        module = head.block.module
        self.handles.append(module.register_forward_pre_hook(Hook(see), with_kwargs=True))
        for child in module.modules():
            if child is not module and "rotary" in type(child).__name__.lower():
                self.handles.append(child.register_forward_hook(Hook(see_child)))

    def _observe(self, module: nn.Module, call: Call) -> None:
        """Take what one attention call brings, to be staged when its gradient comes."""
        if not self.enabled or not module.training or not torch.is_grad_enabled():
            return
        output = call.output
        if not output.requires_grad:
            return
        head = self.heads[module]
        with torch.no_grad(), no_autocast(output.device):
            parts = self._parts(head, call.query.detach(), call.key.detach())
            parts += self._entropy_parts(head, call)
        done: list[bool] = []

        def stage(gradient: Tensor) -> None:
            if not done:
                done.append(True)
                for part in parts:
                    self.stage.add(part)

        output.register_hook(stage)

    def _parts(self, head: _Head, query: Tensor, key: Tensor) -> list[Part]:
        double = query.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        heads = head.block.heads
        if key.shape[1] == heads.query:
            key = key[:, :: heads.group]
        parts = []
        for kind, vectors, reader in (("query", query, head.queries), ("key", key, head.memory)):
            for center in sorted({r.center for r in head.requests if r.kind == kind}):
                batch, _, length, size = vectors.shape
                weights = reader.read((batch, length, size), dtype)
                rows = vectors.to(dtype)
                spread = None if weights is None else weights[:, None].expand(rows.shape[:-1])
                if center:
                    rows = centred(rows, spread)
                total = moment(rows, spread, constant=False).sum(0)
                count = count_of(batch * length, weights, rows)
                parts.append(Part(_name(head, kind, center), total, count))
        if head.averaged:
            parts.append(self._rotation_part(head, query, dtype))
        return parts

    def _entropy_parts(self, head: _Head, call: Call) -> list[Part]:
        """Sums over the query positions, at most ``rows`` of a sequence, per head."""
        from hf_precond.statistics.attention_entropy import entropies, spaced

        parts = []
        batch, _, length, size = call.query.shape
        for request in head.requests:
            if request.kind != "entropy":
                continue
            positions = spaced(length, request.rows)
            found = entropies(head.block.module, call, positions)
            weights = head.queries.read((batch, length, size), found.dtype)
            weights = found.new_ones(batch, length) if weights is None else weights
            weights = weights[:, positions]
            # A padded position may see nothing at all: its entropy is not finite.
            seen = found.masked_fill(weights[:, None] == 0, 0)
            total = (seen * weights[:, None]).sum((0, 2))
            parts.append(Part(_name(head, "entropy", False), total, weights.sum()))
        return parts

    def _rotation_part(self, head: _Head, query: Tensor, dtype: torch.dtype) -> Part:
        """Sums over the query positions of products of cosines and sines."""
        batch, _, length, size = query.shape
        seen = head.rotation
        if seen is None and head.unrotated:
            seen = _Rotation(query.new_ones(1, 1, size), query.new_zeros(1, 1, size))
        if seen is None or seen.cos.dim() != 3 or seen.cos.shape[0] not in (1, batch):
            raise RuntimeError(
                f"{head.path}: the rotation of its queries and keys cannot be read (it is called "
                "without position_embeddings of one cosine and sine a position, and has no rotary "
                "module of its own); use rope='ignored'."
            )
        if head.layout is None:
            layout = read_layout(head.block.module, size, seen.cos)
            head.layout = (interleaved(size) if seen.paired else layout).to(query.device)
        cos = seen.cos.to(dtype).expand(batch, -1, -1)
        sin = seen.sin.to(dtype).expand(batch, -1, -1)
        if cos.shape[1] < length:  # tokens in front that are not rotated (class tokens)
            front = length - cos.shape[1]
            cos = torch.nn.functional.pad(cos, (0, 0, front, 0), value=1.0)
            sin = torch.nn.functional.pad(sin, (0, 0, front, 0))
        # Vision towers call their kernel once an image, with the positions of all images at hand.
        positions = cos.shape[1]
        weights = head.queries.read((batch, positions, size), dtype)
        total = tables(head.layout, cos, sin, weights)
        return Part(f"{head.path}:rotation", total, count_of(batch * positions, weights, total))

    def get(self, request: MomentRequest) -> Statistic | None:
        """The staged answer to a request."""
        assert request.attention is not None
        head = self.heads[request.attention.module]
        found = self.stage.get(_name(head, request.kind, request.center))
        if found is None or not request.average_rotation:
            return found
        rotation = self.stage.get(f"{head.path}:rotation")
        assert rotation is not None and head.layout is not None
        mean = rotation.sum / rotation.count.clamp(min=1)
        return Statistic(average(head.layout, found.sum, mean), found.count)

    def enable(self, due: bool) -> None:
        """Collect, or not."""
        self.enabled = due
        if self.observation is not None:
            self.observation.enable(due)

    def close(self) -> None:
        """Remove the hooks, and the observer of the attention look-up."""
        self.enabled = False
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.observation is not None:
            self.observation.close()
            self.observation = None


def _name(head: _Head, kind: str, center: bool) -> str:
    return f"{head.path}:{kind}{':centred' if center else ''}"


def _as_rotation(value: Any) -> _Rotation | None:
    """A pair of cosines and sines, or complex numbers, as an attention is given them."""
    if isinstance(value, Tensor) and value.is_complex() and value.dim() in (2, 3):
        cos, sin = from_complex(value.detach())
        return _Rotation(_lead(cos), _lead(sin), paired=True)
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not all(isinstance(part, Tensor) and part.dim() in (2, 3, 4) for part in value):
        return None
    if value[0].shape != value[1].shape or not value[0].is_floating_point():
        return None
    return _Rotation(_lead(value[0].detach()), _lead(value[1].detach()))


def _lead(part: Tensor) -> Tensor:
    """Cosines or sines as ``[B or 1, positions, width]``, where they are one a position."""
    if part.dim() == 4:  # [B, 1, N, width] or [B, N, 1, width]
        part = part.squeeze(1) if part.shape[1] == 1 else part.squeeze(2)
    return part.unsqueeze(0) if part.dim() == 2 else part
