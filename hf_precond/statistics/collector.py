"""Collects second moments from a model's passes: inputs, output gradients, queries and keys."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_precond.architectures.modules import CONVOLUTIONS, has_adapters, is_linear
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.compat.torch_internals import EagerCode, Hook
from hf_precond.compat.warn import warn
from hf_precond.linalg.products import autocast_dtype, compute_dtype, without_autocast
from hf_precond.statistics.functional import FixedWeights, FunctionalCalls
from hf_precond.statistics.moments import (
    Collection,
    as_rows,
    multihead_input,
    multihead_role,
    output_rows,
    patch_moment,
    second_moment,
)
from hf_precond.statistics.passes import (
    OutputGradAccumulator,
    PassKind,
    StatisticsBuffer,
    on_gradient,
)
from hf_precond.statistics.requests import HEAD_KINDS, MomentRequest, Statistic, StatisticsSource
from hf_precond.statistics.shared_inputs import InputCheck, SharedInputs
from hf_precond.statistics.token_weights import Reader, TokenWeights

if TYPE_CHECKING:
    from hf_precond.statistics.experts import Segments

EVAL_ALL = (
    "no second moment was collected since the last step: the model ran in evaluation mode "
    "(from_pretrained returns it so), whose passes do not count, and its layers are stepped "
    "without a preconditioner of theirs; call model.train() before the training loop."
)
EVAL_SOME = (
    "{count} layers ({first}, …) had gradients since the last step from passes in evaluation mode "
    "only, which do not count: they are stepped without a preconditioner of theirs, or with an old "
    "one; call train() on them too, and switch dropout off by its p."
)


@dataclass
class HookedLayer:
    """A module that is hooked, and what is collected from its calls.

    Args:
        module: what is hooked: the layer, or what wraps or calls it.
        layer: the layer.
        path: of the module.
        reader: of the token weights.
        attention: the attention around it, where one is known.
        collections: by key.
    """

    module: nn.Module
    layer: nn.Module
    path: str
    reader: Reader | FixedWeights
    attention: nn.Module | None = None
    collections: dict[Hashable, Collection] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """float64 where the layer's weight is, float32 elsewhere."""
        own = [p for p in self.layer._parameters.values() if p is not None]  # parameters() is slow
        first = own[0] if own else next(self.layer.parameters(), None)
        return torch.float32 if first is None else compute_dtype(first.dtype)

    def fits(self, inputs: Any, output: Tensor) -> bool:
        """Whether a call has the widths of the layer's weight; a subclass may do anything.

        Args:
            inputs: its first argument.
            output: what it returned.
        """
        layer = self.layer
        if isinstance(layer, CONVOLUTIONS):
            channel = -len(layer.kernel_size) - 1
            entered = inputs.shape[channel] if isinstance(inputs, Tensor) else layer.in_channels
            return (entered, output.shape[channel]) == (layer.in_channels, layer.out_channels)
        if not is_linear(layer):
            return True
        matrix = next(iter(self.collections.values())).matrix
        rows = matrix.shape[0] if matrix.rows is None else matrix.rows.total
        return output.shape[-1] == rows


OutputMoments = Callable[
    ["MomentCollector", HookedLayer, Tensor], Iterable[tuple[Hashable, Statistic]]
]
"""The moments of an output's gradient, with their keys."""


