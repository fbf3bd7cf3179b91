"""AdamR on hand-made layers, fed with given gradients."""

import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix, ModelStructure
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.optimizer import AdamR


def layers(*weights):
    """Linear layers without bias that hold copies of the given weights."""
    made = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight.clone()
        made.append(layer)
    return made


def experts(count, rows, columns, dtype=torch.float64):
    """A layer of experts, their matrices in one weight, all zeros."""
    module = nn.Module()
    module.num_experts = count
    module.weight = nn.Parameter(torch.zeros(count, rows, columns, dtype=dtype))
    return module


def adamr(modules, **fields):
    """The optimizer of modules whose weights are matrices of hidden layers."""
    matrices = [
        LayerMatrix(
            f"layer{number}",
            module,
            layout="conv" if module.weight.dim() > 2 else "linear",
            groups=getattr(module, "groups", 1),
            stacked=hasattr(module, "num_experts"),
        )
        for number, module in enumerate(modules)
    ]
    groups = [{"params": [module.weight for module in modules]}]
    structure = ModelStructure(matrices, hidden=matrices)
    return AdamR(groups, structure, AdamRConfig.create(**fields))


def run(optimizer, modules, gradients):
    """A step for every item of ``gradients``: a list of one gradient a module."""
    for step in gradients:
        for module, gradient in zip(modules, step, strict=True):
            module.weight.grad = None if gradient is None else gradient.clone()
        optimizer.step()


def noise(*shapes, steps, seed=0, dtype=torch.float64):
    """Seeded gradients: a list (steps) of lists (shapes), spread over decades along both sides."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape):
        sample = torch.randn(*shape, generator=generator, dtype=torch.float64)
        flat = sample.flatten(1)
        rows = torch.logspace(0, -2, flat.shape[0], dtype=torch.float64)
        columns = torch.logspace(0, -1, flat.shape[1], dtype=torch.float64)
        return (rows[:, None] * flat * columns).reshape(shape).to(dtype)

    return [[one(shape) for shape in shapes] for _ in range(steps)]


def orthogonal(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=dtype))[0]


class RotatedQuadratic:
    """``f(W) = ½ Σ h_i h_j (Uᵀ (W - W*) V)_ij²`` with noisy gradients.

    Args:
        spectrum: h; one number a row and column.
        left: U.
        right: V.
        sigma: standard deviation of the noise, over that of the curvature.
    """

    def __init__(self, spectrum, left, right, sigma=0.0, seed=0):
        self.curvature = spectrum[:, None] * spectrum
        self.left, self.right, self.sigma = left, right, sigma
        self.generator = torch.Generator().manual_seed(seed)
        n = len(spectrum)
        self.goal = torch.randn(n, n, generator=self.generator, dtype=torch.float64)

    def loss(self, weight):
        miss = self.left.T @ weight.double() @ self.right - self.goal
        return float((self.curvature * miss.square()).sum() / 2)

    def gradient(self, weight):
        miss = self.left.T @ weight.double() @ self.right - self.goal
        shape = self.curvature.shape
        shake = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        rotated = self.curvature * miss + self.sigma * self.curvature.sqrt() * shake
        return (self.left @ rotated @ self.right.T).to(weight.dtype)
