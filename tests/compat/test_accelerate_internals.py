"""The autocast that Accelerator.prepare wraps a model in, and running without it."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_precond.compat.accelerate_internals import outside_autocast


class Root(nn.Module):
    """Computes something itself, outside its layers, as a fused output layer does."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 2), None

    def forward(self, x):
        product = x @ self.layer.weight
        self.seen = product.dtype
        return product


def test_a_prepared_model_runs_in_float32_inside_and_under_autocast_again_after():
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(Root())
    wrapped, x = model.forward, torch.ones(3, 2)
    with outside_autocast([model, nn.Linear(2, 2)]):
        model(x)
        assert model.seen == torch.float32
    model(x)
    assert model.seen == torch.bfloat16 and model.forward == wrapped
    with pytest.raises(KeyError), outside_autocast([model]):
        raise KeyError
    assert model.forward == wrapped
