"""Collects second moments from a model's passes: inputs, output gradients, queries and keys."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.modules import CONVOLUTIONS, is_linear
from hf_precond.architectures.peft import wrappers_of
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.compat.torch_internals import (
    EagerCode,
    Hook,
    is_transformed,
    keeps_graph,
    transforming,
    untransformed,
    will_run,
)
from hf_precond.statistics.attention_heads import HEADS, HeadMoments
from hf_precond.statistics.moments import (
    Collection,
    Part,
    Spares,
    input_of,
    input_part,
    multihead_inner,
    multihead_role,
    multihead_weights,
    no_autocast,
    output_part,
    output_rows,
    patch_part,
)
from hf_precond.statistics.requests import MomentRequest, Statistic, StatisticsSource
from hf_precond.statistics.token_weights import Reader, TokenWeights


class StatisticsBuffer:
    """Sums and counts by collection."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.spares = Spares()
        self.owed: dict[str, Tensor] = {}
        self.lent: list[Tensor] = []
        self.epoch = 0  # counts how often it was emptied

    def add(self, part: Part) -> None:
        """Add what one call brought."""
        if is_transformed(part.sum):
            part = Part(part.collection, *untransformed(part.sum, part.count))
        if part.collection in self.sums:
            self.sums[part.collection].add_(part.sum)
            self.counts[part.collection].add_(part.count)
            if part.spare:
                self.spares.give(part.sum)
        else:
            self.sums[part.collection] = part.sum
            self.counts[part.collection] = part.count.clone()
            if part.spare:
                self.owed[part.collection] = part.sum

    def get(self, collection: str) -> Statistic | None:
        """What was added to a collection, or ``None`` when nothing was."""
        if collection not in self.sums:
            return None
        return Statistic(self.sums[collection], self.counts[collection])

    def lend(self) -> None:
        """Forget everything; whoever got it may keep it until :meth:`recycle`, if that comes."""
        self.lent = list(self.owed.values())
        self.owed.clear()
        self.clear()

    def recycle(self) -> None:
        """Use the memory of what was last lent for the next sums."""
        for matrix in self.lent:
            self.spares.give(matrix)
        self.lent = []

    def clear(self) -> None:
        """Forget everything."""
        for matrix in self.owed.values():
            self.spares.give(matrix)
        self.epoch += 1
        self.owed.clear()
        self.sums.clear()
        self.counts.clear()


class OutputGradAccumulator:
    """What of a call's output gradient trains its layer.

    A graph that is kept may be gone through several times: two losses whose
    backward passes follow each other are one loss, and ``torch.autograd.grad``
    of something else (a gradient penalty, the norm of a task's gradient) is
    none that is trained.

    Args:
        layer: the layer.
        epoch: of the stage; what was staged in another is gone.
    """

    def __init__(self, layer: nn.Module, epoch: int) -> None:
        self.node = _accumulator(getattr(layer, "weight", None))
        self.epoch = epoch
        self.total: Tensor | None = None
        self.staged = False
        self.asked = False  # by autograd.grad only, so far

    def add(self, gradient: Tensor, epoch: int) -> tuple[Tensor, Tensor | None] | None:
        """Take the gradient of one backward pass.

        Args:
            gradient: of the output.
            epoch: of the stage, now.

        Returns:
            The gradient to be staged, and the one staged before, which it
            replaces; ``None`` where this pass changes nothing.
        """
        trains = self._trains()
        before, kept = self.total, keeps_graph()
        if trains is False:
            return None
        if self.staged:
            if before is None or epoch != self.epoch or (trains is None and not self.asked):
                return None
            if not (self.asked and trains):
                gradient = before + gradient
        self.asked = trains is None
        self.staged, self.epoch = True, epoch
        # Only where the graph is kept can another pass come.
        self.total = gradient if kept else None
        return gradient, before

    def _trains(self) -> bool | None:
        """Whether this pass adds to the weight's gradient; ``None`` where it is handed out."""
        if self.node is None:
            return True
        return will_run(self.node)


def _accumulator(weight: Any) -> torch.autograd.graph.Node | None:
    """The node that adds to a weight's gradient; ``None`` for one without."""
    if not isinstance(weight, Tensor) or not weight.requires_grad or not weight.is_leaf:
        return None
    if transforming():  # inside torch.func no node adds to weights outside
        return None
    return torch.autograd.graph.get_gradient_edge(weight).node


@dataclass
class _Known:
    tensor: weakref.ref[Tensor]
    version: int
    part: Part


