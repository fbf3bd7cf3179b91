"""Which backward passes count: those that reach the gradients of the parameters that train."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_precond.architectures.modules import stepped_weight
from hf_precond.compat.torch_internals import (
    is_transformed,
    keeps_graph,
    transforming,
    untransformed,
    will_run,
)
from hf_precond.statistics.requests import Statistic

Kind = Literal["trained", "returned"]
"""Of a backward pass: it adds to ``.grad``; or it hands the gradients out."""


class StatisticsBuffer:
    """Sums and counts by key, until the optimizer's step takes them.

    Those of passes that hand gradients out (``torch.autograd.grad`` of the
    parameters, ``torch.func``) are kept apart. A loop may assign them to
    ``.grad``; but beside passes that reach ``.grad`` they are of something
    else, as the gradients of single samples are.

    Attributes:
        statistics: by key, of passes that reached ``.grad``.
        returned: of passes that handed gradients out.
        epoch: how often the buffer was emptied.
    """

    def __init__(self) -> None:
        self.statistics: dict[Hashable, Statistic] = {}
        self.returned: dict[Hashable, Statistic] = {}
        self.epoch = 0

    def add(self, key: Hashable, statistic: Statistic, kind: Kind = "trained") -> None:
        """Adds to a sum and its count; the first statistic of a key becomes the buffer's own.

        Args:
            key: of the sum.
            statistic: what is added.
            kind: of the pass that brought it.
        """
        if is_transformed(statistic.sum):
            statistic = Statistic(*untransformed(statistic.sum, statistic.count))
        elif kind == "returned":  # a pass that counts may follow and bring the same tensors
            statistic = Statistic(statistic.sum.clone(), statistic.count.clone())
        sums = self.statistics if kind == "trained" else self.returned
        held = sums.setdefault(key, statistic)
        if held is statistic:
            return
        if transforming():  # where nothing outside may be changed in place
            total, count = held.sum + statistic.sum, held.count + statistic.count
            sums[key] = Statistic(*untransformed(total, count))
        else:
            held.sum.add_(statistic.sum)
            held.count.add_(statistic.count)

    @property
    def answers(self) -> dict[Hashable, Statistic]:
        """What counts, by key."""
        return self.statistics or self.returned

    def get(self, key: Hashable) -> Statistic | None:
        """Returns what was added and counts, or ``None`` when nothing was.

        Args:
            key: of the sum.
        """
        return self.answers.get(key)

    def clear(self) -> None:
        """Forgets everything."""
        self.epoch += 1
        self.statistics.clear()
        self.returned.clear()


class PassKind:
    """Tells of what kind a backward pass through a call is; made in the forward pass.

    Args:
        layer: whose weight is to get a gradient.
        around: where the weight is frozen, the module whose parameters are to get one.
    """

    def __init__(self, layer: nn.Module | None, around: nn.Module | None) -> None:
        self.transformed = transforming()  # no node adds to weights outside torch.func
        self.nodes: Sequence[Node] = ()
        if not self.transformed:
            own = None if layer is None else stepped_weight(layer)
            candidates = [] if own is None or not own.requires_grad else [own]
            if not candidates and around is not None:
                candidates = [p for p in around.parameters() if p.requires_grad]
            edges = (torch.autograd.graph.get_gradient_edge(p) for p in candidates if p.is_leaf)
            self.nodes = [edge.node for edge in edges]

    def of_pass(self) -> Kind | None:
        """The kind of the pass under way; ``None`` for one that brings these weights nothing."""
        if self.transformed:
            return "returned"
        runs = [will_run(node) for node in self.nodes]
        if any(runs) or not runs:
            return "trained"
        return "returned" if None in runs else None


class OutputGradAccumulator:
    """The output gradient of a call, over several backward passes.

    A graph that is kept may be run backward several times. Two losses whose
    backward passes follow each other are one loss; ``torch.autograd.grad`` of
    something else (a gradient penalty, the norm of a task's gradient) trains
    nothing.

    Args:
        kind: tells the kinds of the passes.
    """

    def __init__(self, kind: PassKind) -> None:
        self.kind = kind
        self.totals: dict[Kind, Tensor | None] = {}
        self.epochs: dict[Kind, int] = {}  # of the buffer; what was added in earlier ones is gone

    def add(self, gradient: Tensor, epoch: int) -> tuple[Kind, Tensor, Tensor | None] | None:
        """Adds the output gradient of one backward pass.

        Args:
            gradient: of the output.
            epoch: of the buffer, now.

        Returns:
            The kind of the pass, the gradient of all passes of that kind, and the one that it
            replaces; ``None`` where this pass changes nothing.
        """
        kind = self.kind.of_pass()
        if kind is None:
            return None
        before = None
        if kind in self.totals:
            before = self.totals[kind]
            if before is None or epoch != self.epochs[kind]:
                return None
            gradient = before + gradient
        self.epochs[kind] = epoch
        # Only where the graph is kept can another pass come.
        self.totals[kind] = gradient if keeps_graph() else None
        return kind, gradient, before


def on_gradient(output: Tensor, function: Callable[[Tensor], None]) -> None:
    """Calls a function with the gradient of an output as it is now, in each backward pass.

    Also where the output is changed in place afterwards: a hook on a view (which
    a biased linear layer returns) would then not be called, so that of the
    tensor which it is a view of is.

    Args:
        output: of a layer.
        function: takes its gradient.
    """
    base = None if is_transformed(output) or not output._is_view() else output._base
    if base is None or not base.requires_grad or base.is_leaf or not base.is_contiguous():
        output.register_hook(function)
        return
    shape, strides = output.shape, output.stride()
    offset = output.storage_offset() - base.storage_offset()

    def of_base(gradient: Tensor) -> None:
        gradient = gradient.contiguous()  # it may be a part of a larger one, as behind cat
        start = gradient.storage_offset() + offset
        function(gradient.as_strided(shape, strides, start))

    base.register_hook(of_base)
