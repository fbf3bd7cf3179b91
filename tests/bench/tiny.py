"""A task of milliseconds: two layers fitted to a function; as a user's own file would have it."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x, y):
        return {"loss": (self.body(x) - y).square().mean()}


def make(seed, width=8, fail=None, data=None):
    """Returns model, batches and evaluation; ``fail`` is a step at which a batch raises."""
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    model = Net(width)
    truth = torch.randn(4, 2, generator=torch.Generator().manual_seed(5))

    def draw(step):
        if step == fail:
            raise ArithmeticError(f"no batch {step}")
        x = torch.randn(16, 4, generator=generator)
        return {"x": x, "y": torch.sin(x @ truth)}

    held = torch.randn(64, 4, generator=torch.Generator().manual_seed(7))

    @torch.no_grad()
    def evaluate(model):
        return {"loss": model(held, torch.sin(held @ truth))["loss"].item(), "half": 0.5}

    return model, draw, evaluate
