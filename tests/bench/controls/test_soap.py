"""SOAP against the paper's algorithm with dense rotations."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_precond.bench.controls.soap import SOAP, SOAPConfig
from tests.bench.controls.oracles import AdamWLoop, SOAPLoop


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("max_dim", [10000, 3])
def test_steps_are_the_papers(shape, max_dim):
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))
    fields = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9), "stat_decay": 0.7}
    config = SOAPConfig.create(basis_interval=3, max_precond_dim=max_dim, **fields)
    optimizer = SOAP([{"params": [weight]}], config)
    oracle = SOAPLoop(shape, (0.8, 0.9), 1e-8, 0.7, 3, max_dim)
    expected = weight.detach().numpy().copy()
    for number in range(11):
        grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        weight.grad = grad.clone()
        optimizer.step()
        step = oracle.direction(grad.numpy())
        assert (step is None) == (number == 0)
        if step is not None:
            expected = (expected - 0.1 * step) * (1 - 0.1 * 0.2)
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-8, atol=1e-10)


def test_vectors_are_stepped_by_adam_after_the_first_step():
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = SOAP([{"params": [weight]}], SOAPConfig.create(lr=0.1, eps=1e-12))
    oracle = AdamWLoop(weight.detach().numpy().copy(), 0.1, (0.95, 0.95), 1e-12, 0.0)
    for number in range(4):
        weight.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
        if number:
            oracle.step(weight.grad.numpy())
        np.testing.assert_allclose(weight.detach().numpy(), oracle.weight, rtol=1e-9)


def test_fields_without_effect_are_refused():
    with pytest.raises(ValueError, match="state_dtype"):
        SOAPConfig.create(state_dtype="bfloat16")
