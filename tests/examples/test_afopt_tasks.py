"""The benchmark's associative recall: what its batches ask, and that an optimizer trains on it."""

import json
import sys

import pytest
import torch

from tests.examples.scripts import EXAMPLES, run_example


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    yield __import__("afopt_tasks")
    sys.modules.pop("afopt_tasks", None)


def test_every_key_is_asked_once_and_only_its_value_is_a_label(tasks):
    batch = tasks.recall_batch(32, torch.Generator().manual_seed(3))
    tokens, labels = batch["input_ids"], batch["labels"]
    assert tokens.shape == labels.shape == (32, 48)
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        known = dict(zip(row[:24:2], row[1:24:2], strict=True))
        assert len(known) == 12 and max(known) < 32
        assert all(32 <= value < 64 for value in known.values())
        assert sorted(row[24::2]) == sorted(known)
        assert row[25::2] == [known[key] for key in row[24::2]]
        asked = [place for place, wanted in enumerate(label) if wanted >= 0]
        assert asked == list(range(25, 48, 2))
        assert label[25::2] == row[25::2]


def test_batches_are_fixed_by_the_seed(tasks):
    draws = [tasks.recall_batch(4, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    ids = [draw["input_ids"] for draw in draws]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


def test_accuracy_counts_the_asked_values_alone(tasks):
    """A model that repeats its labels' tokens everywhere is right on all of them."""

    class Oracle(torch.nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.wrong = wrong

        def forward(self, input_ids, labels):
            following = input_ids.roll(-1, 1)
            following[:, 25::2] = 0  # what follows a value has no label
            following[:, :24] = 0
            following[: self.wrong] = 0
            logits = torch.nn.functional.one_hot(following, 64).float()
            return type("Output", (), {"loss": torch.tensor(1.5), "logits": logits})

    held = [tasks.recall_batch(8, torch.Generator().manual_seed(0)) for _ in range(2)]
    for wrong, accuracy in ((0, 1.0), (2, 0.75)):
        found = tasks.Task(Oracle(wrong), lambda: held[0], held, (0.9, 0.95)).evaluate()
        assert found == {"loss": 1.5, "accuracy": accuracy}


@pytest.mark.slow
def test_every_optimizer_runs_on_recall(tmp_path):
    specs = ("adamw:lr=4e-3,beta2=0.99", "muon:lr=4e-3,scope=attention", "afopt:lr=1e-3")
    runs = [part for spec in specs for part in ("--run", spec)]
    run_example(
        "benchmarks/afopt.py",
        *("--data", str(tmp_path), "--task", "recall", "--steps", "4", *runs),
        folder=tmp_path,
    )
    records = [json.loads(line) for line in (tmp_path / "afopt.jsonl").read_text().splitlines()]
    assert [record["run"] for record in records] == list(specs)
    assert all(record["evaluations"][-1]["step"] == 4 for record in records)
    assert all(record["train_loss"] < 6 for record in records)
