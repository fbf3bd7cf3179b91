"""What one operation becomes on a CUDA device: its launches, and how it goes through memory.

Seen in traces of torch 2.11 on an H200; ``examples/benchmarks/gpu.md`` has them beside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, prod
from typing import Any

from torch import Tensor

ALIGNED, JOINED, LISTS, REDUCED, COLUMNS = "aligned", "joined", "lists", "reduced", "columns"
STRIDED, CONVERTED, WIDENED, PICKED = "strided", "converted", "widened", "picked"
PRODUCT, FACTORIZATION = "product", "factorization"
REDUCTIONS = {"sum", "mean", "linalg_vector_norm", "amax", "amin", "any", "all", "var", "std"}
"""Operations that make few numbers of many."""
NORMS = {"native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm"}
NORMS |= {"_fused_rms_norm_backward", "_softmax", "_log_softmax", "_softmax_backward_data"}
"""Operations that reduce rows and go through them again."""
GATHERED = {"index_select", "gather", "index", "scatter", "select_scatter", "index_put_"}
"""Operations that read or write where indices say."""
OWN_KERNEL = {"embedding", "embedding_dense_backward", "tril", "triu", "tril_", "triu_", "eye"}
OWN_KERNEL |= {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
"""Operations with a kernel of their own, whatever the strides are, or that only fill memory."""
LAUNCHES: dict[str, float] = {
    **dict.fromkeys(("mm", "addmm", "addmm_"), 1.2),
    **dict.fromkeys(("bmm", "baddbmm", "baddbmm_"), 1.5),
    **dict.fromkeys(("native_layer_norm_backward", "constant_pad_nd", "eye"), 2.0),
    "_scaled_dot_product_flash_attention": 3.0,
    "_scaled_dot_product_flash_attention_backward": 4.0,
    "embedding_dense_backward": 16.0,
}  # fmt: skip
"""Launches of an operation that has more than one, with its memsets. cuBLAS has one for every
second product of a stack, every fifth of two matrices; an embedding's gradient sorts the ids."""
LARGE = 2**18
"""Numbers from which blocks share a reduction: they meet in memory that a memset clears."""
CHUNK, BLOCKS = 65536, 320
"""Numbers that a block of a foreach kernel takes, and blocks of a launch."""
LISTED = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors of a foreach launch, by the number of lists."""
PANEL = 16
"""Columns that a batched Cholesky factorisation takes at once, in three kernels."""
IN_TURN = 8
"""Matrices of a stack up to which triangular solves take one after the other."""


def launches_of(name: str, args: Sequence[Any], result: Any) -> float:
    """Kernels, copies and memsets of an operation, on average.

    Args:
        name: of the operation.
        args: its arguments.
        result: what it returned.
    """
    if name.startswith(("_foreach_", "_fused_")):
        return _of_lists(name, args)
    if name == "linalg_cholesky_ex":
        return 3.0 * ceil(args[0].shape[-1] / PANEL) + 3
    if name in ("linalg_solve_triangular", "triangular_solve"):
        matrix = args[0] if name == "linalg_solve_triangular" else args[1]
        side, matrices = matrix.shape[-1], prod(matrix.shape[:-2])
        if matrices <= IN_TURN and side >= 64:
            return 1 + 2.0 * matrices * ceil(side / 256)
        return 1 + 4.0 * ceil(side / 64)
    if name in REDUCTIONS and isinstance(args[0], Tensor) and isinstance(result, Tensor):
        return 1.0 + (args[0].numel() >= LARGE and result.numel() < args[0].numel() / 64)
    return LAUNCHES.get(name, 1.0) + (copied_bytes(name, args, result) > 0)


def _of_lists(name: str, args: Sequence[Any]) -> float:
    """Launches of a foreach or fused operation: a launch is full by blocks or by tensors."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if not lists:
        return 1.0
    # The counters of the steps are no list that is gone through.
    depth = len(lists) - (name.startswith("_fused_") and len(lists) > 1)
    most = LISTED.get(depth, 30)
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        tensors += 1
        for left in range(ceil(tensor.numel() / CHUNK), 0, -1):
            blocks += 1
            if blocks == BLOCKS or (tensors == most and left == 1):
                launches, blocks, tensors = launches + 1, 0, int(left > 1)
    return float(launches + (blocks > 0))


def rows_of(name: str, args: Sequence[Any]) -> float:
    """Rows that a factorisation goes through one after the other.

    Args:
        name: of the operation.
        args: its arguments.
    """
    matrix = args[1] if name in ("triangular_solve", "cholesky_solve") else args[0]
    side, matrices = matrix.shape[-1], prod(matrix.shape[:-2])
    if name not in ("linalg_solve_triangular", "triangular_solve"):
        return float(side)
    # A stack at once takes about twice as long as one matrix.
    return float(side) * (matrices if matrices <= IN_TURN and side >= 64 else 2)


def copied_bytes(name: str, args: Sequence[Any], result: Any) -> float:
    """Bytes that are copied before a product adds to them.

    Args:
        name: of the operation.
        args: its arguments.
        result: what it returned.
    """
    if name == "baddbmm" or (name == "addmm" and args[0].dim() == 2):
        return 2.0 * result.numel() * result.element_size()
    return 0.0


def kind_of(name: str, args: Sequence[Any], kwargs: Any, result: Any) -> str:
    """How an operation that is no product goes through memory.

    Args:
        name: of the operation.
        args: its arguments.
        kwargs: its options.
        result: what it returned.
    """
    if name.startswith(("_foreach_", "_fused_adam")):
        return LISTS
    if name in ("cat", "stack"):
        return JOINED
    if name in REDUCTIONS:
        return COLUMNS if _sums_columns(name, args) else REDUCED
    if name in NORMS or name in ("native_dropout", "native_batch_norm"):
        return REDUCED
    if name in GATHERED or name == "constant_pad_nd":
        return PICKED
    if name in OWN_KERNEL:
        return ALIGNED
    return _elementwise(name, [*_flat(args), *_flat(kwargs.values()), *_flat([result])])


def _sums_columns(name: str, args: Sequence[Any]) -> bool:
    """Whether a reduction keeps the last dimension, as the gradient of a bias does."""
    sides = args[1] if len(args) > 1 and name in ("sum", "mean", "amax", "amin") else None
    if isinstance(sides, int):
        sides = [sides]
    if not isinstance(sides, list | tuple) or not sides or not isinstance(args[0], Tensor):
        return False
    last = args[0].dim() - 1
    return last > 0 and all(side % args[0].dim() != last for side in sides)


def _flat(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def _elementwise(name: str, tensors: list[Tensor]) -> str:
    """By what torch's iterator finds: other dtypes, other strides, or neither."""
    if not tensors:
        return ALIGNED
    largest = max(tensors, key=lambda t: t.numel())
    strided = any(_layout(t) != _layout(largest) for t in tensors) or not _dense(largest)
    floats = {t.dtype for t in tensors if t.is_floating_point()}
    if name in ("_to_copy", "copy_", "clone"):
        if strided:
            return STRIDED
        source, target = tensors[0].dtype, tensors[-1].dtype
        sources = tensors[1].dtype if name == "copy_" and len(tensors) > 1 else source
        return WIDENED if target.itemsize > sources.itemsize else ALIGNED
    if strided:
        return CONVERTED if len(floats) > 1 else STRIDED
    return WIDENED if len(floats) > 1 else ALIGNED


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1)


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers fill their memory, in whatever order."""
    expected = 1
    for stride, n in sorted((s, n) for n, s in _layout(tensor)):
        if stride != expected:
            return False
        expected *= n
    return True