class MomentCollector(StatisticsSource):
    """The source of second moments.

    A forward hook computes the moment of a layer's input, and a hook on its
    output tensor adds that moment to the buffer when the output's gradient
    arrives, together with the gradient's own. So a pass counts once and only if
    it is trained: passes in ``eval()``, under ``no_grad`` or without a backward
    add nothing, checkpointed ones (either mode) are counted once, and a module
    that is called several times adds the sum of its calls.

    Rows are weighted by the attention mask (see :class:`TokenWeights`).
    Moments are float32, float64 in float64 models, also under autocast.
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
            raise ValueError("MomentCollector: two requests have the same key; give each its own.")
        self.requests = list(requests)
        self.enabled = False
        self.step = -1
        self.buffer = StatisticsBuffer()
        self.shared = SharedInputs()
        self.evaluated: set[str] = set()  # paths of those with gradients in evaluation mode
        self.called: set[nn.Module] = set()  # since the last statistics were taken
        self.reasons: dict[str, str] = {}  # why a request had no answer
        self.tokens = TokenWeights(model)
        # Compiled code runs uncompiled on due steps: hooks that act would break its graphs.
        self.switch = EagerCode()
        self.layers: dict[nn.Module, HookedLayer] = {}
        self.served: dict[str, Hashable] = {}
        self.heads = None
        # The model holds its hooks, they hold the collector weakly: it ends with its optimizer.
        leave = ExitStack()
        leave.callback(self.tokens.close)
        leave.callback(self.switch.release)
        paths = {module: path for path, module in model.named_modules()}
        heads = [request for request in self.requests if request.kind in HEAD_KINDS]
        if heads:
            from hf_precond.statistics.attention_heads import HeadMoments

            self.heads = HeadMoments(heads, self.tokens, paths, self.buffer)
            leave.callback(self.heads.close)
        wrappers = _wrappers(model)
        self.stacks: dict[tuple[nn.Module, str], HookedLayer] = {}
        self._add(paths, wrappers)
        for hooked in self.layers.values():
            hook = Hook(self._after_forward, hooked)
            # First, since a hook of the user's own may return something else.
            handle = hooked.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            leave.callback(handle.remove)
        self.inputs = InputCheck(self.requests, wrappers, self.tokens)
        leave.callback(self.inputs.close)
        self.functions = FunctionalCalls(self.layers, self._observe_function, self.switch)
        if self.stacks or any("expert" in hooked.path.lower() for hooked in self.layers.values()):
            from hf_precond.statistics.experts import ExpertCalls, is_seen

            stacks, masked = list(self.stacks.values()), self.tokens.masked
            self.functions.experts = ExpertCalls(stacks, masked, self._observe_experts)
            self.functions.experts_see = is_seen
        self.watching = True  # the first time, and while there is something to see
        leave.callback(self.functions.leave)
        self._leave = weakref.finalize(self, leave.close)
        self._leave.atexit = False

    # What is hooked -----------------------------------------------------------

    def _add(self, paths: dict[nn.Module, str], wrappers: Mapping[nn.Module, nn.Module]) -> None:
        """Finds or makes the collections that serve the requests for inputs and gradients."""
        for request in self.requests:
            if request.kind in HEAD_KINDS:
                continue
            matrix = _source(request)
            layer = matrix.module
            _refuse(request, matrix)
            module = wrappers.get(layer, layer)
            if module not in paths:
                raise ValueError(f"{request.key}: {matrix.name} is not a layer of this model.")
            place: Any = (module, matrix.weight) if matrix.stack else module
            held: dict[Any, HookedLayer] = self.stacks if matrix.stack else self.layers
            if place not in held:
                reader = self.tokens.reader(paths[module], memory=layer in self.tokens.memory)
                block = request.attention
                around = None if block is None else block.module
                path = matrix.name if matrix.stack else paths[module]
                held[place] = HookedLayer(module, layer, path, reader, around)
            key = held[place].path, *_variant(request, matrix)
            options = (request.blocks, request.rows, request.scale, request.reached)
            new = Collection(request.kind, matrix, False, *options)
            collection = held[place].collections.setdefault(key, new)
            collection.constant |= request.kind == "input" and request.matrix.bias is not None
            self.served[request.key] = key

    # What passes bring --------------------------------------------------------

    def _after_forward(
        self,
        hooked: HookedLayer,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if not self.enabled or not torch.is_grad_enabled():
            return
        self.called.add(module)
        self.functions.inside.discard(module)
        result = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(result, Tensor) or not result.requires_grad:
            return
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        if module not in self.functions.unlike and hooked.fits(inputs, result):
            self._observe_call(hooked, args, kwargs, result)
        else:
            self.functions.unlike.add(module)

    def _observe_function(
        self, hooked: HookedLayer, inputs: Tensor, result: Tensor, transposed: bool
    ) -> None:
        """Collects from a function that was given a layer's weight."""
        if self.enabled and result.requires_grad:
            self.called.add(hooked.module)
            self._observe_call(hooked, (inputs,), {}, result, transposed)

    def _observe_call(
        self,
        hooked: HookedLayer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
        transposed: bool = False,
    ) -> None:
        if hooked.module.training:
            self._observe(hooked, args, kwargs, result, transposed)
        else:
            self._note_evaluated(hooked, result)

    def _note_evaluated(self, hooked: HookedLayer, result: Tensor) -> None:
        """Notes a call in evaluation mode when its gradient comes."""
        evaluated, path = self.evaluated, hooked.path
        on_gradient(result, lambda _: evaluated.add(path))

    def _observe(
        self,
        hooked: HookedLayer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
        transposed: bool = False,
    ) -> None:
        """Computes the input moments of a call, and adds them when its gradient comes."""
        gradients: list[Hashable] = []
        waiting: dict[Hashable, Tensor] = {}
        moments: dict[Hashable, Statistic] = {}
        weights: Tensor | None = None
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        low = autocast_dtype(result.device)
        with torch.no_grad(), without_autocast(result.device):
            for key, collection in hooked.collections.items():
                if collection.kind == "output_grad":
                    gradients.append(key)
                elif collection.reached and _row_by_row(hooked, inputs, result, transposed):
                    waiting[key] = torch.atleast_2d(inputs).detach()
                else:
                    moment = self._input_moment(hooked, collection, args, kwargs, low)
                    if moment is not None:
                        moments[key] = moment
            if (gradients or waiting) and not isinstance(hooked.layer, CONVOLUTIONS):
                shape = result.mT.shape if transposed else result.shape
                weights = self._token_weights(hooked, inputs, tuple(shape))

        def output_moments(
            collector: MomentCollector, hooked: HookedLayer, gradient: Tensor
        ) -> Iterator[tuple[Hashable, Statistic]]:
            if not gradients and not waiting:
                return
            gradient = gradient.detach().mT if transposed else gradient.detach()
            for key, entered in waiting.items():
                collection = hooked.collections[key]
                yield key, collector._reached(hooked, collection, entered, gradient, weights, low)
            rows = output_rows(hooked.layer, gradient) if gradients else gradient
            for key in gradients:
                collection = hooked.collections[key]
                yield key, collector._output_moment(hooked, collection, rows, weights)

        # A call that a function makes comes as a copy, with an input side of its own.
        self._add_at_gradient(self.layers[hooked.module], result, moments, output_moments)

    def _add_at_gradient(
        self,
        hooked: HookedLayer,
        result: Tensor,
        moments: Mapping[Hashable, Statistic],
        output_moments: OutputMoments,
    ) -> None:
        """Adds the input moments of a call, and those of its output's gradient, when that comes.

        The graph holds the collector and the layer weakly: a model that keeps an output, and with
        it the graph, would never be freed.
        """
        around = hooked.attention or hooked.module
        accumulator = OutputGradAccumulator(PassKind(hooked.layer, around))
        held, place = weakref.ref(self), weakref.ref(hooked)

        def add(gradient: Tensor) -> None:
            collector, hooked = held(), place()
            if collector is None or hooked is None:
                return
            buffer = collector.buffer
            changed = accumulator.add(gradient.detach(), buffer.epoch)
            if changed is None:
                return
            kind, total, before = changed
            collector.shared.forget()
            if before is None:
                for key, moment in moments.items():
                    buffer.add(key, moment, kind)
            for key, moment in output_moments(collector, hooked, total):
                buffer.add(key, moment, kind)
            if before is not None:
                for key, replaced in output_moments(collector, hooked, before):
                    buffer.add(key, Statistic(-replaced.sum, -replaced.count), kind)

        on_gradient(result, add)

    def _observe_experts(
        self,
        hooked: HookedLayer,
        inputs: Tensor,
        result: Tensor,
        laid_out: Callable[[Tensor], Tensor],
        segments: Segments,
    ) -> None:
        """Collects from a product with the weights of experts, those of each expert by themselves.

        Args:
            hooked: the stack of their weights.
            inputs: ``[rows, in]``.
            result: as it was returned.
            laid_out: makes ``[rows, out]`` of the result, or of its gradient.
            segments: the rows' experts.
        """
        if not self.enabled or not result.requires_grad:
            return
        self.called.add(hooked.module)
        if not hooked.module.training:
            self._note_evaluated(hooked, result)
            return
        moments: dict[Hashable, Statistic] = {}

        def of(
            collector: MomentCollector, hooked: HookedLayer, kind: str, rows: Tensor
        ) -> Iterator[tuple[Hashable, Statistic]]:
            asked = [each for each in hooked.collections.items() if each[1].kind == kind]
            convert = partial(as_rows, dtype=hooked.dtype)
            with torch.no_grad(), without_autocast(rows.device):
                for expert, own, weights in segments.of(rows) if asked else ():
                    kept = None if weights is None else weights.to(hooked.dtype)
                    for key, collection in asked:
                        if kind == "input":
                            part = second_moment(collection, own, kept, collector.step, convert)
                        else:
                            part = collector._output_moment(hooked, collection, own, kept)
                        yield (key, expert), part

        def output_moments(
            collector: MomentCollector, hooked: HookedLayer, gradient: Tensor
        ) -> Iterator[tuple[Hashable, Statistic]]:
            return of(collector, hooked, "output_grad", laid_out(gradient))

        moments.update(of(self, hooked, "input", inputs.detach()))
        self._add_at_gradient(hooked, result, moments, output_moments)

    def _token_weights(
        self, hooked: HookedLayer, inputs: Any, shape: tuple[int, ...]
    ) -> Tensor | None:
        """The weights of a call's tokens, ``None`` for ones.

        Args:
            hooked: the layer.
            inputs: what it was called with.
            shape: of what the weights are of, input or output.
        """
        experts = self.functions.experts
        if experts is not None and isinstance(inputs, Tensor):
            known, weights = experts.of_layer(hooked, inputs)
            if known:
                self.functions.found = True
                return None if weights is None else weights.to(hooked.dtype)
        return hooked.reader.read(shape, hooked.dtype)

    def _output_moment(
        self,
        hooked: HookedLayer,
        collection: Collection,
        rows: Tensor,
        weights: Tensor | None,
    ) -> Statistic:
        """The moment of output gradients ``[rows, out]``, as they come."""
        with torch.no_grad(), without_autocast(rows.device):
            dtype = hooked.dtype
            convert = partial(as_rows, dtype=dtype)
            if convert(rows.new_empty(0)).dtype == dtype:
                prepare = lambda chosen: self._scaled(convert(chosen), collection)  # noqa: E731
                return second_moment(collection, rows, weights, self.step, prepare)
            # Scaled once summed: half precision has no room for it.
            statistic = second_moment(collection, rows, weights, self.step, convert)
            factor = self._scaled(statistic.sum.new_ones(()), collection)
            return Statistic(statistic.sum * factor.square(), statistic.count)

    def _scaled(self, rows: Tensor, collection: Collection) -> Tensor:
        """Output gradients without the loss scale, and by the factor that was asked for."""
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        rows = rows if scale is None else rows / scale
        return rows if collection.scale == 1 else rows * collection.scale

    def _input_moment(
        self,
        hooked: HookedLayer,
        collection: Collection,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        low: torch.dtype | None,
    ) -> Statistic | None:
        """The moment of what a call brings to a matrix: the layer's own input in most layers."""
        dtype, reader = hooked.dtype, hooked.reader
        if isinstance(hooked.module, nn.MultiheadAttention):
            role = multihead_role(collection.matrix)
            inputs, weights = multihead_input(hooked.module, role, args, kwargs)
            if weights is not None:
                convert = partial(as_rows, dtype=dtype)
                return second_moment(collection, inputs, weights.to(dtype), self.step, convert)
        else:
            inputs = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(inputs, Tensor):
            return None
        inputs = inputs.unsqueeze(0) if inputs.dim() == 1 else inputs
        if isinstance(hooked.layer, CONVOLUTIONS):
            return patch_moment(collection, hooked.layer, inputs.detach().to(dtype), self.step)

        def compute() -> Statistic:
            weights = self._token_weights(hooked, inputs, tuple(inputs.shape))
            rounded = low if is_linear(hooked.layer) else None
            convert = partial(as_rows, dtype=dtype, low=rounded)
            return second_moment(collection, inputs, weights, self.step, convert)

        # Layers of one parent read the same mask.
        parent = hooked.path.rpartition(".")[0]
        variant = (parent, reader.memory, dtype, *collection.variant)
        return self.shared.moment(variant, inputs, compute)

    def _reached(
        self,
        hooked: HookedLayer,
        collection: Collection,
        inputs: Tensor,
        gradient: Tensor,
        weights: Tensor | None,
        low: torch.dtype | None,
    ) -> Statistic:
        """The moment of the tokens of a call whose output has a gradient, as that comes.

        Without padding, which the loss of a span reads too; but a sequence of which it reads
        padding alone keeps that.
        """
        with torch.no_grad(), without_autocast(gradient.device):
            reached = (gradient != 0).any(-1).to(hooked.dtype)
            if weights is not None and reached.dim():
                real = reached * weights.reshape(reached.shape)
                reached = torch.where((real != 0).any(-1, keepdim=True), real, reached)
            convert = partial(as_rows, dtype=hooked.dtype, low=low)
            return second_moment(collection, inputs, reached, self.step, convert)

    # The StatisticsSource -----------------------------------------------------

    def enable(self, due: bool, step: int) -> None:
        """Collects (or not) in the passes before the optimizer's step number ``step``.

        What was collected for another step is forgotten.

        Args:
            due: whether to collect.
            step: the number of the step.
        """
        if step != self.step:
            self.buffer.clear()
        self.step = step
        self.evaluated.clear()
        self.enabled = self.tokens.enabled = due
        self.functions.leave()
        self.tokens.on_pass = self.functions.enter if due and self.watching else None
        if self.heads is not None:
            self.heads.enable(due)
        self.switch.expect(due)
        if not due:
            self.tokens.forget()
            self.shared.forget()

    def take(self) -> dict[str, Statistic]:
        """Returns what was collected since the last call and empties the buffer.

        Warns of layers that were trained in evaluation mode only.

        Returns:
            Statistics by request key.
        """
        corrected = self.inputs.settle()
        self.outdated = bool(corrected)
        if self.heads is not None:
            self.outdated |= self.heads.settle()
            self.heads.share_rotations()
        if self.functions.entered:
            self.functions.leave()
            self.watching = self.functions.found
        taken: dict[str, Statistic] = {}
        waiting = Counter(self.served.values())
        for request in self.requests:
            if request.kind == "input" and request.attention in corrected:
                continue  # it may be of another layer's input
            if request.kind in HEAD_KINDS:
                assert self.heads is not None
                statistic = self.heads.get(request)
            elif request.matrix.stack:
                key = self.served[request.key]
                waiting[key] -= 1
                statistic = self._of_experts(key, request.matrix.stack[0], not waiting[key])
            else:
                statistic = self.buffer.get(self.served[request.key])
                if statistic is not None and request.kind == "input" and request.blocks == 1:
                    size = request.matrix.columns
                    statistic = Statistic(statistic.sum[:size, :size], statistic.count)
            if statistic is not None:
                taken[request.key] = statistic
        unanswered = (r for r in self.requests if r.key not in taken)
        self.reasons = {request.key: self._reason(request) for request in unanswered}
        self._warn_of_evaluation()
        self.drop()
        self.called.clear()
        self.tokens.forget()
        return taken

    def _of_experts(self, key: Hashable, number: int, last: bool) -> Statistic | None:
        """The statistics of every expert of a stack: zeros where one had no tokens.

        Args:
            key: of the stack.
            number: of experts.
            last: the sums of the single experts can be freed.
        """
        answers = self.buffer.answers
        found = [answers.get((key, expert)) for expert in range(number)]
        first = next((statistic for statistic in found if statistic is not None), None)
        if first is None:
            return None
        empty = Statistic(torch.zeros_like(first.sum), torch.zeros_like(first.count))
        held = [empty if statistic is None else statistic for statistic in found]
        sums = torch.stack([statistic.sum for statistic in held])
        counts = torch.stack([statistic.count for statistic in held])
        for expert, statistic in enumerate(found if last else ()):
            if statistic is not None:
                answers[key, expert] = Statistic(statistic.count, statistic.count)
        return Statistic(sums, counts)

    def watch(self) -> None:
        """Looks, when statistics are next collected, for weights that are given to functions."""
        self.watching = True

    def missing(self, key: str) -> str:
        """Returns why a request had no answer the last time; an empty string if it had one.

        Args:
            key: the request's.
        """
        return self.reasons.get(key, "")

    def _reason(self, request: MomentRequest) -> str:
        """Why a request has no answer."""
        if request.kind in HEAD_KINDS:
            return "its attention did not call the kernel that transformers looks up"
        path = str(self.served[request.key][0])  # type: ignore[index]
        hooked = next(h for h in (*self.layers.values(), *self.stacks.values()) if h.path == path)
        if path in self.evaluated:
            return "its passes ran in evaluation mode"
        if hooked.module not in self.called and request.matrix.stack:
            return "no function that is read got its experts' weights (a fused kernel?)"
        if hooked.module not in self.called:
            return "its layer was not called: the weight is used some other way"
        if hooked.module in self.functions.unlike:
            return "its layer computes something else than x Wᵀ"
        return "no gradient reached its layer's output"

    def _warn_of_evaluation(self) -> None:
        keys: Iterable[Any] = self.buffer.answers  # those of experts are pairs
        collected = {key[0] if isinstance(key[0], tuple) else key for key in keys}
        missed = [
            hooked.path
            for hooked in (*self.layers.values(), *self.stacks.values())
            if hooked.path in self.evaluated and collected.isdisjoint(hooked.collections)
        ]
        if missed:
            some = EVAL_SOME.format(count=len(missed), first=missed[0])
            warn(some if collected else EVAL_ALL)

    def drop(self) -> None:
        """Forgets what was collected (a skipped step)."""
        self.evaluated.clear()
        self.buffer.clear()

    def close(self) -> None:
        """Removes every hook."""
        self.enabled = False
        self._leave()
        self.buffer.clear()


