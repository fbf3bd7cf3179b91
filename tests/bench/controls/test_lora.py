"""LoRA+ and LoRA-Muon against their formulas, on a layer with an adapter."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_precond.bench import optimizers
from tests.bench.controls.oracles import AdamWLoop, batch, net, sign_by_svd

SCALE = 1.5


def adapted():
    config = LoraConfig(
        r=2, lora_alpha=2 * SCALE, target_modules=["down"], modules_to_save=["head"]
    )
    return get_peft_model(net(width=6), config).double()


def trained(model):
    short = {"lora_A": "A", "lora_B": "B", "head": "head"}
    return {
        next((short[key] for key in short if key in name), name) + "." + name.rsplit(".", 1)[1]: p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def damped_root(gram, damping):
    ridge = damping * np.trace(gram) / len(gram)
    if ridge == 0:
        return np.zeros_like(gram)
    values, vectors = np.linalg.eigh(gram + ridge * np.eye(len(gram)))
    return vectors @ np.diag(values**-0.5) @ vectors.T


@pytest.mark.parametrize("nesterov", [True, False])
def test_lora_muon_is_the_formula(nesterov):
    model, generator = adapted(), torch.Generator().manual_seed(3)
    fields = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.8, "nesterov": nesterov}
    fields |= {"lr_scale": 3.0, "damping": 1e-2}
    optimizer = optimizers.build(model, "lora_muon", fields, 1)
    weights = {name: p.detach().numpy().copy() for name, p in trained(model).items()}
    adamw = {
        name: AdamWLoop(weights[name], 0.05, (0.9, 0.999), 1e-8, 0.1 * ("weight" in name))
        for name in ("head.weight", "head.bias")
    }
    momenta = {"A.weight": 0, "B.weight": 0}
    length = 3.0 * 0.2 * np.sqrt(6) / (2 * SCALE)
    for _ in range(8):
        optimizer.zero_grad()
        model(*batch(generator)).backward()
        grads = {name: p.grad.numpy().copy() for name, p in trained(model).items()}
        optimizer.step()
        a, b = weights["A.weight"], weights["B.weight"]
        root_a, root_b = damped_root(a @ a.T, 1e-2), damped_root(b.T @ b, 1e-2)
        for name in momenta:
            momenta[name] = 0.8 * momenta[name] + grads[name]
            ahead = grads[name] + 0.8 * momenta[name] if nesterov else momenta[name]
            if name == "B.weight":
                found = sign_by_svd(ahead @ root_a) @ root_a
            else:
                inside = root_b @ ahead
                found = root_b @ sign_by_svd(inside) if inside.any() else np.zeros_like(a)
            weights[name] = (1 - 0.05 * 0.1) * weights[name] - 0.05 * length * found
        for name, loop in adamw.items():
            loop.step(grads[name])
            weights[name] = loop.weight
        for name, parameter in trained(model).items():
            found = parameter.detach().numpy()
            np.testing.assert_allclose(found, weights[name], rtol=1e-6, atol=1e-9, err_msg=name)
    optimizer.close()


def test_lora_plus_is_adamw_with_a_larger_rate_of_b():
    model, generator = adapted(), torch.Generator().manual_seed(3)
    fields = {"lr": 0.01, "weight_decay": 0.1, "ratio": 4.0, "beta2": 0.99}
    optimizer = optimizers.build(model, "lora_plus", fields, 1)
    weights = {name: p.detach().numpy().copy() for name, p in trained(model).items()}
    loops = {
        name: AdamWLoop(
            w, 0.04 if name[0] == "B" else 0.01, (0.9, 0.99), 1e-8, 0.1 * ("weight" in name)
        )
        for name, w in weights.items()
    }
    for _ in range(5):
        optimizer.zero_grad()
        model(*batch(generator)).backward()
        for name, parameter in trained(model).items():
            loops[name].step(parameter.grad.numpy().copy())
        optimizer.step()
        for name, parameter in trained(model).items():
            found = parameter.detach().numpy()
            np.testing.assert_allclose(found, loops[name].weight, rtol=1e-9, atol=1e-12)
    optimizer.close()


@pytest.mark.parametrize("name", ["lora_plus", "lora_muon"])
def test_a_model_without_adapters_is_refused(name):
    with pytest.raises(ValueError, match="lora_rank"):
        optimizers.build(net(), name, {"lr": 0.01}, 1)
