"""Checkpoints and config files written by release 0.1 load, and training goes on as it would have.

The files and the script that wrote them stand in ``tests/data``.
"""

import gzip
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hf_precond

DATA = Path(__file__).parents[2] / "data"
NAMES = ["adamr", "afopt", "nkfac", "sgdph"]


def script():
    """The module that wrote the files."""
    spec = importlib.util.spec_from_file_location("writer", DATA / "write_release_0_1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_ten_more_steps_from_a_checkpoint_of_0_1(name):
    writer = script()
    with gzip.open(DATA / "release_0_1" / f"{name}.pt.gz") as file:
        saved = torch.load(file, weights_only=True)
    net = writer.model()
    vector_to_parameters(saved["weights"].clone(), net.parameters())
    if name == "afopt":  # its default has changed since
        optimizer = hf_precond.create_optimizer(net, name, **writer.FIELDS[name])
        with pytest.raises(ValueError, match="scaling='rms' there and 'adaptive' here"):
            optimizer.load_state_dict(saved["optimizer"])
    config = hf_precond.load_config(DATA / "release_0_1" / f"{name}.json")
    optimizer = hf_precond.create_optimizer(net, config)
    optimizer.load_state_dict(saved["optimizer"])
    writer.train(net, optimizer, writer.BEFORE, writer.AFTER)
    reached = parameters_to_vector(net.parameters()).detach()
    moved = (saved["expected"] - saved["weights"]).abs()
    assert moved.max() > 1e-3, "the recorded steps changed nothing"
    torch.testing.assert_close(reached, saved["expected"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_file_of_0_1_loads_with_its_fields(name):
    config = hf_precond.load_config(DATA / "release_0_1" / f"{name}.json")
    assert config.name == name
    for field, value in script().FIELDS[name].items():
        assert getattr(config, field) == value


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_another_optimizer_is_still_refused(name):
    writer = script()
    other = NAMES[NAMES.index(name) - 1]
    with gzip.open(DATA / "release_0_1" / f"{other}.pt.gz") as file:
        saved = torch.load(file, weights_only=True)
    optimizer = hf_precond.create_optimizer(writer.model(), name, **writer.FIELDS[name])
    with pytest.raises(ValueError, match=other):
        optimizer.load_state_dict(saved["optimizer"])
