"""Small models in float64 and functions of their matrices that share no code with the package."""

import numpy as np
import torch
from torch import nn

QUINTIC = (3.4445, -4.7750, 2.0315)


class Net(nn.Module):
    """Two linear layers, the second with a wide input, and a head."""

    def __init__(self, width, outputs):
        super().__init__()
        self.up = nn.Linear(3, width, bias=False)
        self.down = nn.Linear(width, outputs)
        self.head = nn.Linear(outputs, 2)

    def hidden(self, x):
        return torch.tanh(self.up(x))

    def forward(self, x, y):
        return (self.head(torch.tanh(self.down(self.hidden(x)))) - y).square().mean()


def net(width=8, outputs=4):
    torch.manual_seed(0)
    return Net(width, outputs).double()


def batch(generator):
    shape = {"dtype": torch.float64, "generator": generator}
    return torch.randn(16, 3, **shape), torch.randn(16, 2, **shape)


def sign_by_svd(matrix, steps=5):
    """What five Newton-Schulz steps make of a matrix, on its singular values."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    a, b, c = QUINTIC
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ vt


class AdamWLoop:
    """AdamW, written out."""

    def __init__(self, weight, lr, betas, eps, decay):
        self.weight, self.lr, self.betas, self.eps, self.decay = weight, lr, betas, eps, decay
        self.m, self.v, self.t = np.zeros_like(weight), np.zeros_like(weight), 0

    def step(self, grad):
        (b1, b2), self.t = self.betas, self.t + 1
        self.m = b1 * self.m + (1 - b1) * grad
        self.v = b2 * self.v + (1 - b2) * grad**2
        self.weight = (1 - self.lr * self.decay) * self.weight
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.weight = self.weight - self.lr * m / (np.sqrt(v) + self.eps)


class SOAPLoop:
    """The paper's algorithm 3: the momentum stays in the space of the weight; dense products."""

    def __init__(self, shape, betas, eps, stat_decay, interval, max_dim=10**9):
        self.betas, self.eps, self.beta, self.interval = betas, eps, stat_decay, interval
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0
        self.factors = [np.zeros((n, n)) if n <= max_dim else None for n in shape]
        self.bases = None

    def _accumulate(self, grad):
        for side, factor in enumerate(self.factors):
            if factor is not None:
                rows = np.moveaxis(grad, side, 0).reshape(grad.shape[side], -1)
                self.factors[side] = self.beta * factor + (1 - self.beta) * rows @ rows.T

    def kron(self):
        """The rotation of the flattened weight."""
        whole = np.ones((1, 1))
        for basis, size in zip(self.bases, self.m.shape, strict=True):
            whole = np.kron(whole, np.eye(size) if basis is None else basis)
        return whole

    def direction(self, grad):
        """The step of Adam in the bases, rotated back; ``None`` at the first call."""
        if self.bases is None:
            self._accumulate(grad)
            self.bases = [
                None if f is None else np.linalg.eigh(f)[1][:, ::-1] for f in self.factors
            ]
            return None
        b1, b2 = self.betas
        self.t += 1
        q = self.kron()
        rotated = (q.T @ grad.ravel()).reshape(grad.shape)
        self.m = b1 * self.m + (1 - b1) * grad
        self.v = b2 * self.v + (1 - b2) * rotated**2
        m = (q.T @ self.m.ravel()).reshape(grad.shape)
        step = m / (np.sqrt(self.v) + self.eps) * np.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        found = (q @ step.ravel()).reshape(grad.shape)
        self._accumulate(grad)
        if self.t % self.interval == 0:
            for side, (f, basis) in enumerate(zip(self.factors, self.bases, strict=True)):
                if basis is None:
                    continue
                order = np.argsort(-np.diag(basis.T @ f @ basis))
                self.v = np.take(self.v, order, axis=side)
                self.bases[side] = np.linalg.qr(f @ basis[:, order])[0]
        return found
