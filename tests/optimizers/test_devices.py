"""Accelerators that are not CUDA's, pretended: they take its path, where they have its kernels."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_precond.compat import devices
from hf_precond.optimizers.base import kernels
from hf_precond.registry import create_optimizer, list_optimizers
from tests.fake_cuda import on_gpu, pretended, with_source
from tests.optimizers.models import make
from tests.optimizers.test_shared import QUICK

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
aten = torch.ops.aten
# What MPS lacks, or lacked in the releases of torch that are supported.
LACKING = {
    aten._linalg_eigh.default, aten.linalg_cholesky_ex.default, aten.cholesky_inverse.default,
    aten.linalg_solve_triangular.default, aten.frexp.Tensor,
}  # fmt: skip


class Trace(TorchDispatchMode):
    """Names of the operations on a device, which refuses what it does not have."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.seen, self.hosted = kind, [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = any(t.device.type == self.kind for t in given)
        if self.kind == "mps" and function in LACKING:
            if here:
                raise NotImplementedError(f"{function} is not implemented for MPS")
            self.hosted.add(function)
        if function is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if function is aten.nonzero.default:
            return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)
        result = function(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for tensor in made:
            if tensor.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError("MPS has no float64")
        if here or any(t.device.type == self.kind for t in made):
            self.seen.append(function.name())
        return result


def run(name, kind, monkeypatch, **fields):
    """What an optimizer does in three steps, its diagnostics and its state."""
    devices._missing.clear()
    device, model = torch.device(kind, 0), make("bert")
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    with pretended(monkeypatch, kind), monkeypatch.context() as patch:
        for ability in ("has_tf32", "accumulates"):  # the same of all
            patch.setattr(devices, ability, lambda device: False)
        patch.setattr(kernels, "for_device", lambda tensor: None)  # Triton's are for CUDA alone
        model = on_gpu(model, device=device)
        optimizer = with_source(create_optimizer(model, name, **QUICK[name] | fields), device)
        with Trace(kind) as trace:
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter)
                optimizer.step()
            optimizer.diagnostics()
            state = optimizer.state_dict()
            optimizer.load_state_dict(state)
            optimizer.step()
        held = {
            key: value.device.type
            for entry in state["state"].values()
            for key, value in entry.items()
            if isinstance(value, torch.Tensor)
        }
    devices._missing.clear()
    return trace, held


slow = pytest.mark.slow
CASES = [(name, {}) for name in list_optimizers()]
CASES += [
    pytest.param(*case, marks=slow)
    for case in (
        ("afopt", {"direction": "inverse"}), ("afopt", {"scaling": "cap"}),
        ("nkfac", {"reference": True}), ("sgdph", {"base": "sgd"}),
    )
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_other_accelerators_take_the_path_of_cuda(name, fields, monkeypatch):
    kinds = ("cuda", "xpu", "mps")
    traces, states = zip(*(run(name, kind, monkeypatch, **fields) for kind in kinds), strict=True)
    cuda, xpu, mps = traces
    assert xpu.seen == cuda.seen and len(cuda.seen) > 100
    # On MPS all but what it has no kernel for.
    assert {n for n in mps.seen if "fused" in n} == {n for n in cuda.seen if "fused" in n}
    assert {n for n in cuda.seen if "mm" in n} <= set(mps.seen)
    assert mps.hosted <= LACKING
    for held in states:
        on_host = [key for key, kind in held.items() if kind == "cpu"]
        assert all(key.endswith("_energy") for key in on_host), on_host


def test_kernels_that_a_device_lacks_run_on_the_host_once_known():
    calls = []

    def absent(tensor):
        calls.append(tensor.device.type)
        if tensor.device.type == "meta":
            raise NotImplementedError
        return tensor + 1

    devices._missing.clear()
    try:
        for _ in range(2):
            with pytest.raises(NotImplementedError):  # of meta tensors there is no copy on the host
                devices.kernel(absent, torch.empty(2, device="meta"))
        assert calls == ["meta"]
        assert torch.equal(devices.kernel(absent, torch.ones(2)), torch.full((2,), 2.0))
        with pytest.raises(NotImplementedError):
            devices.kernel(torch.Tensor.__and__, torch.ones(2), torch.ones(2))
    finally:
        devices._missing.clear()


def test_devices_are_told_apart_by_what_they_have():
    kinds = {kind: torch.device(kind) for kind in ("cpu", "cuda", "xpu", "mps")}
    assert [k for k, d in kinds.items() if devices.has_streams(d)] == ["cuda", "xpu"]
    assert [k for k, d in kinds.items() if devices.widest(d) == torch.float32] == ["mps"]
    assert all(devices.is_fused(device) for device in kinds.values())
    assert [k for k, d in kinds.items() if devices.is_capturable(d)] == ["cuda", "xpu"]
    values, arrived = devices.copied_to_host(torch.arange(3))
    assert arrived.query() and values.tolist() == [0, 1, 2]
