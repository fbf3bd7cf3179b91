"""How many functions a plain step of BERT-base calls: on a GPU most steps wait for the host."""

import contextlib
import cProfile
import pstats
import warnings
from unittest import mock

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_precond.compat import devices
from hf_precond.registry import create_optimizer

PLAIN = 31
"""A step after the first refreshes, without statistics in the default intervals."""


def bert(layers):
    """BERT-base's modules at a tiny width: what their kernels cost is nothing."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=16, num_attention_heads=4, intermediate_size=24,
        vocab_size=32, max_position_embeddings=8,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@contextlib.contextmanager
def accelerator():
    """Inside, the CPU takes an accelerator's path; its products are not rounded as one's are."""
    with (
        mock.patch.object(devices, "is_accelerator", lambda tensor: True),
        mock.patch.object(devices, "has_tf32", lambda device: True),
        mock.patch.object(torch.Tensor, "is_cpu", property(lambda tensor: False)),
    ):
        yield


def calls(name, layers=12, **fields):
    """The least number of calls of a few steps on an accelerator's path."""
    model = bert(layers)
    with accelerator(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = create_optimizer(model, name, lr=1e-4, weight_decay=0.01, **fields)
        if name == "sgdph":  # no probe is due
            optimizer.close()
            optimizer.due = lambda step: False
        found = []
        data = {"input_ids": torch.arange(32).view(4, 8), "labels": torch.tensor([0, 1, 0, 1])}
        for step in range(PLAIN + 3):
            optimizer.zero_grad()
            model(**data).loss.backward()
            with cProfile.Profile() as profile:
                optimizer.step()
            if step >= PLAIN:
                found.append(pstats.Stats(profile).total_calls)
        optimizer.close()
    return min(found)


@pytest.mark.parametrize(
    ("name", "fields", "limit"),
    [
        ("afopt", {}, 3500),
        ("afopt", {"scope": "attention"}, 2600),
        ("adamr", {}, 14000),  # some bases are refreshed at every step
        ("muon", {}, 1700),
        ("nkfac", {}, 2400),
        ("sgdph", {}, 1300),
    ],
    ids=str,
)
def test_a_plain_step(name, fields, limit):
    assert calls(name, **fields) <= limit
