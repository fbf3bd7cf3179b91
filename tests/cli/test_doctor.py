"""``hf-precond doctor`` tries what it says works."""

import pytest
import torch
from transformers import Trainer

from hf_precond.cli import doctor
from hf_precond.cli.main import main
from hf_precond.registry import list_optimizers


def rows(shown):
    """Optimizer to what its row says."""
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    return {line[0]: line[1] for line in lines if line and line[0] in list_optimizers()}


def test_versions_and_devices_are_shown():
    assert any(line.split() == ["torch", torch.__version__] for line in doctor.versions())
    assert doctor.devices()[0].startswith("cpu")


def test_one_optimizer_is_tried(capsys):
    assert main(["doctor", "--optim", "nkfac"]) == 0
    shown = capsys.readouterr().out
    assert list(rows(shown)) == ["nkfac"] and rows(shown)["nkfac"].startswith("yes")
    assert "All is well." in shown and max(map(len, shown.splitlines())) <= 80


def test_a_training_that_does_not_learn_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "TRIALS", {"bf16": lambda *_: "", f"{doctor.STEPS} steps": doctor._smoke}
    )
    monkeypatch.setattr(doctor, "_train", lambda *_, **fields: [1.0] * doctor.STEPS)
    assert main(["doctor", "--optim", "afopt"]) == 1
    shown = capsys.readouterr().out
    assert "no [1]" in shown and "the loss went from 1.000 to 1.000" in shown
    assert "Do not train with afopt here." in shown


@pytest.mark.parametrize(("bad", "said"), [("nan", "not finite"), ("still", "no weight moved")])
def test_a_step_that_does_nothing_or_diverges_is_no_success(bad, said, tmp_path, monkeypatch):
    def train(trainer):
        trainer.state.log_history.append({"loss": float("nan") if bad == "nan" else 1.0})

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(RuntimeError, match=said):
        doctor._train("adamr", str(tmp_path), steps=1)


@pytest.mark.slow
def test_every_optimizer_is_tried(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert list(rows(shown)) == list_optimizers()
    assert all(row.startswith("yes") for row in rows(shown).values())
