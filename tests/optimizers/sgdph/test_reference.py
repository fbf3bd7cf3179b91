"""SGD-PH in reference mode against trajectories of the authors' published code.

The files hold numbers that github.com/myingysun/SGDPH @ df74dfb printed in float64 on a CPU: start
values, mini-batches, losses, and the parameters after some of the steps.
"""

from pathlib import Path

import pytest
from safetensors import safe_open
from torch import nn

from hf_precond.integrations.arguments import config_from_pairs, parse_pairs
from hf_precond.optimizers.sgdph.config import SGDPHConfig
from hf_precond.optimizers.sgdph.optimizer import SGDPH, norm_parameters
from hf_precond.optimizers.sgdph.reference import SGDPHReference
from hf_precond.registry import create_optimizer

GOLDEN = Path(__file__).parents[2] / "golden"


def batch_norm():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).double()


def layer_norm():
    return nn.Sequential(
        nn.Linear(6, 8, bias=False),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 6),
        nn.LayerNorm(6),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).double()


def read(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fields_of(values):
    theirs = {"curvature_eps": "eps"}
    names = ("lr", "weight_decay", "momentum", "tau", "curvature_eps")
    numbers = {name: float(values[theirs.get(name, name)]) for name in names}
    return {"base": "sgd", "probe": "ones", "reference": True, **numbers}


def by_hand(model, fields):
    config = SGDPHConfig(**fields)
    return SGDPH(model.parameters(), norm_parameters(model, config), config)


def by_name(model, fields):
    return create_optimizer(model, "sgdph", **fields)


def by_optim_args(model, fields):
    pairs = parse_pairs(",".join(f"{key}={value}" for key, value in fields.items()))
    return create_optimizer(model, config_from_pairs(SGDPHConfig, pairs))


def train_step(model, optimizer, x, y):
    with optimizer.curvature_context():
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.probe(loss)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("build", [by_hand, by_name, by_optim_args])
@pytest.mark.parametrize(("name", "network"), [("sgdph_bn", batch_norm), ("sgdph_ln", layer_norm)])
def test_the_golden_steps(name, network, build):
    values, tensors = read(name)
    model = network()
    model.load_state_dict(
        {name: tensors[f"init/{name}"] for name, _ in model.named_parameters()}, strict=False
    )
    optimizer = build(model, fields_of(values))
    assert type(optimizer) is SGDPHReference
    for step in range(int(values["steps"])):
        loss = train_step(model, optimizer, tensors["x"][step], tensors["y"][step])
        assert loss == pytest.approx(tensors["loss"][step].item(), rel=1e-9)
        for name, parameter in model.named_parameters():
            wanted = tensors.get(f"step{step + 1}/{name}")
            if wanted is not None:
                error = (parameter - wanted).norm() / wanted.norm()
                assert error < 1e-9, (step, name, error)
    optimizer.close()
