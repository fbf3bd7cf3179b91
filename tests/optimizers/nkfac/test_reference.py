"""NKFAC's reference mode against trajectories of the authors' published code."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hf_precond.architectures.structure import ModelStructure
from hf_precond.integrations.arguments import config_from_pairs, parse_pairs
from hf_precond.linalg.inverses import newton_step
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.optimizers.nkfac.optimizer import NKFAC, layer_matrices
from hf_precond.optimizers.nkfac.reference import (
    NKFACReference,
    largest_eigenvalue_from_ones,
    newton_step_reference,
)
from hf_precond.registry import create_optimizer

F64 = torch.float64
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


def fields_of(name, meta):
    base = "adamw" if name.startswith("ada") else "sgd"
    assert meta["damping1"] == meta["damping2"]
    return {
        "lr": float(meta["lr"]),
        "weight_decay": float(meta["weight_decay"]),
        "base": base,
        "damping": float(meta["damping1"]),
        "stat_decay": float(meta["stat_decay"]),
        "stat_interval": int(meta["TCov"]),
        "inverse_interval": int(meta["TInv"]),
        "newton_steps": int(meta["K"]),
        "reference": True,
        **{key: float(meta[key]) for key in ("eps", "momentum") if key in meta},
    }


def config_of(name, meta):
    return NKFACConfig(**fields_of(name, meta))


def by_hand(model, fields):
    config = NKFACConfig(**fields)
    structure: ModelStructure = layer_matrices(model, config)
    return NKFAC(model.parameters(), structure, config)


def by_name(model, fields):
    return create_optimizer(model, "nkfac", **fields)


def by_optim_args(model, fields):
    pairs = parse_pairs(",".join(f"{key}={value}" for key, value in fields.items()))
    return create_optimizer(model, config_from_pairs(NKFACConfig, pairs))


@pytest.mark.parametrize("build", [by_hand, by_name, by_optim_args])
@pytest.mark.parametrize("name", ["nkfac_mlp", "nkfac_conv", "adankfac_mlp"])
def test_reproduces_the_published_code(name, build):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        meta = file.metadata()
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = network(name)
    model.load_state_dict({k: golden[f"init/{k}"] for k in model.state_dict()})
    optimizer = build(model, fields_of(name, meta))
    assert type(optimizer) is NKFACReference
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


# The formulas


def spd(*shape, seed=0, condition=100.0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    size = shape[-1]
    basis = torch.linalg.qr(torch.randn(*shape, size, generator=generator, dtype=F64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=F64)
    return (basis * values @ basis.mT).to(dtype)


def eye(size):
    return torch.eye(size, dtype=F64)


@pytest.mark.parametrize("drift", [0.01, 5.0], ids=["fast branch", "slow branch"])
def test_newtons_residual_is_1_minus_a_E_plus_a_E_squared(drift):
    matrix = spd(6)
    inverse = torch.linalg.inv(matrix + drift * 0.1 * spd(6, seed=1))
    product = inverse @ matrix
    residual = eye(6) - product
    if residual.norm() < 1:
        assert drift < 1
        scale = 1.0
    else:
        assert drift > 1
        scale = 1 / product.norm()
    after = eye(6) - newton_step_reference(matrix, inverse) @ matrix
    expected = (1 - scale) * residual + scale * residual @ residual
    assert (after - expected).norm() < 1e-12


def test_newtons_step_in_numbers():
    matrix = torch.diag(torch.tensor([4.0, 1.0], dtype=F64))
    near = newton_step_reference(matrix, torch.diag(torch.tensor([0.2, 0.9], dtype=F64)))
    torch.testing.assert_close(near, torch.diag(torch.tensor([0.24, 0.99], dtype=F64)))
    far = newton_step_reference(matrix, eye(2))
    scale = 17**-0.5
    expected = torch.diag(torch.tensor([1 + scale - 4 * scale, 1.0], dtype=F64))
    torch.testing.assert_close(far, expected)
    assert far[0, 0].item() == pytest.approx(0.272393, abs=1e-6)


def test_the_inverse_is_a_fixed_point_in_a_batch_too():
    batch = torch.stack([spd(8, seed=seed) for seed in range(3)])
    inverse = torch.linalg.inv(batch)
    found = newton_step_reference(batch, inverse)
    torch.testing.assert_close(found, inverse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [64, 256])
def test_a_drift_in_scale_stalls_with_size(size):
    # B A = 1.2 I: the test sees .2 sqrt(n) and takes the slow branch from n = 25.
    matrix = spd(size)
    exact = torch.linalg.inv(matrix)
    assert (newton_step_reference(matrix, 1.2 * exact) - exact).norm() / exact.norm() > 0.15


def random_pairs(size, count):
    """Unrelated positive definite pairs of conditions and scales up to 1e4."""
    generator = torch.Generator().manual_seed(size)
    powers = (4 * torch.rand(2 * count, generator=generator)).tolist()
    pairs = torch.stack([spd(size, seed=n, condition=10**power) for n, power in enumerate(powers)])
    scales = 10 ** (4 * torch.rand(count, 1, 1, generator=generator, dtype=F64) - 2)
    return pairs[:count], pairs[count:] * scales


@pytest.mark.parametrize("size", [2, 5, 12, 32])
def test_random_pairs_stay_positive_definite_and_converge(size):
    matrix, inverse = random_pairs(size, 50)
    root = torch.linalg.cholesky(matrix)
    for _ in range(4000):
        inverse = newton_step_reference(matrix, inverse)
        residual = (eye(size) - inverse @ matrix).norm(dim=(1, 2))
        assert (torch.linalg.eigvalsh(root.mT @ (inverse + inverse.mT) / 2 @ root) > 0).all()
        if (residual < 1e-8).all():
            break
    assert (residual < 1e-8).all()


def test_the_authors_rule_stalls_on_averages_that_start_from_zero():
    # Their average after 21 and 31 updates is .659 and .796 of what it should be.
    size, generator = 256, torch.Generator().manual_seed(0)
    rows = torch.randn(4 * size, size, generator=generator, dtype=F64)
    factor = rows.T @ rows / (4 * size) + 0.01 * eye(size)
    start, drifted = torch.linalg.inv(0.659 * factor), 0.796 * factor
    exact = torch.linalg.inv(drifted)
    errors = [
        ((found - exact).norm() / exact.norm()).item()
        for found in (start, newton_step_reference(drifted, start), newton_step(drifted, start)[0])
    ]
    assert errors[0] == pytest.approx(0.208, abs=1e-3)
    assert errors[1] > 0.18 and errors[2] < 1e-10


def test_from_ones_is_two_products_a_round_and_the_norm_of_the_last():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    # 1 -> A 1 = (5, 2), u = (5, 2) / sqrt(29), v = A u = (22, 7) / sqrt(29)
    one = largest_eigenvalue_from_ones(matrix, rounds=1)
    assert one.item() == pytest.approx(math.sqrt((22**2 + 7**2) / 29), rel=1e-14)
    exact = torch.linalg.eigvalsh(matrix)[-1].item()
    assert largest_eigenvalue_from_ones(matrix).item() == pytest.approx(exact, rel=1e-10)


def test_from_ones_in_the_null_space_is_not_a_number():
    matrix = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torch.isnan(largest_eigenvalue_from_ones(matrix))


def test_a_batch_is_every_matrix_by_itself():
    batch = torch.stack([spd(4, 7, seed=seed) for seed in range(3)])
    alone = [torch.stack([largest_eigenvalue_from_ones(m) for m in row]) for row in batch]
    found = largest_eigenvalue_from_ones(batch)
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-13, atol=0)
