"""The tasks and files of the benchmarks: what recall asks, and that they train."""

import sys
from dataclasses import replace

import pytest
import torch

from hf_precond.bench import spec
from hf_precond.bench import tasks as bench_tasks
from hf_precond.bench.training import train
from tests.examples.scripts import EXAMPLES


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    yield __import__("tasks")
    sys.modules.pop("tasks", None)


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
        oracle = Oracle(wrong)
        oracle.scale = torch.nn.Parameter(torch.ones(()))
        assert tasks.next_tokens(oracle, held) == {"loss": 1.5, "accuracy": accuracy}


@pytest.mark.parametrize("path", sorted((EXAMPLES / "benchmarks").glob("*.toml")), ids=str)
def test_the_shipped_files_are_legal(path):
    found = spec.load(path)
    assert f"hf-precond bench examples/benchmarks/{path.name}" in found.text
    for task, entries in found.entries.items():
        function = found.tasks[task].function
        assert function and callable(bench_tasks.find(function)), task
        assert entries


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [("recall", "recall"), ("sgdph", "resnet")])
def test_every_optimizer_runs_on_them(name, task, tmp_path):
    found = spec.load(EXAMPLES / "benchmarks" / f"{name}.toml")
    for entry in found.entries[task].values():
        (run,) = spec.runs_of(found, entry, task, entry.start, [1], False)
        training = replace(run.task.training, steps=4)
        result = train(replace(run, task=replace(run.task, training=training)))
        assert result["steps"] == 4 and not result["diverged"]
