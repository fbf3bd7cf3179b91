"""A CPU that takes the accelerator's path, and rounds the operands of products as one does.

Rounding follows the operands' dtype and, for float32, the setting in force: TF32 inside
``float32_products``, nothing outside, so that a model's own passes stay exact. Everything is
accumulated in float32. For training scripts too: nothing here needs pytest.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_precond.compat import devices
from hf_precond.statistics import collector

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addmm_, aten.baddbmm_,
            aten.mv, aten.addmv, aten.dot}  # fmt: skip
PLAIN = (aten.mm, aten.bmm, aten.mv, aten.dot)  # the others add to their first argument


def tf32(tensor):
    """The first 10 bits of each mantissa, which are what a tensor core reads: cut, not rounded.

    Args:
        tensor: float32.
    """
    return (tensor.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


class Rounding(TorchDispatchMode):
    """Products as on a tensor core.

    Attributes:
        operations: floating-point operations by ``float32``, ``tf32``, ``bfloat16`` and
            ``float16``, of the products seen.
    """

    def __init__(self):
        super().__init__()
        self.operations = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        packet = function.overloadpacket
        if packet not in PRODUCTS or args[0].dtype == torch.float64:
            return function(*args, **kwargs)
        first = 0 if packet in PLAIN else 1
        operands = args[first : first + 2]
        low = operands[0].dtype in HALF
        in_tf32 = not low and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self._count("tf32" if in_tf32 else str(operands[0].dtype).removeprefix("torch."), operands)
        if not low and not in_tf32:
            return function(*args, **kwargs)
        operands = [t.float() if low else tf32(t) for t in operands]
        if first:
            operands.insert(0, args[0].float())
        scales = {name: kwargs[name] for name in ("alpha", "beta") if name in kwargs}
        name = packet.__name__.removesuffix("_")
        result = getattr(torch, name)(*operands, **scales)
        dtypes = [a for a in args[first + 2 :] if isinstance(a, torch.dtype)]
        out = kwargs.get("out")
        if out is None and packet.__name__.endswith("_"):
            out = args[0]
        if out is not None:
            return out.copy_(result)
        return result.to(kwargs.get("out_dtype") or (dtypes or [args[0].dtype])[0])

    def _count(self, kind, operands):
        a, b = operands
        columns = b.shape[-1] if b.dim() > 1 else 1
        self.operations[kind] = self.operations.get(kind, 0) + 2 * a.numel() * columns


@contextlib.contextmanager
def accelerator(tf32=True, activations=None):
    """Inside, tensors on the CPU take the accelerator's path, with its rounding.

    Args:
        tf32: whether the device has TF32.
        activations: the dtype that second moments see of activations and output gradients, as
            under autocast; ``None`` for their own.

    Yields:
        The :class:`Rounding`.
    """
    patches = (
        mock.patch.object(devices, "is_accelerator", lambda tensor: True),
        mock.patch.object(devices, "has_tf32", lambda device: tf32),
        mock.patch.object(devices, "accumulates", lambda device: True),
        mock.patch.object(torch.Tensor, "is_cpu", property(lambda tensor: False)),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        if activations is not None:
            rows = lambda tensor, dtype, low=None: tensor.detach().to(activations)  # noqa: E731
            stack.enter_context(mock.patch.object(collector, "as_rows", rows))
        yield stack.enter_context(Rounding())
