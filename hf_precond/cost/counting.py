"""Counts what a device would do: kernels, floating-point operations by precision, bytes moved."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from hf_precond.compat.pretended_device import device_for_engine, placed
from hf_precond.cost.kernels import (
    FACTORIZATION,
    PRODUCT,
    copied_bytes,
    kind_of,
    launches_of,
    rows_of,
)

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default
CPU = torch.device("cpu")
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "detach"),
    *("_unsafe_view", "lift_fresh", "_local_scalar_dense", "resize_"),
}
"""Operations that start nothing on the device, besides views."""
ONLY_WRITTEN = {
    *("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_"),
    "hf_precond::kernel",
}
"""Operations that do not read what they change."""
LIKE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "randn_like"}
"""Operations that read no more of their argument than its shape."""
ROWS = {"embedding", "index", "gather", "index_select", "select_scatter"}
"""Operations that read as much of their first argument as they return."""


def _square(cost: Callable[[int], float]) -> Callable[..., float]:
    """The cost of a batch of square matrices, ``cost(n)`` each."""
    return lambda a, *rest: prod(a.shape[:-2]) * cost(a.shape[-1])


FACTORIZATIONS: dict[str, Callable[..., float]] = {
    "linalg_cholesky_ex": _square(lambda n: n**3 / 3),
    "cholesky_inverse": _square(lambda n: 2 * n**3 / 3),
    "linalg_lu_factor_ex": _square(lambda n: 2 * n**3 / 3),
    "linalg_inv_ex": _square(lambda n: 2 * n**3),
    "_linalg_eigh": _square(lambda n: 9 * n**3),
    "_linalg_svd": _square(lambda n: 20 * n**3),
    "linalg_qr": lambda a, *rest: 8 / 3 * a.numel() * min(a.shape[-2:]),
    "linalg_solve_triangular": lambda a, b, **rest: b.numel() * a.shape[-1],
    "triangular_solve": lambda b, a, *rest: b.numel() * a.shape[-1],
    "cholesky_solve": lambda b, a, *rest: 2 * b.numel() * a.shape[-1],
}
"""Operations of factorisations and triangular solves, which no table of torch has."""
OTHERS: dict[str, Callable[..., float]] = {
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *rest, **options: (
        sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda g, q, k, v, *rest, **options: (
        2.5 * sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    "mv": lambda a, *rest: 2 * a.numel(),
    "addmv": lambda y, a, *rest: 2 * a.numel(),
    "addmv_": lambda y, a, *rest: 2 * a.numel(),
    "dot": lambda a, *rest: 2 * a.numel(),
}
"""Operations of products that torch's table leaves out."""
IN_PLACE = {"addmm_": aten.addmm, "baddbmm_": aten.baddbmm, "addbmm": aten.baddbmm}
SECOND = {"addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addmv", "addmv_"}
"""Products whose operands stand behind what they are added to."""


class Kernel(NamedTuple):
    """One operation that starts something on the device.

    Args:
        name: of the operation.
        phase: what it was for; see ``OperationCounter.phase``.
        flops: floating-point operations of products and factorisations; 0 for all others.
        precision: ``float64``, ``float32``, ``tf32``, ``bfloat16`` or ``float16``; empty where
            there are no operations.
        bytes: read and written.
        factorization: whether it is no product, but Cholesky, a triangular solve and the like.
        kind: how it goes through memory on a CUDA device; see ``kernels.py``.
        launches: kernels, copies and memsets that the operation takes there.
        copied: bytes that are copied before it.
        rows: that a factorisation goes through one after the other.
    """

    name: str
    phase: str = ""
    flops: float = 0.0
    precision: str = ""
    bytes: float = 0.0
    factorization: bool = False
    kind: str = ""
    launches: float = 1.0
    copied: float = 0.0
    rows: float = 0.0


