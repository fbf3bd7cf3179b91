"""Probes under bfloat16 autocast against those in float32."""

import contextlib

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_precond.registry import create_optimizer
from tests.rounding import accelerator


def probed(device_is_accelerator, steps=1, **fields):
    """Estimates of the Hessian's diagonal at successive steps, all norms end to end."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=48, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4,
        vocab_size=60, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(2.5)
    data = {"input_ids": torch.randint(0, 60, (16, 16)), "labels": torch.randint(0, 5, (16,))}
    optimizer = create_optimizer(model, "sgdph", lr=1e-4, probe_interval=1, **fields)
    found = []
    for step in range(steps):
        optimizer.statistics.enable(True, step)
        device = accelerator() if device_is_accelerator else contextlib.nullcontext()
        with device, optimizer.curvature_context():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**data).loss
            optimizer.probe(loss)
        taken = optimizer.statistics.take()
        found.append(torch.cat([statistic.sum.flatten() for statistic in taken.values()]))
    optimizer.close()
    return torch.stack(found)


def test_bfloat16_is_left_on_accelerators_alone():
    low, full = (probed(False, probe_autocast=asked) for asked in (True, False))
    assert not torch.equal(low, full)
    torch.testing.assert_close(probed(False), full)
    torch.testing.assert_close(probed(True), probed(True, probe_autocast=True))


def test_rounding_is_nothing_beside_the_spread_over_random_signs():
    """The oracle of the default on accelerators."""
    low, full = (probed(False, 6, probe_autocast=asked) for asked in (True, False))
    errors = (low - full).norm(dim=1) / full.norm(dim=1)
    spread = full.std(0).norm() / full.mean(0).norm()
    assert errors.max() <= 0.02 and spread >= 20 * errors.max()
