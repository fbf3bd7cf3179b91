"""AFOpt's whole step against one written anew from its formulas: head by head, eigh, float64."""

import pytest
import torch
from torch import nn

from hf_precond.registry import create_optimizer
from tests.optimizers.models import batch, make, train_step

DOUBLE = torch.float64
HEADS, WIDTH = 2, 16
READS = {"q": "x", "k": "x", "v": "x", "o": "o"}
"""Whose moment a role's right factor is made of."""


def eye(size):
    return torch.eye(size, dtype=DOUBLE)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT


def sign(matrix):
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Peer:
    """The same steps of a BERT whose weights are copies, from its inputs and gradients."""

    def __init__(self, model, config):
        self.config, self.steps = config, 0
        self.layers = {}
        for number, layer in enumerate(model.bert.encoder.layer):
            inner, out = layer.attention.self, layer.attention.output.dense
            self.layers[number] = {"q": inner.query, "k": inner.key, "v": inner.value, "o": out}
        self.moments, self.updates, self.factors = {}, 0, {}
        self.momenta, self.usual = {}, {}
        self.inputs = {}
        for number, roles in self.layers.items():
            for role, layer in roles.items():
                layer.register_forward_hook(
                    lambda module, args, _, key=(number, role): self.inputs.update({key: args[0]})
                )

    def weight(self, number, role):
        layer = self.layers[number][role]
        return torch.cat([layer.weight, layer.bias[:, None]], 1).detach()

    def gradient(self, number, role):
        layer = self.layers[number][role]
        return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)

    def second(self, x, mask):
        """``E[x̂ x̂ᵀ]`` over the tokens of the mask."""
        x, weights = x.detach(), mask.to(DOUBLE)
        rows = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        moment = torch.einsum("bti,bt,btj->ij", rows, weights, rows) / weights.sum()
        width = -(-len(moment) // -(-WIDTH // self.config.max_dim))
        places = torch.arange(len(moment)) // width
        return moment * (places[:, None] == places)

    def commit(self, mask):
        self.updates += 1
        keep = min(self.config.stat_decay, 1 - 1 / self.updates)
        for (number, role), x in self.inputs.items():
            if role in "kv":  # read what q reads
                continue
            key = number, READS[role]
            actual = self.second(x, mask)
            self.moments[key] = keep * self.moments.get(key, 0.0) + (1 - keep) * actual

    def left(self, number, role):
        """The left moments of the heads: A_K, A_Q, W_oᵀ W_o."""
        if role == "v":
            parts = self.weight(number, "o")[:, :-1].mT.reshape(HEADS, -1, WIDTH)
            return parts @ parts.mT
        parts = self.weight(number, {"q": "k", "k": "q"}[role]).reshape(HEADS, -1, WIDTH + 1)
        return parts @ self.moments[number, "x"] @ parts.mT

    def damp(self, moment):
        return moment + self.config.damping * moment.trace() / len(moment) * eye(len(moment))

    def refresh(self, number, role):
        config = self.config
        exponent = -1.0 if config.direction == "inverse" else -0.5
        right = power(self.damp(self.moments[number, READS[role]]), exponent)
        lefts, plain = [eye(WIDTH)], None
        if role != "o":
            lefts = [power(self.damp(part), exponent) for part in self.left(number, role)]
        if role in "qk":
            plain = self.left(number, role)
        self.factors[number, role] = lefts, right, plain

    def direction(self, key, momentum):
        lefts, right, _ = self.factors[key]
        actual = []
        for left, rows in zip(lefts, momentum.chunk(len(lefts)), strict=True):
            step = left @ rows @ right
            spectral = self.config.direction == "spectral"
            actual.append(left @ sign(step) @ right if spectral else step)
        return torch.cat(actual)

    def logit_rms(self, key, step):
        plain, moment = self.factors[key][2], self.moments[key[0], READS[key[1]]]
        parts = step.reshape(HEADS, -1, WIDTH + 1)
        squares = (plain * (parts @ moment @ parts.mT)).sum((-2, -1)) / (WIDTH / HEADS)
        return squares.mean().sqrt()

    def length(self, key, step, gradient):
        """What the direction is multiplied with."""
        config = self.config
        plain = config.lr_scale * 0.2 * step.numel() ** 0.5 / step.norm()
        if config.scaling == "adaptive":
            beta, norm = config.momentum, gradient[:, :-1].norm()
            usual = self.usual.get(key, norm)
            self.usual[key] = usual = 0.99 * usual + 0.01 * norm
            noise = usual * ((1 - beta) / (1 + beta)) ** 0.5
            return plain * (self.momenta[key][:, :-1].norm() / noise).clamp(max=2.0)
        if config.scaling == "rms" or key[1] not in "qk":
            return plain
        return torch.minimum(plain, config.rho / self.logit_rms(key, step))

    def step(self, mask, groups):
        """``[W | b]`` after a step, by layer and role."""
        config, actual = self.config, {}
        if self.steps % config.stat_interval == 0:
            self.commit(mask)
        phases = max(1, config.inverse_interval // config.stat_interval)
        for key in self.inputs:
            phase = key[0] % phases * config.stat_interval
            early = self.steps in (0, config.stat_interval, 2 * config.stat_interval)
            if early or self.steps % config.inverse_interval == phase:
                self.refresh(*key)
        for key in self.inputs:
            gradient, beta = self.gradient(*key), config.momentum
            moved = beta * self.momenta.get(key, 0.0) + (1 - beta) * gradient
            self.momenta[key] = moved
            ahead = beta * moved + (1 - beta) * gradient if config.nesterov else moved
            step = self.direction(key, ahead / ahead.abs().max())
            step = step * self.length(key, step, gradient)
            before, lr = self.weight(*key), groups[0]["lr"]
            kept = before.clone()
            kept[:, :-1] *= 1 - lr * groups[0]["weight_decay"]  # biases do not decay
            actual[key] = kept - lr * step
        self.steps += 1
        return actual


FIELDS = [
    {},
    {"scaling": "rms", "stat_decay": 0.5},
    {"direction": "inverse", "scaling": "cap", "rho": 0.5},
    {"direction": "inverse", "max_dim": 5, "momentum": 0.5},
    {"scaling": "cap", "rho": 0.01, "max_dim": 7, "nesterov": False},
    {"direction": "inverse", "scaling": "rms", "damping": 0.01},
    {"scaling": "cap", "stat_decay": 0.0},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_run_of_steps(fields):
    model = make("bert", dtype=DOUBLE)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(10)
                module.bias.normal_(0, 0.1)
    common = {"scope": "attention", "lr": 0.01, "weight_decay": 0.1, "stat_interval": 2}
    optimizer = create_optimizer(model, "afopt", inverse_interval=5, **{**common, **fields})
    peer = Peer(model, optimizer.config)
    steps = []
    optimizer.register_step_pre_hook(
        lambda *_: steps.append(peer.step(inputs["attention_mask"], optimizer.param_groups))
    )
    for number in range(8):
        inputs = batch("bert", number, dtype=DOUBLE)
        train_step(model, optimizer, inputs)
        for key, wanted in steps[-1].items():
            torch.testing.assert_close(peer.weight(*key), wanted, rtol=1e-8, atol=1e-10)
