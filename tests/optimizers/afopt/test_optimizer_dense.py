"""AFOpt's whole step against one written anew from its formulas: head by head, eigh, float64."""

import pytest
import torch
from torch import nn

from hf_precond.registry import create_optimizer
from tests.optimizers.models import batch, make, train_step

DOUBLE = torch.float64
HEADS, WIDTH = 2, 16
READS = {"q": "x", "k": "k", "v": "x", "o": "o"}
"""Whose moment a role's right factor is made of; k's own differs where it is centered."""


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
        self.momenta, self.usual, self.base = {}, {}, {}
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

    def second(self, x, mask, center):
        """``E[x̂ x̂ᵀ]`` over the tokens of the mask; less each sequence's mean, 0 for the 1."""
        x, weights = x.detach(), mask.to(DOUBLE)
        if center:
            x = x - (x * weights[..., None]).sum(1, True) / weights.sum(1)[:, None, None]
        last = torch.zeros_like(x[..., :1]) if center else torch.ones_like(x[..., :1])
        rows = torch.cat([x, last], -1)
        moment = torch.einsum("bti,bt,btj->ij", rows, weights, rows) / weights.sum()
        width = -(-len(moment) // -(-WIDTH // self.config.max_dim))
        places = torch.arange(len(moment)) // width
        return moment * (places[:, None] == places)

    def commit(self, mask):
        self.updates += 1
        keep = min(self.config.stat_decay, 1 - 1 / self.updates)
        for (number, role), x in self.inputs.items():
            if role == "v":  # reads what q reads
                continue
            key = number, READS[role]
            actual = self.second(x, mask, role == "k" and self.config.center)
            self.moments[key] = keep * self.moments.get(key, 0.0) + (1 - keep) * actual

    def left(self, number, role, damped):
        """The left moments of the heads: A_K, A_Q, W_oᵀ W_o."""
        config = self.config
        covariant = config.damping if damped and config.covariant_damping else 0.0
        if role == "v":
            parts = self.weight(number, "o")[:, :-1].mT.reshape(HEADS, -1, WIDTH)
            return (1 + covariant) * parts @ parts.mT
        other, which = {"q": ("k", "k"), "k": ("q", "x")}[role]
        parts = self.weight(number, other).reshape(HEADS, -1, WIDTH + 1)
        if config.space == "product":
            return (1 + covariant) * parts[..., :-1] @ parts[..., :-1].mT
        moment = self.moments[number, which]
        shift = covariant * moment.trace() / len(moment) * eye(len(moment))
        return parts @ (moment + shift) @ parts.mT

    def damp(self, moment, covariant=False):
        jitter = 8 * torch.finfo(DOUBLE).eps
        scale = jitter if covariant else self.config.damping
        return moment + scale * moment.trace() / len(moment) * eye(len(moment))

    def refresh(self, number, role):
        config = self.config
        exponent = -1.0 if config.direction == "inverse" else -0.5
        right = eye(WIDTH + 1)
        if config.space == "logits":
            right = power(self.damp(self.moments[number, READS[role]]), exponent)
        lefts, plain = [eye(WIDTH)], None
        if role != "o":
            actual = self.left(number, role, True)
            lefts = [power(self.damp(part, config.covariant_damping), exponent) for part in actual]
        if role in "qk":
            plain = self.left(number, role, False)
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

    def length(self, key, step, gradient, group):
        """What the direction is multiplied with."""
        config = self.config
        if config.scaling == "graft":
            first, second = self.base.get(key, (0.0, 0.0))
            beta1, beta2 = group["betas"]
            first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second
            second = second + (1 - beta2) * gradient.square()
            self.base[key] = first, second
            count = self.steps + 1
            root = (second / (1 - beta2**count)).sqrt() + group["eps"]
            return (first / (1 - beta1**count) / root).norm() / step.norm()
        plain = config.lr_scale * 0.2 * step.numel() ** 0.5 / step.norm()
        if config.scaling == "adaptive":
            beta, norm = config.momentum, gradient[:, :-1].norm()
            usual = self.usual.get(key, norm)
            self.usual[key] = usual = 0.99 * usual + 0.01 * norm
            noise = usual * ((1 - beta) / (1 + beta)) ** 0.5
            return plain * (self.momenta[key][:, :-1].norm() / noise).clamp(max=2.0)
        if config.scaling == "rms" or key[1] not in "qk":
            return plain
        allowed = config.rho / self.logit_rms(key, step)
        return allowed if config.scaling == "logit_rms" else torch.minimum(plain, allowed)

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
            step = step * self.length(key, step, gradient, groups[0])
            before, lr = self.weight(*key), groups[0]["lr"]
            kept = before.clone()
            kept[:, :-1] *= 1 - lr * groups[0]["weight_decay"]  # biases do not decay
            actual[key] = kept - lr * step
        self.steps += 1
        return actual


FIELDS = [
    {},
    {"scaling": "rms", "stat_decay": 0.5},
    {"direction": "inverse", "scaling": "cap", "rho": 0.5, "covariant_damping": True},
    {"direction": "inverse_sqrt", "scaling": "graft", "max_dim": 5, "center": True},
    {"scaling": "logit_rms", "center": True, "max_dim": 7, "nesterov": False},
    {"space": "product", "covariant_damping": True, "momentum": 0.5},
    {"direction": "inverse", "space": "product", "scaling": "graft", "damping": 0.01},
    {"covariant_damping": True, "center": True, "scaling": "cap", "stat_decay": 0.0},
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
