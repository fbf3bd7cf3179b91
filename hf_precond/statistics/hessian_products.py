"""Hessian-vector products, by a graph or by differences, and estimates of a Hessian's diagonal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_precond.linalg.transfer import sent

Probe = Literal["rademacher", "ones", "exact"]
Product = Callable[[Sequence[Tensor]], list[Tensor]]
_BROKEN = ("torch::autograd::Error", "WarnNotImplemented")
"""Nodes that stand for a derivative that is not there."""


def _dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if parameter_dtype == torch.float64 else torch.float32


def probe_vectors(parameters: Sequence[Tensor], probe: Probe, step: int) -> list[Tensor]:
    """What the Hessian is multiplied by: ones, or random signs that depend on ``step`` alone.

    The same on every rank and in a resumed run. Drawn for all parameters, on
    the CPU, so that neither the device nor a parameter that is left out
    changes the signs of another.
    """
    if probe != "rademacher":
        return [torch.ones_like(p, dtype=_dtype(p.dtype)) for p in parameters]
    generator = torch.Generator().manual_seed(step)
    total = sum(p.numel() for p in parameters)
    signs = torch.randint(0, 2, (total,), generator=generator).mul_(2).sub_(1)
    sizes = [p.numel() for p in parameters]
    kinds = [(p.device, _dtype(p.dtype)) for p in parameters]
    # One copy to a device, not one a parameter, and none that waits.
    parts = {kind: sent(signs, *kind).split(sizes) for kind in dict.fromkeys(kinds)}
    return [
        parts[kind][place].view(p.shape)
        for place, (kind, p) in enumerate(zip(kinds, parameters, strict=True))
    ]


def diagonal_estimates(
    product: Product, parameters: Sequence[Tensor], probe: Probe, vectors: Sequence[Tensor]
) -> list[Tensor]:
    """The estimate of the diagonal of H's block of each parameter.

    ``rademacher``: ``z ∘ Hz``; ``ones``: ``H 1``; ``exact``: the diagonal,
    one product a channel.

    Args:
        product: v, shaped like the parameters, to H v.
        parameters: what H is the Hessian in.
        probe: the estimator.
        vectors: z or ones, from :func:`probe_vectors`.
    """
    if probe == "exact":
        return _exact_diagonal(product, parameters)
    products = product(vectors)
    if probe == "ones":
        return products
    return [z * hz for z, hz in zip(vectors, products, strict=True)]


def _exact_diagonal(product: Product, parameters: Sequence[Tensor]) -> list[Tensor]:
    units = [torch.zeros_like(p, dtype=_dtype(p.dtype)) for p in parameters]
    diagonals = [torch.zeros_like(unit) for unit in units]
    for number, (unit, diagonal) in enumerate(zip(units, diagonals, strict=True)):
        for channel in range(unit.numel()):
            unit.view(-1)[channel].fill_(1)
            diagonal.view(-1)[channel] = product(units)[number].view(-1)[channel]
            unit.view(-1)[channel].fill_(0)
    return diagonals


class GraphProduct:
    """``v ↦ H v`` through the graph of a loss, which stays usable for its own ``backward``.

    Both derivatives are restricted to ``parameters``; no ``.grad`` is touched.

    Args:
        loss: a scalar with its graph.
        parameters: what H is the Hessian in.
        scale: loss scale: products are computed on ``scale * loss`` and
            divided by it, against underflow in float16.

    Attributes:
        reached: of each parameter, whether the loss depends on it.

    Raises:
        RuntimeError: the graph cannot be differentiated twice.
    """

    def __init__(
        self, loss: Tensor, parameters: Sequence[Tensor], scale: Tensor | float | None = None
    ) -> None:
        self.parameters = parameters
        self.scale = scale
        with differentiable_twice(loss):
            self.gradients = torch.autograd.grad(
                loss if scale is None else loss * scale,
                parameters,
                create_graph=True,
                allow_unused=True,
            )
        self.reached = [gradient is not None for gradient in self.gradients]

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v, in the dtype of v. Zero where the loss does not depend on a parameter."""
        pairs = [
            (gradient, v.to(gradient.dtype))
            for gradient, v in zip(self.gradients, vectors, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(v) for v in vectors]
        products = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            self.parameters,
            grad_outputs=[v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(v) if hv is None else self._unscaled(hv.detach().to(v.dtype))
            for hv, v in zip(products, vectors, strict=True)
        ]

    def _unscaled(self, product: Tensor) -> Tensor:
        return product if self.scale is None else product / self.scale


def _nodes(loss: Tensor) -> Iterator[Any]:
    """Every node of a loss's graph."""
    pending, known = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in known:
            known.add(node)
            yield node
            pending.extend(function for function, _ in node.next_functions)


def depends_on(loss: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether one of the parameters is a leaf of the loss's graph. Computes nothing."""
    wanted = {id(parameter) for parameter in parameters}
    return any(id(getattr(node, "variable", None)) in wanted for node in _nodes(loss))


def recomputes(loss: Tensor) -> bool:
    """Whether part of a loss's graph is made by its backward pass: reentrant checkpointing."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(loss))


@contextmanager
def differentiable_twice(loss: Tensor) -> Iterator[None]:
    """Around a backward pass with ``create_graph``: refuses custom functions that break its graph.

    The backward of a ``torch.autograd.Function`` that runs a kernel of its own
    (fused norms, losses, attention) gives gradients that autograd takes for
    constants, and one marked ``once_differentiable`` is an error only where
    all gradients are asked for. Products restricted to some parameters would
    be wrong without a word.

    Args:
        loss: a scalar with its graph.

    Raises:
        RuntimeError: naming the function.
    """
    custom = [node for node in _nodes(loss) if _is_custom(node)]
    handles = [node.register_hook(functools.partial(_judge, node.name())) for node in custom]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_custom(node: Any) -> bool:
    """A node of a ``torch.autograd.Function``, of Python or of C++."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) or (
        "CppNode" in node.name()
    )


def _judge(name: str, made: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """Raise where what a custom function made of its output's gradient has no graph.

    A linear function of a constant gradient rightly has none, unless it sums
    up to a scalar: that is a fused loss.
    """
    results = [gradient for gradient in made if gradient is not None]
    sources = [gradient for gradient in given if gradient is not None]
    nodes = [gradient.grad_fn for gradient in results if gradient.grad_fn is not None]
    broken = any(node.name() in _BROKEN for node in nodes)
    if results and not any(gradient.requires_grad for gradient in results):
        scalar = all(gradient.numel() == 1 for gradient in sources)
        many = any(gradient.numel() > 1 for gradient in results)
        broken = any(gradient.requires_grad for gradient in sources) or (scalar and many)
    if broken:
        raise RuntimeError(f"the backward of {name} has no derivative")


SMALLEST = 0.3
"""What parameters are at least taken to measure: some norms store the scale's distance from 1."""


class DifferenceProduct:
    """``v ↦ H v`` by the four-point central difference of gradients.

    ``(8 (∇L(p + εv) - ∇L(p - εv)) - (∇L(p + 2εv) - ∇L(p - 2εv))) / 12ε``

    with ``ε = (machine epsilon)^(1/3) · max(rms(p), 0.3) / max|v|``: four forward
    and backward passes a product. The error is of order ``ε⁴`` by truncation and
    ``machine epsilon / ε`` by rounding, so parameters must be float32 or
    float64 and the loss not computed under autocast. Kinks (ReLU) that a step
    crosses count as curvature, which exact products do not see: on a small
    batch the two may then have nothing in common.

    All passes draw the random numbers that the next pass of the training
    draws (dropout), and leave generators, buffers and gradients as they were;
    a graph made before can still be run backward.

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
        """H v, in the dtype of v. Zero where the loss does not depend on a parameter."""
        step = self._step(vectors)
        with torch.no_grad():
            start = [parameter.clone() for parameter in self.parameters]
        try:
            near = self._difference(start, vectors, step)
            far = self._difference(start, vectors, 2 * step)
        finally:
            _set(self.parameters, start)
        return [(8 * one - two) / (12 * step) for one, two in zip(near, far, strict=True)]

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
        """ε, a 0-d tensor: all parameters together, since a shift alone is often zero."""
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
    """Gradients, buffers and random generators are afterwards what they were."""
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
    """Change values and not their versions: in the end the values are the old ones again."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