class SharedInputs:
    """The last input moments of a pass, by where and how they were taken.

    q, k and v of an attention, or gate and up of an MLP, get the same tensor
    one after the other. :meth:`forget` before anything is staged: what was
    handed out is then changed in place.
    """

    def __init__(self) -> None:
        self._known: dict[Any, _Known] = {}

    def part(self, name: str, kind: Any, inputs: Tensor, compute: Callable[[], Part]) -> Part:
        """The moment of ``inputs``, under a name of its own.

        Args:
            name: the collection's.
            kind: hashable: what two layers must have in common besides the tensor.
            inputs: what the layer was called with.
            compute: computes the part.
        """
        known = self._known.get(kind)
        if known is not None and known.tensor() is inputs and known.version == inputs._version:
            return Part(name, known.part.sum.clone(), known.part.count)
        part = compute()
        self._known[kind] = _Known(weakref.ref(inputs), inputs._version, part)
        return part

    def forget(self) -> None:
        """Hand out nothing that was computed before."""
        self._known.clear()


ALL = (
    "no second moment was collected since the last step: the model ran in evaluation mode "
    "(from_pretrained returns it so), whose passes do not count, and its layers are stepped "
    "without a preconditioner of theirs; call model.train() before the training loop."
)
SOME = (
    "{count} layers ({first}, …) had gradients since the last step from passes in evaluation mode "
    "only, which do not count: they are stepped without a preconditioner of theirs, or with an old "
    "one; call train() on them too, and switch dropout off by its p."
)


class EvalModeMonitor:
    """Notes the layers through whose passes in evaluation mode a gradient went."""

    def __init__(self) -> None:
        self.layers: dict[str, list[str]] = {}

    def watch(self, layer: str, collections: Iterable[str], output: Tensor) -> None:
        """Note a layer if the gradient of a call's output comes.

        Args:
            layer: its name.
            collections: what is collected from its calls in training mode.
            output: of the call.
        """
        names = list(collections)
        output.register_hook(lambda _: self.layers.__setitem__(layer, names))

    def warn(self, staged: Container[str]) -> None:
        """Say of which layers nothing was staged.

        Args:
            staged: names of the collections of which something was.
        """
        missed = [
            layer
            for layer, names in self.layers.items()
            if not any(name in staged for name in names)
        ]
        if missed:
            some = SOME.format(count=len(missed), first=missed[0])
            warnings.warn(some if staged else ALL, stacklevel=3)

    def forget(self) -> None:
        """Begin anew."""
        self.layers.clear()


@dataclass
class _Point:
    """A module that is hooked, and what is collected from its calls."""

    module: nn.Module
    layer: nn.Module
    reader: Reader
    collections: dict[str, Collection] = field(default_factory=dict)


