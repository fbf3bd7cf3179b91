"""SOAP-Muon against SOAP's dense direction and the sign of its singular values."""

import numpy as np
import torch

from hf_precond.bench import optimizers
from tests.bench.controls.oracles import AdamWLoop, SOAPLoop, batch, net, sign_by_svd

FIELDS = {"lr": 0.05, "weight_decay": 0.1, "lr_scale": 2.0, "basis_interval": 3}


def test_matrices_take_the_sign_of_soaps_step_and_the_rest_adamws():
    # At most one dimension of a factor's null space, where its eigenvectors are arbitrary.
    model, generator = net(4, 3), torch.Generator().manual_seed(2)
    optimizer = optimizers.build(model, "soap_muon", FIELDS, 1)
    weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    soap = {
        name: SOAPLoop(weights[name].shape, (0.95, 0.95), 1e-8, 0.95, 3)
        for name in ("up.weight", "down.weight")
    }
    adamw = {
        name: AdamWLoop(weights[name], 0.05, (0.9, 0.999), 1e-8, 0.1 * ("weight" in name))
        for name in weights
        if name not in soap
    }
    for _ in range(8):
        optimizer.zero_grad()
        model(*batch(generator)).backward()
        grads = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        optimizer.step()
        for name, loop in soap.items():
            direction = loop.direction(grads[name])
            if direction is None:
                continue
            length = 2.0 * 0.2 * np.sqrt(max(direction.shape))
            weights[name] = (1 - 0.05 * 0.1) * weights[name]
            weights[name] = weights[name] - 0.05 * length * sign_by_svd(direction)
        for name, loop in adamw.items():
            loop.step(grads[name])
            weights[name] = loop.weight
        for name, parameter in model.named_parameters():
            found = parameter.detach().numpy()
            np.testing.assert_allclose(found, weights[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_momentum_is_the_first_decay_rate():
    models = [net(), net()]
    fields = [{"momentum": 0.7}, {"soap_betas": (0.7, 0.95)}]
    for model, given in zip(models, fields, strict=True):
        generator = torch.Generator().manual_seed(2)
        optimizer = optimizers.build(model, "soap_muon", FIELDS | given, 1)
        for _ in range(4):
            optimizer.zero_grad()
            model(*batch(generator)).backward()
            optimizer.step()
    assert torch.equal(models[0].up.weight, models[1].up.weight)
