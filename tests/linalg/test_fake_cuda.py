"""The algebra that says it reads nothing from the device, on a GPU's tensors."""

import pytest
import torch

from hf_precond.linalg import matrix_functions as functions
from hf_precond.linalg.eigenbasis import refresh
from hf_precond.linalg.inverses import largest_eigenvalue, newton_step, spd_block_inverse
from hf_precond.linalg.products import matmul
from hf_precond.optimizers.nkfac.reference import newton_step_reference
from tests.fake_cuda import GPU, Watch, pretended

SQUARE = {
    "largest_eigenvalue": largest_eigenvalue,
    "newton_step": lambda a: newton_step(a, a),
    "newton_step_reference": lambda a: newton_step_reference(a, a),
    "inverse": lambda a: functions.inverse(a, 0.1).value,
    "inverse_factor": lambda a: functions.inverse_factor(a, 0.1).value,
    "spd_block_inverse": spd_block_inverse,
    "newton_schulz": functions.newton_schulz,
    "gram_newton_schulz": functions.gram_newton_schulz,
    "pack": lambda a: functions.unpack(functions.pack(a)),
    "refresh": refresh,
    "tf32": lambda a: matmul(a, a, "tf32"),
    "bf16": lambda a: matmul(a, a, "bf16"),
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with pretended(monkeypatch):
        yield


@pytest.mark.parametrize("name", SQUARE)
@pytest.mark.parametrize("size", [7, 300])
def test_nothing_waits(name, size):
    with Watch() as watch:
        found = SQUARE[name](torch.empty(3, size, size, device=GPU))
    assert watch.waits == [] and watch.total > 0
    for tensor in found if isinstance(found, tuple) else [found]:
        assert tensor.device == GPU and tensor.dtype == torch.float32
