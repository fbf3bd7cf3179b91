"""AdamR's whole step against one written anew from its formulas: whole matrices, loops, float64."""

import math

import pytest
import torch
from torch import nn

from hf_precond.registry import create_optimizer

DOUBLE = torch.float64
TILES = {"grouped": 2, "blocks": 2}
"""Matrices that a weight is seen as: groups, and blocks of rows no wider than ``max_dim``."""
SIDES = {"words": ("right",), "blocks": ("left",), "tall": ("right",)}
"""Rotated sides, where not both."""


class Net(nn.Module):
    """Square, wide and tall matrices, a grouped convolution, an embedding, two sides too wide."""

    def __init__(self):
        super().__init__()
        self.square = nn.Linear(5, 5, bias=False)
        self.wide = nn.Linear(5, 4, bias=False)
        self.grouped = nn.Conv1d(4, 6, 2, groups=2, bias=False)
        self.words = nn.Embedding(7, 4)
        self.tall = nn.Linear(3, 7, bias=False)
        self.blocks = nn.Linear(9, 8, bias=False)
        self.double()


def jacobi(matrix):
    """``(I + X) C⁻¹``, X the tangents of the angles that make each off-diagonal entry zero."""
    size = len(matrix)
    skew = torch.zeros_like(matrix)
    for i in range(size):
        for j in range(size):
            if i != j:
                angle = 0.5 * math.atan(2 * matrix[i, j] / (matrix[j, j] - matrix[i, i]))
                skew[i, j] = math.tan(angle)
    factor = torch.eye(size, dtype=DOUBLE) + skew
    return factor @ torch.linalg.inv(torch.linalg.cholesky(factor.mT @ factor).mT)


def at_norm_of(matrix):
    """The quintic Newton-Schulz iteration for the sign, from the matrix at norm 1, at its norm."""
    x = matrix / matrix.norm()
    for _ in range(3):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x * matrix.norm() / x.norm()


class Tile:
    """One matrix with its bases; its state in the coordinates of the weight and of the bases."""

    def __init__(self, sides, config):
        self.sides, self.config = sides, config
        self.step = self.calls = 0
        self.factors = dict.fromkeys(sides, torch.zeros((), dtype=DOUBLE))
        self.updates = dict.fromkeys(sides, 0)
        self.bases, self.first, self.second = {}, 0.0, 0.0

    def collect(self, gradient):
        interval = self.config.stat_interval
        for side in self.sides:
            late = self.step + (interval // 2 if side == "right" else 0)
            if self.calls <= 2 or late % interval == 0:
                self.updates[side] += 1
                keep = min(self.config.stat_decay, 1 - 1 / self.updates[side])
                square = gradient @ gradient.mT if side == "left" else gradient.mT @ gradient
                self.factors[side] = keep * self.factors[side] + (1 - keep) * square

    def refresh(self, side, spreads):
        basis = self.bases[side]
        total = jacobi(basis.mT @ self.factors[side] @ basis)
        self.bases[side] = basis @ total
        share = total.square()
        if side == "left":
            self.first = total.mT @ self.first
            self.second = share.mT @ self.second if spreads else self.second
        else:
            self.first = self.first @ total
            self.second = self.second @ share if spreads else self.second

    def refresh_all(self, due, betas):
        young = self.step < self.config.basis_interval
        if self.step == 0:
            vectors = {side: torch.linalg.eigh(self.factors[side])[1] for side in self.sides}
            self.bases = {side: columns.flip(-1) for side, columns in vectors.items()}
            return
        if young:
            early = {"left": (1, 4, 16), "right": (2, 8, 32)}
            due = [side for side in self.sides if self.step in early[side]]
        spreads = young or self.config.transport == "overlap"
        for side in due:
            self.refresh(side, spreads)
        if due and not spreads:
            corrected = self.first / (1 - betas[0] ** self.step)
            lowest = corrected.square() * (1 - betas[1] ** self.step)
            self.second = torch.maximum(self.second, lowest)

    def direction(self, gradient, due, group):
        """U, and ``None`` at the first call."""
        (beta1, beta2), config = group["betas"], self.config
        self.calls += 1
        self.collect(gradient)
        if self.calls == 1:
            return None
        self.refresh_all(due, group["betas"])
        self.step += 1
        eyes = [torch.eye(size, dtype=DOUBLE) for size in gradient.shape]
        left, right = self.bases.get("left", eyes[0]), self.bases.get("right", eyes[1])
        rotated = left.mT @ gradient @ right
        self.first = beta1 * self.first + (1 - beta1) * rotated
        self.second = beta2 * self.second + (1 - beta2) * rotated.square()
        mean = self.first / (1 - beta1**self.step)
        square = self.second / (1 - beta2**self.step)
        lowest = config.floor * square.mean().sqrt()
        return left @ (mean / (square.sqrt().clamp_min(lowest) + group["eps"])) @ right.mT


FIELDS = [
    {},
    {"transport": "overlap", "floor": 0.1},
    {"basis_interval": 1, "floor": 0.3, "stat_decay": 0.5},
    {"basis_interval": 2, "basis_tolerance": 0.3, "stat_interval": 2},
    {"basis_interval": 5, "stat_decay": 0.0, "floor": 0.0, "betas": (0.0, 0.9)},
    {"transport": "overlap", "basis_interval": 4, "stat_interval": 3, "eps": 1e-3},
    {"direction": "sign"},
    {"direction": "sign", "basis_interval": 1, "betas": (0.8, 0.9)},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_run_of_steps(fields):
    torch.manual_seed(0)
    model = Net()
    common = {"lr": 0.02, "weight_decay": 0.1, "basis": "two_sided", "max_dim": 5}
    optimizer = create_optimizer(model, "adamr", **{"betas": (0.9, 0.99), **common, **fields})
    group = optimizer.param_groups[0]
    named = {name.removesuffix(".weight"): p for name, p in model.named_parameters()}
    wanted = {name: p.detach().clone() for name, p in named.items()}
    mixed = {name: torch.randn(p.flatten(1).shape[1], p.flatten(1).shape[1], dtype=DOUBLE)
             for name, p in named.items()}  # fmt: skip
    tiles = {
        name: [Tile(SIDES.get(name, ("left", "right")), optimizer.config)
               for _ in range(TILES.get(name, 1))]
        for name in named
    }  # fmt: skip
    for _ in range(14):
        for name, p in named.items():
            p.grad = (torch.randn_like(p.flatten(1)) @ mixed[name]).reshape(p.shape)
        before = {name: optimizer.state[p].get("step") for name, p in named.items()}
        optimizer.step()
        for name, p in named.items():
            state, parts = optimizer.state[p], p.grad.flatten(1).chunk(len(tiles[name]))
            due = [side for side in SIDES.get(name, ("left", "right"))
                       if state[f"{side}_refreshed"] == before[name]]  # fmt: skip
            pairs = zip(tiles[name], parts, strict=True)
            directions = [tile.direction(part, due, group) for tile, part in pairs]
            if directions[0] is not None:
                if optimizer.config.direction == "sign" and name != "words":
                    directions = [at_norm_of(direction) for direction in directions]
                step = torch.cat(directions).reshape(p.shape)
                wanted[name] = (1 - 0.02 * 0.1) * wanted[name] - 0.02 * step
            torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-7, atol=1e-8)