class Counts:
    """A sum over kernels.

    Args:
        kernels: the kernels.
        steps: number of steps they are of, for an average.
    """

    def __init__(self, kernels: Sequence[Kernel], steps: int = 1) -> None:
        self.kernels, self.steps = list(kernels), steps

    @property
    def launches(self) -> float:
        """Operations a step that start something; a foreach or fused one counts once."""
        return len(self.kernels) / self.steps

    @property
    def started(self) -> float:
        """Kernels, copies and memsets a step on a CUDA device."""
        return sum(kernel.launches for kernel in self.kernels) / self.steps

    @property
    def bytes(self) -> float:
        """Bytes read and written a step."""
        return sum(kernel.bytes for kernel in self.kernels) / self.steps

    @property
    def flops(self) -> dict[str, float]:
        """Floating-point operations a step, by precision."""
        totals: Counter[str] = Counter()
        for kernel in self.kernels:
            if kernel.flops:
                totals[kernel.precision] += kernel.flops / self.steps  # type: ignore[assignment]
        return dict(totals)

    def share(self, *precisions: str) -> float:
        """The share of the operations that run in some precisions.

        Args:
            *precisions: ``tf32``, ``bfloat16``, ``float16``, ….
        """
        flops = self.flops
        return sum(flops.get(p, 0.0) for p in precisions) / max(sum(flops.values()), 1.0)

    def by_name(self) -> Counter[str]:
        """Kernels in all, by the name of the operation."""
        return Counter(kernel.name for kernel in self.kernels)

    def of(self, *phases: str) -> Counts:
        """Those of some phases.

        Args:
            *phases: their names.
        """
        return Counts([k for k in self.kernels if k.phase in phases], self.steps)

    def __repr__(self) -> str:
        flops = ", ".join(f"{p} {f / 1e9:.1f}" for p, f in self.flops.items())
        return (
            f"Counts({self.launches:.1f} launches, {self.bytes / 1e9:.2f} GB, "
            f"GFLOP: {flops or 'none'})"
        )


