"""Hessian-vector products as differences of gradients, where no graph can be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_precond.statistics.recorded_losses import RandomState, snapshot

SMALLEST = 0.3
"""The least rms of parameters that h is scaled by: some norms store the scale minus 1."""

STIFFNESS = 40.0
"""The error of a difference is about 40 h² by truncation and machine epsilon / h by rounding.

Measured on tiny BERT, ViT and Llama: 5 h² with initial weights, 130 h² with large ones.
"""


def machine_epsilon(modules: Iterable[nn.Module], autocast: torch.dtype | None = None) -> float:
    """Returns the machine epsilon of the least precise format that modules compute in.

    float32 at best, in which models of float64 too take softmax or a norm.
    Quantised weights are computed with in bfloat16, as far as is known here.

    Args:
        modules: the modules.
        autocast: the dtype of autocast, if they run under it.
    """
    dtypes = {parameter.dtype for module in modules for parameter in module.parameters()}
    known = {d if d.is_floating_point and d.itemsize > 1 else torch.bfloat16 for d in dtypes}
    return max(torch.finfo(d).eps for d in (torch.float32, autocast or torch.float32, *known))


class DifferenceProduct:
    """``v ↦ H v`` by the central difference of gradients.

    ``(∇L(p + hv) - ∇L(p - hv)) / 2h`` with
    ``h = (machine epsilon / 40)^(1/3) · max(rms(p), 0.3) / max|v|``, rounded to
    a power of 2: two forward and backward passes a product. ``h max|v|`` is
    about 0.002 for norms around 1 in float32, 0.06 in bfloat16. The relative
    error is below 1e-3 in float32; where anything is computed in bfloat16 it is
    a few percent, a quarter on stiff losses. Kinks (ReLU) that a step crosses
    count as curvature, which exact products do not see: on a small batch the
    two may then have nothing in common. What the loss detaches is computed
    again at the moved parameters.

    All passes draw the same random numbers and leave generators, buffers,
    gradients and plain attributes of the modules as they were; a graph made
    before can still be run backward.

    Args:
        run: runs the model and its backward pass, once or over micro-batches.
        modules: everything the passes may run, for its buffers, gradients and
            attributes.
        parameters: what H is the Hessian in.
        epsilon: machine epsilon of the least precise format of the passes.
        owner: the Trainer whose ``compute_loss`` the passes call.

    Attributes:
        reached: of each parameter, whether the loss depends on it; known
            after the first product.
    """

    def __init__(
        self,
        run: Callable[[], None],
        modules: Sequence[nn.Module],
        parameters: Sequence[Tensor],
        epsilon: float,
        owner: Any = None,
    ) -> None:
        self.run = run
        self.modules = {id(part): part for module in modules for part in module.modules()}
        self.parameters = parameters
        self.epsilon = epsilon
        self.owner = owner
        self.reached = [False] * len(parameters)

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Returns H v in the dtype of v, zero where the loss does not depend on a parameter.

        Args:
            vectors: v, one tensor per parameter.
        """
        step = self._step(vectors)
        with torch.no_grad():
            start = [parameter.clone() for parameter in self.parameters]
        try:
            plus = self._gradients(start, vectors, step)
            minus = self._gradients(start, vectors, -step)
        finally:
            _set(self.parameters, start)
        return [
            torch.zeros_like(v)
            if up is None or down is None
            else (up.to(v.dtype) - down.to(v.dtype)) / (2 * step.to(v.device))
            for up, down, v in zip(plus, minus, vectors, strict=True)
        ]

    def _step(self, vectors: Sequence[Tensor]) -> Tensor:
        """h, a 0-d tensor, of all parameters together: a shift alone is often zero."""
        with torch.no_grad():
            number = sum(parameter.numel() for parameter in self.parameters)
            pairs = zip(self.parameters, vectors, strict=True)
            norms = torch._foreach_norm([parameter.to(v) for parameter, v in pairs])
            maxima = torch._foreach_norm(list(vectors), float("inf"))
            device = vectors[0].device
            size = torch.stack([norm.to(device) for norm in norms]).norm()
            largest = torch.stack([maximum.to(device) for maximum in maxima]).max()
            relative = (self.epsilon / STIFFNESS) ** (1 / 3)
            step = relative * (size / number**0.5).clamp(min=SMALLEST) / largest
            return step.log2().round().exp2()  # bfloat16 holds p + hv exactly then, if p is near 1

    def _gradients(
        self, start: Sequence[Tensor], vectors: Sequence[Tensor], step: Tensor
    ) -> list[Tensor | None]:
        pairs = zip(start, vectors, strict=True)
        _set(self.parameters, [p.to(v) + step.to(v.device) * v for p, v in pairs])
        with self.undisturbed(), torch.enable_grad():
            # Not autograd.grad: reentrant checkpointing and GradCache work in backward() alone.
            self.run()
            gradients = [parameter.grad for parameter in self.parameters]
        self.reached = [
            known or gradient is not None
            for known, gradient in zip(self.reached, gradients, strict=True)
        ]
        return gradients

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leaves gradients, buffers, plain attributes and random generators as they were.

        Gradients of other parameters are freed as they come.
        """
        parts = self.modules.values()
        found = [*self.parameters, *(p for part in parts for p in part.parameters(recurse=False))]
        trained = {id(p): p for p in found if p.requires_grad}.values()
        wanted = {id(parameter) for parameter in self.parameters}
        gradients = [(parameter, parameter.grad) for parameter in trained]
        # An integer matrix is a quantised weight; no pass changes it.
        buffers = {
            id(b): b
            for part in parts
            for b in part.buffers(recurse=False)
            if b.is_floating_point() or b.dim() < 2
        }.values()
        kept = [buffer.clone() for buffer in buffers]
        with ExitStack() as stack:
            stack.callback(RandomState(trained).restore)
            stack.callback(snapshot(parts, self.owner))
            stack.callback(_set, list(buffers), kept)
            for parameter, gradient in gradients:
                stack.callback(setattr, parameter, "grad", gradient)
                parameter.grad = None
                if id(parameter) not in wanted:
                    handle = parameter.register_post_accumulate_grad_hook(_free)
                    stack.callback(handle.remove)
            for part in parts:
                if isinstance(part, DistributedDataParallel):
                    # Ranks differ in their products until these are averaged, like gradients.
                    synced = part.require_forward_param_sync
                    stack.callback(setattr, part, "require_forward_param_sync", synced)
                    part.require_forward_param_sync = False
                    stack.enter_context(part.no_sync())
            yield


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Changes values but not the tensors' versions: in the end the values are restored."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