class MomentCollector(StatisticsSource):
    """The source of second moments.

    A forward hook takes the moment of a layer's input, and a hook on its
    output tensor stages that moment when the output's gradient arrives,
    together with the gradient's own. So a pass counts once and only if it is
    trained: passes in ``eval()``, under ``no_grad`` or without a backward
    bring nothing, checkpointed ones (either mode) are counted once, and a
    module that is called several times brings the sum of its calls.

    Rows are weighted by the attention mask (see :class:`TokenWeights`).
    Moments are float32, float64 in float64 models, whatever autocast says.
    Nothing is read from the device.

    ``input`` of a grouped convolution is the sum over its groups too, and so
    is its count. ``output_grad`` of an embedding is ``[d, d]``.

    Args:
        model: the model.
        requests: what is asked for.

    Raises:
        ValueError: for a request that cannot be served, saying why.
    """

    def __init__(self, model: nn.Module, requests: Sequence[MomentRequest]) -> None:
        keys = [request.key for request in requests]
        if len(set(keys)) != len(keys):
            raise ValueError("Capture: two requests have the same key; give each its own.")
        self.requests = list(requests)
        self.stage = StatisticsBuffer()
        self.siblings = SharedInputs()
        self.step = -1
        self.evaluated = EvalModeMonitor()
        self.paths = {module: path for path, module in model.named_modules()}
        self.wrappers = wrappers_of(model)
        self.projections: dict[nn.Module, nn.Module] = {
            m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)
        }
        self.memory = _memory_layers(model)
        self.tokens = TokenWeights(model)
        # Compiled code runs uncompiled on due steps: hooks that act would break its graphs.
        self.switch = EagerCode()
        self.points: dict[nn.Module, _Point] = {}
        self.served: dict[str, str] = {}
        heads = [request for request in self.requests if request.kind in HEADS]
        for request in self.requests:
            if request.kind not in HEADS:
                self._add(request)
        self.heads = HeadMoments(model, heads, self.tokens, self.paths, self.stage)
        self.handles: list[RemovableHandle] = [
            point.module.register_forward_hook(
                Hook(self._make_hook(point)), with_kwargs=True
            )
            for point in self.points.values()
        ]
        # The model holds its hooks, they hold the capture weakly: it ends with its optimizer.
        self._leave = weakref.finalize(
            self, _leave, self.handles, self.tokens, self.heads, self.switch
        )
        self._leave.atexit = False

    # What is hooked -----------------------------------------------------------

    def _add(self, request: MomentRequest) -> None:
        """Find the collection that serves a request, or make it."""
        matrix = self._source(request)
        layer = matrix.module
        if request.kind == "input" and not (
            is_linear(layer) or isinstance(layer, (*CONVOLUTIONS, nn.MultiheadAttention))
        ):
            raise ValueError(
                f"{request.key}: the input of {matrix.name} ({type(layer).__name__}) has no second "
                "moment; ask for those of linear layers and convolutions."
            )
        if request.center and isinstance(layer, CONVOLUTIONS):
            raise ValueError(f"{request.key}: a convolution's patches are no sequence to centre.")
        if request.kind == "output_grad" and isinstance(layer, nn.MultiheadAttention):
            raise ValueError(
                f"{request.key}: the projections of {matrix.name} are inside "
                "nn.MultiheadAttention, which calls no layer whose output gradient could be read."
            )
        module = self.projections.get(layer) or self.wrappers.get(layer, layer)
        if module not in self.paths:
            raise ValueError(f"{request.key}: {matrix.name} is not a layer of this model.")
        point = self.points.get(module)
        if point is None:
            reader = self.tokens.reader(self.paths[module], memory=layer in self.memory)
            point = self.points[module] = _Point(module, layer, reader)
        name = f"{self.paths[module]}:{request.kind}{_variant(request, matrix)}"
        constant = request.kind == "input" and request.matrix.bias is not None
        collection = point.collections.get(name)
        if collection is None:
            collection = Collection(
                name,
                request.kind,
                matrix,
                constant,
                request.center,
                request.blocks,
                request.rows,
            )
            point.collections[name] = collection
        collection.constant |= constant
        self.served[request.key] = name

    def _source(self, request: MomentRequest) -> LayerMatrix:
        """The matrix whose calls answer a request.

        Below the first layer that trains, a frozen layer's output has no
        gradient; a sibling that trains has the same input.
        """
        block, matrix = request.attention, request.matrix
        if request.kind != "input" or block is None or matrix.trains:
            return matrix
        role = next((r for r, m in block.roles().items() if m is matrix), None)
        if role is None or role in block.adapters:
            return matrix
        for sibling in block.readers(block.reads(role)):
            if sibling in block.trainable or sibling in block.adapters:
                return block.roles()[sibling]
        return matrix

    # What is seen -------------------------------------------------------------

    def _make_hook(self, point: _Point) -> Callable[..., None]:
        tokens, reference = self.tokens, weakref.ref(self)

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if not tokens.enabled or not torch.is_grad_enabled():
                return
            result = output[0] if isinstance(output, (tuple, list)) else output
            capture = reference()
            if capture is None or not (isinstance(result, Tensor) and result.requires_grad):
                return
            if module.training:
                capture._observe(point, args, kwargs, result)
            else:
                name = capture.paths[point.module]
                capture.evaluated.watch(name, point.collections, result)

        return hook

    def _observe(
        self, point: _Point, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> None:
        """Take the input moments of a call, to be staged when its gradient comes."""
        dtype = moment_dtype(point)
        with torch.no_grad(), no_autocast(result.device):
            parts = [
                self._input_part(point, collection, args, kwargs, dtype)
                for collection in point.collections.values()
                if collection.kind == "input"
            ]
            gradients = [c for c in point.collections.values() if c.kind == "output_grad"]
            weights = _output_weights(point, result, dtype) if gradients else None
        arrivals = OutputGradAccumulator(point.layer, self.stage.epoch)

        def stage(gradient: Tensor) -> None:
            found = arrivals.add(gradient.detach(), self.stage.epoch)
            if found is None:
                return
            total, before = found
            self.siblings.forget()
            for part in parts if before is None else ():
                if part is not None:
                    self.stage.add(part)
            for collection in gradients:
                self._stage_gradient(point, collection, total, weights)
                if before is not None:
                    self._stage_gradient(point, collection, before, weights, sign=-1)

        result.register_hook(stage)

    def _stage_gradient(
        self,
        point: _Point,
        collection: Collection,
        gradient: Tensor,
        weights: Tensor | None,
        sign: int = 1,
    ) -> None:
        """Stage the moment of an output gradient; with ``sign`` -1 take it away again."""
        with torch.no_grad(), no_autocast(gradient.device):
            rows = output_rows(point.layer, gradient).to(moment_dtype(point))
            scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
            if scale is not None:
                rows = rows / scale
            part = output_part(collection, rows, weights, self.step, self.stage.spares)
            if sign < 0:
                part.sum.neg_()
                part = replace(part, count=-part.count)
            self.stage.add(part)

    def _input_part(
        self,
        point: _Point,
        collection: Collection,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype,
    ) -> Part | None:
        layer, module = point.layer, point.module
        weights: Tensor | None = None
        if isinstance(module, nn.MultiheadAttention):
            inner = collection.matrix.module is not module
            role = "o" if inner else multihead_role(collection.matrix)
            weights = multihead_weights(module, role, args, kwargs)
            inputs = (
                multihead_inner(module, args, kwargs)
                if role == "o"
                else input_of(module, collection.matrix, args, kwargs)
            )
        else:
            inputs = input_of(module, collection.matrix, args, kwargs)
        if inputs is None:
            return None
        spares, step = self.stage.spares, self.step
        if isinstance(layer, CONVOLUTIONS):
            return patch_part(collection, layer, inputs.detach().to(dtype), step, spares)
        if weights is not None:
            rows = inputs.detach().to(dtype)
            return input_part(collection, rows, weights.to(dtype), step, spares)

        def compute() -> Part:
            masked = point.reader.read(tuple(inputs.shape), dtype)
            return input_part(collection, inputs.detach().to(dtype), masked, step, spares)

        # Layers of one parent read the same mask.
        parent = self.paths[module].rpartition(".")[0]
        kind = (parent, point.reader.memory, dtype, *collection.variant)
        return self.siblings.part(collection.name, kind, inputs, compute)

    # The StatisticsSource -----------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether the passes under way are collected."""
        return self.tokens.enabled

    def enable(self, due: bool, step: int) -> None:
        """Collect (or not) in the passes before the optimizer's step number ``step``.

        What was staged for another step is forgotten.
        """
        if step != self.step:
            self.stage.clear()
        self.step = step
        self.evaluated.forget()
        self.tokens.enabled = due
        self.heads.enable(due)
        self.switch.expect(due)
        if not due:
            self.tokens.forget()
            self.siblings.forget()

    def take(self) -> dict[str, Statistic]:
        """What was staged since the last call, by request key; the stage is empty afterwards.

        Warns of layers that were trained in evaluation mode only.
        """
        taken: dict[str, Statistic] = {}
        for request in self.requests:
            if request.kind in HEADS:
                found = self.heads.get(request)
            else:
                found = self.stage.get(self.served[request.key])
                if found is not None and request.kind == "input" and request.blocks == 1:
                    size = request.matrix.columns
                    found = Statistic(found.sum[:size, :size], found.count)
            if found is not None:
                taken[request.key] = found
        self.evaluated.warn(self.stage.sums)
        self.evaluated.forget()
        self.stage.lend()
        self.tokens.forget()
        return taken

    def recycle(self) -> None:
        """Nobody reads any more what was last taken: its memory serves the next sums."""
        self.stage.recycle()

    def drop(self) -> None:
        """Forget what was staged (a skipped step)."""
        self.evaluated.forget()
        self.stage.clear()

    def close(self) -> None:
        """Remove every hook."""
        self._leave()
        self.stage.clear()
        self.stage.spares.clear()


def _leave(
    handles: list[RemovableHandle],
    tokens: TokenWeights,
    heads: HeadMoments,
    switch: EagerCode,
) -> None:
    """What :meth:`MomentCollector.close` undoes, also when it is collected as garbage."""
    for handle in handles:
        handle.remove()
    handles.clear()
    tokens.close()
    heads.close()
    switch.release()


def moment_dtype(point: _Point) -> torch.dtype:
    """float64 where the layer's weight is, float32 elsewhere."""
    for parameter in point.layer.parameters():
        return torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.float32


def _output_weights(point: _Point, result: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the rows of an output count for; ``None`` for 1 each."""
    if isinstance(point.layer, CONVOLUTIONS):
        return None
    return point.reader.read(tuple(result.shape), dtype)


def _memory_layers(model: nn.Module) -> set[nn.Module]:
    """Layers that read the other sequence of a cross-attention: its keys and values."""
    crossed = [block for block in find_attention(model) if block.cross]
    return {m.module for block in crossed for m in (block.k, block.v)} - {
        block.q.module for block in crossed
    }


def _variant(request: MomentRequest, matrix: LayerMatrix) -> str:
    """What tells collections of one module and kind apart."""
    thin = f":{request.rows} rows" if request.rows else ""
    if request.kind == "output_grad":
        return thin + (f":{matrix.rows}" if matrix.rows is not None else "")
    role = (
        f":{multihead_role(matrix)}" if isinstance(matrix.module, nn.MultiheadAttention) else ""
    )
    blocks = f":{request.blocks} of {request.matrix.columns}" if request.blocks > 1 else ""
    return role + (":centred" if request.center else "") + blocks + thin
