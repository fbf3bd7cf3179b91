"""``hf-precond compare``: what trainings reached."""

import json

import pytest
from transformers import EarlyStoppingCallback  # noqa: F401  (transformers' trainer is imported)

from hf_precond.cli.compare import comparison, lower_is_better, read_run
from hf_precond.cli.main import main
from hf_precond.config.hub import CONFIG_FILE


def record(folder, losses, evals, runtime=None, optimizer=None, steps=None):
    """A Trainer's state: a training loss every 10 steps, an evaluation every 20."""
    history = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    for i, (loss, accuracy) in enumerate(evals):
        history.append(
            {"step": 20 * (i + 1), "eval_loss": loss, "eval_accuracy": accuracy,
             "eval_runtime": 1.0, "eval_samples_per_second": 9.0}
        )  # fmt: skip
    if runtime is not None:
        history.append({"step": 10 * len(losses), "train_runtime": runtime, "train_loss": 9.0})
    folder.mkdir(parents=True)
    state = {"global_step": steps or 10 * len(losses), "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if optimizer:
        (folder / CONFIG_FILE).write_text(json.dumps({"optimizer": optimizer}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evals = [(0.9, 0.5), (0.7, 0.8), (0.75, 0.75)]
    record(tmp_path / "adamw", [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], evals, 12.0)
    evals = [(0.6, 0.7), (float("nan"), 0.6), (0.5, 0.9)]
    record(tmp_path / "afopt", [1.0, 0.8, 0.6, 0.4, 0.3, 0.2], evals, 18.0, "afopt")
    record(tmp_path / "killed" / "checkpoint-20", [1.0, 0.9], [(0.8, 0.6)], None, "nkfac")
    record(tmp_path / "killed" / "checkpoint-100", [1.0] * 10, [(0.8, 0.6)], None, "nkfac")
    return ["adamw", "afopt", "killed"]


def cells(text):
    return [line.split() for line in text.splitlines() if line]


def test_the_table_shows_final_and_best_with_steps_and_seconds(runs, capsys):
    assert main(["compare", *runs, "--png", "none"]) == 0
    shown = capsys.readouterr().out
    assert cells(shown) == [
        ["run", "optimizer", "steps", "seconds", "train", "loss"],
        ["adamw", "-", "60", "12.0", "0.5000"],
        ["afopt", "afopt", "60", "18.0", "0.2000"],
        ["killed", "nkfac", "100", "-", "1.0000"],
        ["eval_loss", "final", "best", "at", "step", "at", "second"],
        ["adamw", "0.7500", "0.7000", "40", "8.0"],
        ["afopt", "0.5000", "0.5000", "60", "18.0"],
        ["killed", "0.8000", "0.8000", "20", "-"],
        ["eval_accuracy", "final", "best", "at", "step", "at", "second"],
        ["adamw", "0.7500", "0.8000", "40", "8.0"],
        ["afopt", "0.9000", "0.9000", "60", "18.0"],
        ["killed", "0.6000", "0.6000", "20", "-"],
    ]
    assert max(map(len, shown.splitlines())) <= 80


def test_what_is_missing_for_seconds_is_told(runs, capsys):
    assert main(["compare", "adamw", "killed", "--png", "none"]) == 0
    assert "No seconds" not in capsys.readouterr().out
    assert main(["compare", "killed", "--png", "none"]) == 0
    assert "No seconds: trainer.save_state() after" in capsys.readouterr().out


def test_the_curves_are_written(runs, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["compare", *runs]) == 0
    assert capsys.readouterr().out.endswith("Curves: compare.png\n")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_is_shown(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["compare", *runs]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "compare.png").exists()


def test_the_newest_checkpoint_counts_by_number_and_the_folder_where_it_is_further(tmp_path):
    record(tmp_path / "run" / "checkpoint-20", [1.0] * 2, [])
    record(tmp_path / "run" / "checkpoint-100", [1.0] * 10, [])
    assert read_run(str(tmp_path / "run")).steps == 100
    (tmp_path / "run" / "trainer_state.json").write_text(
        json.dumps({"global_step": 120, "log_history": [{"step": 120, "train_loss": 0.3}]})
    )
    found = read_run(str(tmp_path / "run"))
    assert found.steps == 120 and found.train_loss == 0.3
    (tmp_path / "run" / "all_results.json").write_text(json.dumps({"train_runtime": 7.5}))
    assert read_run(str(tmp_path / "run")).seconds == 7.5
    assert "No evaluation was logged" in comparison([found], 80)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"global_step": "x", "log_history": []}'])
def test_a_state_that_cannot_be_read_is_named(text, tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(text)
    assert main(["compare", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "trainer_state.json: it is no state of a Trainer" in said and said.count("\n") == 1


@pytest.mark.parametrize("file", ["nowhere/curves.png", "curves.pdf"])
def test_a_png_that_cannot_be_written_is_refused(file, runs, capsys):
    assert main(["compare", *runs, "--png", file]) == 2
    assert f"--png {file}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("eval_loss", True), ("eval_wer", True), ("eval_f1", False), ("eval_accuracy", False)],
)
def test_which_metrics_are_best_where_they_are_smallest(metric, lower):
    assert lower_is_better(metric) == lower


def test_a_real_training_is_read(tmp_path):
    from tests.integrations.test_trainer import make

    trainer = make("nkfac", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    run = read_run(str(tmp_path))
    assert (run.steps, run.optimizer) == (4, "nkfac")
    assert run.curve("loss") == [
        (e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e
    ]


def test_folders_without_a_training_are_told_and_left_out(runs, capsys, tmp_path):
    (tmp_path / "plots").mkdir()
    assert main(["compare", "plots", *runs, "--png", "none"]) == 0
    shown = capsys.readouterr()
    assert "left out: plots: there is no trainer_state.json" in shown.err
    assert "plots" not in shown.out and "nkfac" in shown.out
    assert main(["compare", "plots", "--png", "none"]) == 2


def test_an_evaluation_that_was_only_saved_is_shown(tmp_path):
    record(tmp_path / "run", [1.0, 0.9], [])
    results = {"eval_loss": 0.25, "eval_runtime": 1.0, "epoch": 1.0}
    (tmp_path / "run" / "eval_results.json").write_text(json.dumps(results))
    run = read_run(str(tmp_path / "run"))
    assert run.curve("eval_loss") == [(20, 0.25)] and run.metrics() == ["eval_loss"]
