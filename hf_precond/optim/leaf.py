"""A tensor that a base rule steps: a parameter, or the rows of a fused one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_precond.configs import compute_dtype

Item = TypeVar("Item")


@dataclass(eq=False)
class Leaf:
    """What a rule needs to step one tensor.

    Args:
        param: the tensor to change in place; a view where a parameter is
            fused.
        grad: its gradient, or the preconditioned gradient that stands for it.
        state: the optimizer's state of the parameter.
        prefix: put before the names of the state (``"q."`` of a fused weight).
        group: the parameter group: lr, weight_decay and the rule's constants.
        seen: the shape that a rule for matrices reads, where it is not the
            parameter's: rows interleaved per head lie in ``[groups, rows, in]``.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    prefix: str
    group: dict[str, Any]
    seen: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, …]`` as a rule for matrices sees it."""
        return tuple(self.param.shape) if self.seen is None else self.seen

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state

    def __getitem__(self, name: str) -> Any:
        return self.state[self.prefix + name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.state[self.prefix + name] = value

    def zeros(self, name: str) -> None:
        """Allocate state ``name`` like the parameter, in float32 (float64 for float64)."""
        param, dtype = self.param, compute_dtype(self.param.dtype)
        if name in self:
            fit(self.state, self.prefix + name, param.shape, dtype, param.device)
        else:
            self[name] = torch.zeros_like(
                param, dtype=dtype, memory_format=torch.contiguous_format
            )

    def counter(self, name: str) -> None:
        """Allocate a float32 count: where torch's AdamW reads it, on a GPU or on the host."""
        device = self.param.device if self.param.is_cuda else torch.device("cpu")
        if name in self:
            fit(self.state, self.prefix + name, (), torch.float32, device)
        else:
            self[name] = torch.zeros((), dtype=torch.float32, device=device)


def fit(
    held: dict[str, Any],
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Let a tensor of the state follow its parameter, converted or moved since the last step.

    Kernels that take a state of another size than the parameter's would write
    beyond its memory.

    Args:
        held: the state that holds it, changed in place.
        name: its name there.
        shape: what the parameter has now.
        dtype: the same.
        device: the same.

    Raises:
        RuntimeError: it has another shape.
    """
    tensor: Tensor = held[name]
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(reshaped(name, tensor.shape, shape))
    if tensor.dtype != dtype or tensor.device != device:
        held[name] = tensor.to(device=device, dtype=dtype)


def reshaped(name: str, held: Sequence[int], wanted: Sequence[int]) -> str:
    """What is said where a parameter's state does not fit it any more."""
    return (
        f"the state {name!r} of a parameter has shape {tuple(held)} and {tuple(wanted)} is needed: "
        "the parameter was resized, tied or pruned after the optimizer's first step "
        "(resize_token_embeddings, tie_weights). Do that before, or build a new optimizer now."
    )


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Lists of the items with equal ``key``, in order of first appearance."""
    lists: dict[Any, list[Item]] = {}
    for item in items:
        lists.setdefault(key(item), []).append(item)
    return list(lists.values())


def in_batches(items: Sequence[Item], size: int, limit: int) -> Iterator[Sequence[Item]]:
    """The items in runs of at most ``limit`` elements, one item at least; each has ``size``."""
    length = max(1, limit // size)
    for start in range(0, len(items), length):
        yield items[start : start + length]


def by_group(leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """Leaves of one parameter group, dtype, device and mesh together."""
    return grouped(
        leaves,
        lambda leaf: (
            id(leaf.group),
            leaf.param.dtype,
            leaf.param.device,
            getattr(leaf.param, "device_mesh", None),
        ),
    )
