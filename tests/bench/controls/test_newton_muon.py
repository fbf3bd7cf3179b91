"""Newton-Muon against its formula with dense inverses."""

import numpy as np
import pytest
import torch

from hf_precond.bench import optimizers
from hf_precond.bench.controls.newton_muon import times_blocks
from tests.bench.controls.oracles import AdamWLoop, batch, net, sign_by_svd


def ridged_inverse(moment, blocks):
    """The inverse of every diagonal block with .2 of its mean eigenvalue added."""
    found, width = np.zeros_like(moment), len(moment) // blocks
    for start in range(0, len(moment), width):
        part = slice(start, start + width)
        block = moment[part, part]
        ridge = 0.2 * np.trace(block) / width
        found[part, part] = np.linalg.inv(block + ridge * np.eye(width))
    return found


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_the_formulas(nesterov):
    model, generator = net(), torch.Generator().manual_seed(3)
    fields = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.8, "nesterov": nesterov}
    fields |= {"inverse_interval": 3, "stat_decay": 0.6, "lr_scale": 2.0}
    optimizer = optimizers.build(model, "newton_muon", fields, 1)
    weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    adamw = {
        name: AdamWLoop(weights[name], 0.05, (0.9, 0.999), 1e-8, 0.1 * ("weight" in name))
        for name in ("down.bias", "head.weight", "head.bias")
    }
    blocks = {"up.weight": 1, "down.weight": 4}  # the input of down is twice its output
    moments, momenta, inverses = {}, {}, {}
    for step in range(8):
        x, y = batch(generator)
        inputs = {"up.weight": x.numpy(), "down.weight": model.hidden(x).detach().numpy()}
        optimizer.zero_grad()
        model(x, y).backward()
        grads = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        optimizer.step()
        for name, rows in inputs.items():
            if step % 3 == 0:
                keep = min(0.6, 1 - 1 / (step // 3 + 1))
                mean = rows.T @ rows / len(rows)
                moments[name] = keep * moments.get(name, 0) + (1 - keep) * mean
                inverses[name] = ridged_inverse(moments[name], blocks[name])
            gradient = grads[name] @ inverses[name]
            momenta[name] = 0.8 * momenta.get(name, 0) + gradient
            ahead = gradient + 0.8 * momenta[name] if nesterov else momenta[name]
            length = 2.0 * 0.2 * np.sqrt(max(gradient.shape))
            weights[name] = (1 - 0.05 * 0.1) * weights[name] - 0.05 * length * sign_by_svd(ahead)
        for name, loop in adamw.items():
            loop.step(grads[name])
            weights[name] = loop.weight
        for name, parameter in model.named_parameters():
            found = parameter.detach().numpy()
            np.testing.assert_allclose(found, weights[name], rtol=1e-6, atol=1e-9, err_msg=name)
    optimizer.close()


def test_blocks_that_do_not_divide_the_columns_are_cut():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator)
    blocks = torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=generator)
    whole = torch.stack([torch.block_diag(*b)[:7, :7] for b in blocks])
    torch.testing.assert_close(times_blocks(matrices, blocks), matrices @ whole)
