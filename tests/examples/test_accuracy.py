"""The accuracy module against closed forms."""

import importlib.util

import pytest

from tests.examples.scripts import EXAMPLES


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    path = EXAMPLES / "metrics" / "accuracy" / "accuracy.py"
    spec = importlib.util.spec_from_file_location("accuracy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Accuracy(cache_dir=str(tmp_path_factory.mktemp("metrics")))


def test_share_and_number(metric):
    pairs = {"predictions": [0, 1, 2, 2], "references": [0, 1, 1, 2]}
    assert metric.compute(**pairs) == {"accuracy": 0.75}
    assert metric.compute(**pairs, normalize=False) == {"accuracy": 3.0}


def test_sample_weight(metric):
    pairs = {"predictions": [0, 1, 2], "references": [0, 1, 1], "sample_weight": [1.0, 2.0, 5.0]}
    assert metric.compute(**pairs) == {"accuracy": 0.375}
    assert metric.compute(**pairs, normalize=False) == {"accuracy": 3.0}


def test_batches_add_up(metric):
    metric.add_batch(predictions=[1, 1], references=[1, 0])
    metric.add_batch(predictions=[3], references=[3])
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)
