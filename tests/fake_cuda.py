"""A GPU that torch only pretends to have: tensors have a device, a shape and a dtype, no numbers.

Under ``FakeTensorMode`` torch's own rules say which devices may meet. On top of it, :class:`Watch`
sees every operation: what would be a kernel on the device, and what would make the host wait.
"""

import contextlib
import ctypes
import os
import types
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_precond.compat import devices
from hf_precond.optimizers.adamr import batch as rotation_batch
from hf_precond.statistics.moments import request_shape
from hf_precond.statistics.requests import Statistic, StatisticsSource

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Their answer is on the host: a number, a shape that depends on the values, an error code.
ANSWERS = {
    aten.nonzero.default, aten.equal.default, aten.is_nonzero.default, aten._linalg_eigh.default,
    aten._linalg_svd.default, aten.masked_select.default, aten._unique2.default,
    aten.repeat_interleave.Tensor, aten._linalg_check_errors.default,
}  # fmt: skip
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_",
             "detach", "_unsafe_view", "lift_fresh", "_local_scalar_dense")  # fmt: skip


class Watch(TorchDispatchMode):
    """Counts kernels, and notes what the host would wait for.

    Attributes:
        kernels: name of the operation to its number; a foreach or fused one counts once.
        waits: where in the package the host would wait, and for what.
        number: what a number read from the device turns out to be.
    """

    def __init__(self, number=1):
        super().__init__()
        self.kernels, self.waits, self.number = Counter(), [], number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._see(function, args, kwargs)
        if function is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else self.number
        if function is aten.nonzero.default:
            return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)
        result = function(*args, **kwargs)
        # torch pins what it makes for a copy to the host that does not block.
        if kwargs.get("pin_memory") or kwargs.get("non_blocking"):
            result.is_pinned_memory = True
        return result

    def _see(self, function, args, kwargs):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = kwargs.get("device")
        on_gpu = any(t.is_cuda for t in tensors) or (made is not None and made.type == "cuda")
        if not on_gpu or function.namespace == "prim":
            return
        name = function.name().removeprefix("aten::").split(".")[0]
        if self._waits(function, args, kwargs):
            self.waits.append(f"{name} at {_place()}")
        views = (r.alias_info is not None and not r.alias_info.is_write
                 for r in function._schema.returns)  # fmt: skip
        if name not in NO_KERNEL and not any(views):
            self.kernels[name] += 1

    def _waits(self, function, args, kwargs):
        if function in ANSWERS or function is aten._local_scalar_dense.default:
            return args[0].is_cuda
        if function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            return any(i is not None and (i.dtype == torch.bool or not i.is_cuda) for i in args[1])
        if function is aten._to_copy.default:
            target = kwargs.get("device") or args[0].device
            free = kwargs.get("non_blocking") and (target.type == "cpu" or _pinned(args[0]))
            return target.type != args[0].device.type and not free
        if function is aten.copy_.default:
            target, source = args[:2]
            on_host = target if target.device.type == "cpu" else source
            free = len(args) > 2 and args[2] and _pinned(on_host)
            return target.device.type != source.device.type and not free
        return False

    @property
    def total(self):
        return sum(self.kernels.values())


def _pinned(tensor):
    return getattr(tensor, "is_pinned_memory", False)


def _place():
    """The innermost lines of the package that are being run, or call a kernel."""
    import traceback

    lines = [
        f
        for f in traceback.extract_stack()
        if f"{os.sep}hf_precond{os.sep}" in f.filename and f.name != "kernel"
    ]
    return " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(lines[-2:]))


class Event:
    """Stands for ``torch.cuda.Event``, which needs a driver: always reached."""

    def record(self, stream=None):
        pass

    def query(self):
        return True


def neighbours(parts):
    """Stands for ``rotation.batch.adjacent``, which asks where in memory tensors lie."""
    first = parts[0]
    if len(parts) == 1:
        return first
    storage = first.untyped_storage()._cdata
    for number, part in enumerate(parts):
        place = first.storage_offset() + number * first.numel()
        if part.untyped_storage()._cdata != storage or part.storage_offset() != place:
            return None
    shape = (len(parts) * first.shape[0], *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


@contextlib.contextmanager
def pretended(monkeypatch, kind="cuda"):
    """Inside, torch has a GPU, gradients are off, and the driver's calls do nothing."""
    stream = types.SimpleNamespace(synchronize=lambda: None)
    if kind in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "Event", Event)
        monkeypatch.setattr(getattr(torch, kind), "current_stream", lambda device=None: stream)
    monkeypatch.setattr(rotation_batch, "adjacent", neighbours)
    monkeypatch.setattr(devices, "has_tf32", lambda device: device.type == "cuda")
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so")
    # Indexing asks which device is current; a build without CUDA has nobody to answer. The guard
    # of meta tensors, which does nothing, stands in for that of CUDA's.
    try:
        guards = (ctypes.c_void_p * 16).in_dll(
            ctypes.CDLL(library), "_ZN3c104impl26device_guard_impl_registryE"
        )
    except (OSError, ValueError):
        pytest.skip("this build of torch keeps its device guards elsewhere")
    place, meta = {"cuda": 1, "xpu": 12, "mps": 13}[kind], 14
    before = guards[place]
    if not before:
        guards[place] = guards[meta]
    try:
        with FakeTensorMode(), torch.no_grad():
            yield
    finally:
        guards[place] = before


def on_gpu(model, dtype=None, device=GPU):
    """The model with parameters and buffers that only claim to be on the GPU; ties are kept."""
    made = {}

    def pretend(tensor):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=kind, device=device)
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)])
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = pretend(tensor)
    return model


class Source(StatisticsSource):
    """Statistics on the GPU for every request, whenever they are asked for."""

    def __init__(self, requests, device=GPU):
        self.requests, self.device = requests, device

    def take(self):
        return {
            request.key: Statistic(
                torch.empty(request_shape(request), device=self.device),
                torch.empty((), device=self.device),
            )
            for request in self.requests
        }


def with_source(optimizer, device=GPU):
    """The optimizer with statistics from a :class:`Source` instead of the model's passes."""
    requests = optimizer.requests()
    optimizer.close()
    optimizer.statistics = Source(requests, device)
    return optimizer


def step(optimizer, number=1):
    """A step with gradients on the GPU; what was seen of it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    with Watch(number) as watch:
        optimizer.step()
    return watch
