"""Hessian-vector products as differences of gradients, where no graph can be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SMALLEST = 0.3
"""The least rms of parameters that ε is scaled by: some norms store the scale minus 1."""


class DifferenceProduct:
    """``v ↦ H v`` by the four-point central difference of gradients.

    ``(8 (∇L(p + εv) - ∇L(p - εv)) - (∇L(p + 2εv) - ∇L(p - 2εv))) / 12ε``

    with ``ε = (machine epsilon)^(1/3) · max(rms(p), 0.3) / max|v|``: four forward
    and backward passes a product. The error is of order ``ε⁴`` by truncation and
    ``machine epsilon / ε`` by rounding, so parameters must be float32 or
    float64 and the loss not computed under autocast. Kinks (ReLU) that a step
    crosses count as curvature, which exact products do not see: on a small
    batch the two may then have nothing in common.

    All passes draw the same random numbers (dropout) as the next pass of the
    training and restore generators, buffers and gradients; a graph made before
    can still be run backward.

    Args:
        loss_function: runs the model and returns a scalar.
        model: the model, for its buffers and gradients.
        parameters: what H is the Hessian in.

    Attributes:
        reached: of each parameter, whether the loss depends on it; known
            after the first product.

    Raises:
        ValueError: for parameters of lower precision than float32.
    """

    def __init__(
        self,
        loss_function: Callable[[], Tensor],
        model: nn.Module,
        parameters: Sequence[Tensor],
    ) -> None:
        for parameter in parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"sgdph: finite differences need float32 norm parameters, and one is "
                    f"{parameter.dtype}; keep the norms (or the model, under autocast in the other "
                    "passes) in float32."
                )
        self.loss_function = loss_function
        self.model = model
        self.parameters = parameters
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
            near = self._difference(start, vectors, step)
            far = self._difference(start, vectors, 2 * step)
        finally:
            _set(self.parameters, start)
        return [(8 * inner - outer) / (12 * step) for inner, outer in zip(near, far, strict=True)]

    def _difference(
        self, start: Sequence[Tensor], vectors: Sequence[Tensor], step: Tensor
    ) -> list[Tensor]:
        """``∇L(p + step v) - ∇L(p - step v)``."""
        plus = self._gradients(start, vectors, step)
        minus = self._gradients(start, vectors, -step)
        return [
            torch.zeros_like(v) if up is None or down is None else (up - down).to(v.dtype)
            for up, down, v in zip(plus, minus, vectors, strict=True)
        ]

    def _step(self, vectors: Sequence[Tensor]) -> Tensor:
        """ε, a 0-d tensor, of all parameters together: a shift alone is often zero."""
        with torch.no_grad():
            number = sum(parameter.numel() for parameter in self.parameters)
            size = torch.stack(torch._foreach_norm(list(self.parameters))).norm()
            largest = torch.stack(torch._foreach_norm(list(vectors), float("inf"))).max()
            relative = torch.finfo(self.parameters[0].dtype).eps ** (1 / 3)
            return relative * (size / number**0.5).clamp(min=SMALLEST) / largest

    def _gradients(
        self, start: Sequence[Tensor], vectors: Sequence[Tensor], step: Tensor
    ) -> list[Tensor | None]:
        moved = [origin + step * v for origin, v in zip(start, vectors, strict=True)]
        _set(self.parameters, moved)
        with _undisturbed(self.model):
            # Not autograd.grad: reentrant checkpointing allows backward() alone.
            with torch.enable_grad():
                self.loss_function().backward()
            gradients = [parameter.grad for parameter in self.parameters]
        self.reached = [
            known or gradient is not None
            for known, gradient in zip(self.reached, gradients, strict=True)
        ]
        return gradients


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores gradients, buffers and random generators."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffers = list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    devices = {p.device.index for p in parameters if p.is_cuda}
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        _set(buffers, kept)


def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Changes values but not the tensors' versions: in the end the values are restored."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
