"""The local metrics against closed forms, and entities against seqeval."""

import importlib.util
import random

import pytest

from tests.examples.scripts import EXAMPLES


def load(name, cls, folder):
    path = EXAMPLES / "metrics" / name / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, cls)(cache_dir=str(folder))


@pytest.fixture
def metric(tmp_path):
    return load("accuracy", "Accuracy", tmp_path)


@pytest.fixture
def entities(tmp_path):
    return load("entity_f1", "EntityF1", tmp_path)


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


def test_texts_match_as_a_whole(tmp_path):
    exact = load("exact_match", "ExactMatch", tmp_path)
    pairs = {"predictions": ["a b", "a", "A", ""], "references": ["a b", "a ", "a", ""]}
    assert exact.compute(**pairs) == {"exact_match": 0.5}


def test_entities_need_their_type_and_both_ends(entities):
    scores = entities.compute(
        predictions=[["B-x", "I-x", "O", "B-y"], ["B-x", "B-x"]],
        references=[["B-x", "I-x", "O", "B-x"], ["B-x", "I-x"]],
    )
    assert scores == {
        "overall_precision": 1 / 4,
        "overall_recall": 1 / 3,
        "overall_f1": 2 / 7,
        "overall_accuracy": 4 / 6,
    }


def test_nothing_found_is_zero(entities):
    scores = entities.compute(predictions=[["O", "O"]], references=[["O", "B-x"]])
    assert scores["overall_f1"] == scores["overall_precision"] == scores["overall_recall"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_entities_are_counted_as_seqeval_counts_them(seed, entities):
    """Random tags, also those that no annotator writes: I- after O, and after another type."""
    from seqeval import metrics

    draw = random.Random(seed)
    tags = ["O", "B-x", "I-x", "B-y", "I-y", "B-two-part", "I-two-part"]
    lengths = [draw.randrange(1, 12) for _ in range(60)]
    predicted, true = ([draw.choices(tags, k=n) for n in lengths] for _ in range(2))
    # Most of the tags are right, so that some entities are.
    predicted = [
        [right if draw.random() < 0.7 else tag for tag, right in zip(a, b, strict=True)]
        for a, b in zip(predicted, true, strict=True)
    ]
    scores = entities.compute(predictions=predicted, references=true)
    assert 0.1 < scores["overall_f1"] < 0.9
    assert scores["overall_f1"] == pytest.approx(metrics.f1_score(true, predicted), abs=1e-12)
    assert scores["overall_precision"] == pytest.approx(
        metrics.precision_score(true, predicted), abs=1e-12
    )
    assert scores["overall_recall"] == pytest.approx(
        metrics.recall_score(true, predicted), abs=1e-12
    )
    assert scores["overall_accuracy"] == metrics.accuracy_score(true, predicted)
