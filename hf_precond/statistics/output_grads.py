"""The gradients of one call's output, over all backward passes through its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack


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
        before, kept = self.total, torch._C._autograd._get_current_graph_task_keep_graph()
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
        try:
            return bool(torch._C._will_engine_execute_node(self.node))
        except RuntimeError:  # autograd.grad with the weight among its inputs
            return None


def _accumulator(weight: Any) -> torch.autograd.graph.Node | None:
    """The node that adds to a weight's gradient; ``None`` for one without."""
    if not isinstance(weight, Tensor) or not weight.requires_grad or not weight.is_leaf:
        return None
    if peek_interpreter_stack() is not None:  # inside torch.func no node adds to weights outside
        return None
    return torch.autograd.graph.get_gradient_edge(weight).node
