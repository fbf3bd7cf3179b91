"""NKFAC's reference mode against trajectories of the authors' published code."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hf_precond.architectures.structure import ModelStructure
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.optimizers.nkfac.optimizer import NKFAC
from hf_precond.optimizers.nkfac.selection import layer_matrices

GOLDEN = Path(__file__).parents[2] / "golden"


def network(name):
    if name == "nkfac_conv":
        layers = [
            nn.Conv2d(2, 4, 3, padding=1, stride=2),
            nn.Tanh(),
            nn.Conv2d(4, 5, (3, 2), bias=False),
            nn.Flatten(),
            nn.Linear(30, 3),
        ]
    else:
        layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def config_of(name, meta):
    base = "adamw" if name.startswith("ada") else "sgd"
    assert meta["damping1"] == meta["damping2"]
    return NKFACConfig(
        lr=float(meta["lr"]),
        weight_decay=float(meta["weight_decay"]),
        base=base,
        damping=float(meta["damping1"]),
        stat_decay=float(meta["stat_decay"]),
        stat_interval=int(meta["TCov"]),
        inverse_interval=int(meta["TInv"]),
        newton_steps=int(meta["K"]),
        reference=True,
        **{key: float(meta[key]) for key in ("eps", "momentum") if key in meta},
    )


@pytest.mark.parametrize("name", ["nkfac_mlp", "nkfac_conv", "adankfac_mlp"])
def test_reproduces_the_published_code(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        meta = file.metadata()
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = network(name)
    model.load_state_dict({k: golden[f"init/{k}"] for k in model.state_dict()})
    config = config_of(name, meta)
    structure: ModelStructure = layer_matrices(model, config)
    optimizer = NKFAC(model.parameters(), structure, config)
    for step, (x, y) in enumerate(zip(golden["x"], golden["y"], strict=True)):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        torch.testing.assert_close(loss.detach(), golden["loss"][step], rtol=1e-9, atol=0)
        loss.backward()
        optimizer.step()
        for key, value in model.state_dict().items():
            wanted = golden.get(f"step{step + 1}/{key}")
            if wanted is not None:
                error = (value - wanted).norm() / wanted.norm()
                assert error < 1e-9, (step + 1, key, error)
    assert step + 1 == int(meta["steps"])
    optimizer.close()


def test_reference_takes_the_authors_bases_and_no_solver():
    with pytest.raises(ValueError, match="AdaNKFAC"):
        NKFACConfig(reference=True, base="adamr")
    with pytest.raises(ValueError, match="schedule of solvers"):
        NKFACConfig(reference=True, solver="newton")