class OperationCounter(TorchDispatchMode):
    """Records every kernel of a device, real or pretended.

    Numbers that are read from tensors that hold none come out as :attr:`number`; ``any()`` as
    ``False`` and other truth values as ``True``: nothing failed.

    Args:
        kind: type of the device; operations of others are not recorded.
        number: what a number read from the device turns out to be.

    Attributes:
        records: the kernels, in order.
        calls: operations that were dispatched, those without a kernel too.
        phase: what the kernels are for that are recorded next.
    """

    def __init__(self, kind: str = "cuda", number: float = 1) -> None:
        super().__init__()
        self.device, self.number = torch.device(kind, 0) if kind != "cpu" else CPU, number
        self.records: list[Kernel] = []
        self.calls = 0
        self.phase = ""

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, kernels are of another phase.

        Args:
            phase: its name.
        """
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "prim":
            result: Any = function(*args, **(kwargs or {}))
            return device_for_engine(result) if function is DEVICE else result
        kwargs = placed(kwargs, self.device) if kwargs else {}
        name, view = _about(function)
        fake = args and hasattr(args[0], "fake_mode")
        if fake and function is aten._local_scalar_dense.default:
            result = self._read(args[0])
        elif fake and function is aten.nonzero.default:
            result = args[0].new_empty(0, args[0].dim(), dtype=torch.int64)
        elif fake and function is aten.equal.default:
            result = True
        else:
            result = function(*args, **kwargs)
        if fake and name == "any":
            result.reads_as = False
        # torch pins what it makes for a copy to the host that does not block.
        if kwargs.get("pin_memory") or kwargs.get("non_blocking"):
            result.is_pinned_memory = True
        if self._is_on_device(args, kwargs):
            self.calls += 1
            if not view:
                if not function._schema.is_mutable:
                    self.made(result)
                self.seen(function, name, args, kwargs)
                if name not in NO_KERNEL:
                    self.records.append(self._kernel(function, name, args, kwargs, result))
        return result

    def _is_on_device(self, args: Any, kwargs: Any) -> bool:
        kind, made = self.device.type, kwargs.get("device")
        if made is not None and torch.device(made).type == kind:
            return True
        return any(t.device.type == kind for t in _tensors((args, kwargs)))

    def seen(self, function: Any, name: str, args: Any, kwargs: Any) -> None:
        """Called with every operation on the device that is no view; for subclasses.

        Args:
            function: the operation.
            name: its name.
            args: its arguments.
            kwargs: its options.
        """

    def made(self, result: Any) -> None:
        """Called with the new tensors of every operation on the device.

        Args:
            result: a tensor, or several.
        """

    def _read(self, tensor: Any) -> Any:
        if tensor.dtype == torch.bool:
            return getattr(tensor, "reads_as", True)
        return self.number

    def _kernel(self, function: Any, name: str, args: Any, kwargs: Any, result: Any) -> Kernel:
        moved = _bytes(function, name, args, kwargs, result)
        found = Kernel(name, self.phase, bytes=moved, launches=launches_of(name, args, result))
        if name in FACTORIZATIONS:
            return found._replace(
                flops=FACTORIZATIONS[name](*args, **kwargs),
                precision=_precision(name, args[0], False),
                factorization=True, kind=FACTORIZATION, rows=rows_of(name, args),
            )  # fmt: skip
        packet = IN_PLACE.get(name, function.overloadpacket)
        if name in OTHERS:
            flops = OTHERS[name](*args, **kwargs)
        elif packet in flop_registry:
            operands = [a for a in args if not isinstance(a, torch.dtype)]  # of the result
            flops = flop_registry[packet](*operands, **kwargs, out_val=result)
        else:
            return found._replace(kind=kind_of(name, args, kwargs, result))
        return found._replace(
            flops=flops, precision=_precision(name, args[1] if name in SECOND else args[0], True),
            kind=PRODUCT, copied=copied_bytes(name, args, result),
        )  # fmt: skip

    @property
    def counts(self) -> Counts:
        """The sum of what was recorded."""
        return Counts(self.records)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@functools.cache
def _about(function: Any) -> tuple[str, bool]:
    """The name of an operation, and whether it returns views."""
    name = function.name().removeprefix("aten::").split(".")[0]
    returns = (r.alias_info for r in function._schema.returns)
    return name, any(alias is not None and not alias.is_write for alias in returns)


def _precision(name: str, operand: Tensor, product: bool) -> str:
    """The operand's dtype, or ``tf32`` where torch's flag says so at this moment."""
    if operand.dtype == torch.float32 and operand.is_cuda and product:
        backends: Any = torch.backends
        setting = backends.cudnn.conv if "convolution" in name else backends.cuda.matmul
        if hasattr(setting, "fp32_precision"):
            rounded = setting.fp32_precision == "tf32"
        else:
            rounded = backends.cudnn.allow_tf32 if "conv" in name else setting.allow_tf32
        if rounded:
            return "tf32"
    return str(operand.dtype).removeprefix("torch.")


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, entries of an expanded one once."""
    total = 0
    for tensor in tensors:
        sides = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        total += prod(sides) * tensor.element_size()
    return total


def _bytes(function: Any, name: str, args: Any, kwargs: Any, result: Any) -> float:
    """What an operation reads and writes: each argument once, what is changed twice, its result."""
    read = written = 0
    known: set[int] = set()
    given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
    for number, argument in enumerate(function._schema.arguments):
        tensors = _tensors(given.get(argument.name))
        if not tensors:
            continue
        known.update(map(id, tensors))
        size = _size(tensors)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed and not (name.startswith("_fused_adam") and argument.name == "grads"):
            written += size
        if argument.is_out or (changed and name in ONLY_WRITTEN) or name in LIKE:
            continue
        read += min(size, _size(_tensors(result))) if name in ROWS and number == 0 else size
    fresh = [tensor for tensor in _tensors(result) if id(tensor) not in known]
    return read + written + _size(fresh)