def _row_by_row(hooked: HookedLayer, inputs: Any, result: Tensor, transposed: bool) -> bool:
    """Whether each row of a call's output is of the row of its input at the same place."""
    if not isinstance(inputs, Tensor) or isinstance(hooked.module, nn.MultiheadAttention):
        return False
    return inputs.shape[:-1] == (result.mT if transposed else result).shape[:-1]


def _wrappers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The modules that are called instead of a layer: PEFT's wrappers, and torch's attention."""
    wrappers: dict[nn.Module, nn.Module] = {}
    if has_adapters(model):
        from hf_precond.architectures.peft import wrappers_of

        wrappers = wrappers_of(model)
    attentions = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    return wrappers | {attention.out_proj: attention for attention in attentions}


def _source(request: MomentRequest) -> LayerMatrix:
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


def _refuse(request: MomentRequest, matrix: LayerMatrix) -> None:
    """Raises ValueError for what has no such second moment."""
    layer = matrix.module
    if matrix.stack:
        return
    if request.kind == "input" and not (
        is_linear(layer) or isinstance(layer, (*CONVOLUTIONS, nn.MultiheadAttention))
    ):
        raise ValueError(
            f"{request.key}: the input of {matrix.name} ({type(layer).__name__}) has no second "
            "moment; ask for those of linear layers and convolutions."
        )
    if request.reached and not (request.kind == "input" and is_linear(layer)):
        raise ValueError(
            f"{request.key}: which tokens of {matrix.name} have a gradient is known of the inputs "
            "of linear layers alone; ask for the moment of all."
        )
    if request.kind == "output_grad" and isinstance(layer, nn.MultiheadAttention):
        raise ValueError(
            f"{request.key}: the projections of {matrix.name} are inside "
            "nn.MultiheadAttention, which calls no layer whose output gradient could be read."
        )


def _variant(request: MomentRequest, matrix: LayerMatrix) -> tuple[Hashable, ...]:
    """What distinguishes the collections of one module."""
    if request.kind == "output_grad":
        return request.kind, request.rows, matrix.rows, request.scale
    width = request.matrix.columns if request.blocks > 1 else 0
    role = multihead_role(matrix)
    return request.kind, request.rows, role, request.blocks, width, request.reached
