"""Hessian-vector products through the graph of a loss, and estimates of a Hessian's diagonal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from hf_precond.linalg.products import compute_dtype, from_cpu

Probe = Literal["rademacher", "ones", "exact"]
Product = Callable[[Sequence[Tensor]], list[Tensor]]
_BROKEN = ("torch::autograd::Error", "WarnNotImplemented")
"""Nodes that stand for a missing derivative."""


def probe_vectors(parameters: Sequence[Tensor], probe: Probe, step: int) -> list[Tensor]:
    """Returns the vectors that the Hessian is multiplied by: random signs, or ones.

    The signs depend on ``step`` alone, so they are the same on every rank and
    in a resumed run. They are drawn for all parameters, on the CPU: neither the
    device nor a parameter that is left out changes the signs of another.

    Args:
        parameters: the vectors get their shapes.
        probe: signs for ``rademacher``, ones otherwise.
        step: the seed.
    """
    if probe != "rademacher":
        return [torch.ones_like(p, dtype=compute_dtype(p.dtype)) for p in parameters]
    generator = torch.Generator().manual_seed(step)
    total = sum(p.numel() for p in parameters)
    signs = torch.randint(0, 2, (total,), generator=generator).mul_(2).sub_(1)
    sizes = [p.numel() for p in parameters]
    kinds = [(p.device, compute_dtype(p.dtype)) for p in parameters]
    # One copy to a device, not one a parameter, and none that waits.
    parts = {kind: from_cpu(signs, *kind).split(sizes) for kind in dict.fromkeys(kinds)}
    return [
        parts[kind][number].view(p.shape)
        for number, (kind, p) in enumerate(zip(kinds, parameters, strict=True))
    ]


def diagonal_estimates(product: Product, probe: Probe, vectors: Sequence[Tensor]) -> list[Tensor]:
    """Returns an estimate of the diagonal of H's block of each parameter.

    ``rademacher``: ``z ∘ Hz``; ``ones``: ``H 1``; ``exact``: the diagonal,
    one product a channel.

    Args:
        product: maps v, shaped like the parameters, to H v.
        probe: the estimator.
        vectors: z or ones, from :func:`probe_vectors`.
    """
    if probe == "exact":
        return _exact_diagonal(product, vectors)
    products = product(vectors)
    if probe == "ones":
        return products
    return list(torch._foreach_mul(list(vectors), products))


def _exact_diagonal(product: Product, vectors: Sequence[Tensor]) -> list[Tensor]:
    units = [torch.zeros_like(vector) for vector in vectors]
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
        """Returns H v in the dtype of v, zero where the loss does not depend on a parameter.

        Args:
            vectors: v, one tensor per parameter.
        """
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


def _nodes(loss: Tensor, ends: Iterable[Any] = ()) -> Iterator[Any]:
    """Every node of a loss's graph, but those of ``ends`` and what lies behind these alone."""
    pending, known = [loss.grad_fn], set(ends)
    while pending:
        node = pending.pop()
        if node is not None and node not in known:
            known.add(node)
            yield node
            pending.extend(function for function, _ in node.next_functions)


def depends_on(loss: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether a loss depends on one of some parameters; nothing is computed.

    Args:
        loss: with its graph.
        parameters: the parameters.
    """
    wanted = {id(parameter) for parameter in parameters}
    return any(id(getattr(node, "variable", None)) in wanted for node in _nodes(loss))


def made_of(loss: Tensor, results: Sequence[Any], parameters: Iterable[Tensor]) -> bool:
    """Whether a loss depends on parameters through some results alone; nothing is computed.

    Args:
        loss: with its graph.
        results: nodes; one of them at least must be in the graph.
        parameters: the parameters.
    """
    wanted = {id(parameter) for parameter in parameters}
    found = loss.grad_fn in results
    for node in _nodes(loss, results):
        if id(getattr(node, "variable", None)) in wanted:
            return False
        found = found or any(function in results for function, _ in node.next_functions)
    return found


def recomputes(loss: Tensor) -> bool:
    """Whether the backward pass makes part of a loss's graph: reentrant checkpointing.

    Args:
        loss: with its graph.
    """
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(loss))


@contextmanager
def differentiable_twice(loss: Tensor) -> Iterator[None]:
    """Refuses custom functions that break the graph of a backward pass with ``create_graph``.

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
    handles = [node.register_hook(functools.partial(_check_graph, node.name())) for node in custom]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_custom(node: Any) -> bool:
    """A node of a ``torch.autograd.Function``, of Python or of C++."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) or ("CppNode" in node.name())


def _check_graph(name: str, made: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError where a custom function's input gradients have no graph.

    A linear function of a constant gradient rightly has none, unless its
    output is a scalar: that is a fused loss.
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
