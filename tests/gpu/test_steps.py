"""Every optimizer on a GPU: the CPU's steps, and checkpoints that move between the two."""

import io

import pytest
import torch

from hf_precond.registry import list_optimizers
from tests.gpu.support import inputs
from tests.optimizers.models import make, train_step, weights
from tests.optimizers.test_shared import build

pytestmark = pytest.mark.gpu
each_name = pytest.mark.parametrize("name", list_optimizers())
CPU = torch.device("cpu")


def trained(name, device, steps, dtype, model_name="bert", size=6, **values):
    """A model and its optimizer after some steps, and the losses."""
    model = make(model_name, dtype=dtype).to(device)
    optimizer = build(name, model, **values)
    losses = [
        train_step(model, optimizer, inputs(model_name, device, step, size, dtype))
        for step in range(steps)
    ]
    return model, optimizer, losses


@each_name
def test_float64_steps_are_those_of_a_cpu(name, device):
    # More images than any layer is wide: the eigenbasis of a null space would be left to rounding.
    # AdamR's eigenvectors of close eigenvalues multiply rounding by 1e5 a step: fewer of its steps.
    steps = 2 if name == "adamr" else 4
    # A CPU spreads AFOpt's refreshes over the steps of an interval, an accelerator does not.
    fields = {"inverse_interval": 1} if name == "afopt" else {}
    models = [
        trained(name, at, steps, torch.float64, "vit", 48, **fields)[0] for at in (CPU, device)
    ]
    first, second = map(weights, models)
    start = weights(make("vit", dtype=torch.float64))
    for key, value in first.items():
        found = second[key].cpu()
        if name == "muon":  # its matrix sign is bfloat16 in any model
            moved = value - start[key]
            assert (found - value).norm() <= 5e-2 * moved.norm() + 1e-8, key
        else:
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-8, msg=key)


CASES = [(name, {}) for name in list_optimizers()]
CASES += [("afopt", {"direction": "inverse"})]
CASES += [("afopt", {"base": "muon", "scope": "attention"}), ("nkfac", {"solver": "newton"})]


@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
def test_float32_losses_are_those_of_a_cpu(name, values, device):
    ours = trained(name, device, 12, torch.float32, **values)[2]
    theirs = trained(name, CPU, 12, torch.float32, **values)[2]
    # AFOpt takes the matrix sign of square matrices in bfloat16 on a GPU.
    assert ours == pytest.approx(theirs, abs=2e-2)


@each_name
@pytest.mark.parametrize("mapped", ["cpu", None], ids=["mapped to the CPU", "as saved"])
def test_a_checkpoint_continues_on_the_device(name, mapped, device):
    # float64, and images: no sum over tokens whose order a GPU chooses anew every time.
    first, optimizer, _ = trained(name, device, 3, torch.float64, "vit", 48)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, map_location=mapped, weights_only=True)
    second = make("vit", seed=7, dtype=torch.float64).to(device)
    resumed = build(name, second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved)
    before, after = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert before.keys() == after.keys()
    for index, state in before.items():
        for key, value in state.items():
            found = after[index][key]
            if isinstance(value, torch.Tensor):
                assert found.device == value.device and found.dtype == value.dtype, key
                assert torch.equal(found, value), key
            else:
                assert found == value, key
    data = inputs("vit", device, 3, 48, torch.float64)
    for model, stepped in ((first, optimizer), (second, resumed)):
        train_step(model, stepped, data)
    for key, value in weights(first).items():
        torch.testing.assert_close(weights(second)[key], value, rtol=1e-6, atol=1e-9, msg=key)


@each_name
def test_the_device_keeps_the_state(name, device):
    _, optimizer, _ = trained(name, device, 3, torch.float32)
    for state in optimizer.state.values():
        for key, value in state.items():
            # Read by the host an interval after it was written: pinned memory.
            if isinstance(value, torch.Tensor) and not key.endswith("_energy"):
                assert value.device.type == device.type, key
