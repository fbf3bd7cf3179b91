"""Faults under a real Trainer: bad batches, failing solvers, checkpoints that are not whole."""

import json
import math
import shutil

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_precond import PrecondTrainer
from hf_precond.integrations.arguments import own_optimizer
from hf_precond.integrations.trainer import damage, last_checkpoint
from hf_precond.registry import list_optimizers
from tests.integrations.test_trainer import OFTEN, losses, make, scaled
from tests.integrations.tiny import bert
from tests.optimizers.models import weights
from tests.optimizers.test_faults import ERRORS, NEEDED, Failing

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)
CALM = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}


def vectors(count=64, bad=()):
    """Sequences of vectors; the rows numbered in ``bad`` hold numbers that are not finite."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 8, 16, generator=generator)
    labels = (rows[:, 0, 0] > 0).long()
    for number, row in enumerate(bad):
        rows[row, number % 8, 3] = (math.nan, math.inf)[number % 2]
    return [{"inputs_embeds": x, "labels": y} for x, y in zip(rows, labels, strict=True)]


def surviving(name):
    return f"{OFTEN[name]},skip_nonfinite=true"


# Bad batches -------------------------------------------------------------------------------


@each_name
def test_bad_batches_are_left_out_and_logged(name, tmp_path):
    rows = vectors(bad=(8, 41))
    fields = {"optim_args": surviving(name), **CALM}
    trainer = make(name, tmp_path, data=rows, max_steps=8, cls=PrecondTrainer, **fields)
    trainer.train()
    # Rows 8-15 and 40-47 are the second and the sixth batch.
    clean = [row for n, row in enumerate(rows) if n // 8 not in (1, 5)]
    without = make(name, tmp_path, data=clean, max_steps=6, cls=PrecondTrainer, **fields)
    without.train()
    assert own_optimizer(trainer.optimizer).steps == 6
    for key, value in weights(trainer.model).items():
        assert torch.equal(value, weights(without.model)[key]), key
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = [entry.get("optim_skipped_steps", 0.0) for entry in logs]
    assert seen == [0.0] + [1.0] * 4 + [2.0] * 3


@pytest.mark.slow
@each_name
def test_a_bad_micro_batch_leaves_its_whole_step_out(name, tmp_path):
    rows = vectors(bad=(13,))
    fields = {"optim_args": surviving(name), **CALM}
    trainer = make(
        name, tmp_path, data=rows, max_steps=4, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, **fields,
    )  # fmt: skip
    trainer.train()
    clean = [row for n, row in enumerate(rows) if n // 8 != 1]
    without = make(
        name, tmp_path, data=clean, max_steps=3, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, **fields,
    )  # fmt: skip
    without.train()
    for key, value in weights(trainer.model).items():
        assert torch.equal(value, weights(without.model)[key]), key


@each_name
def test_a_run_that_is_lost_stops_with_advice_and_can_be_gone_back_from(name, tmp_path):
    """Without skip_nonfinite the weights take the bad batch in, as torch's optimizers do."""
    rows = vectors(count=400, bad=(8 * 5,))
    trainer = make(
        name, tmp_path, data=rows, max_steps=50, save_strategy="steps", save_steps=4, **CALM
    )
    with pytest.raises(RuntimeError, match=r"10 .*in a row.*checkpoint.*skip_nonfinite=True"):
        trainer.train()
    assert trainer.state.global_step <= 30
    again = make(name, tmp_path, data=rows, max_steps=12, optim_args=surviving(name), **CALM)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 12
    assert all(torch.isfinite(p).all() for p in again.model.parameters())


# Failing solvers -----------------------------------------------------------------------------


class Fault(TrainerCallback):
    """A solver that fails from one step to another."""

    def __init__(self, monkeypatch, solver, first, last):
        self.monkeypatch, self.solver, self.first, self.last = monkeypatch, solver, first, last

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            Failing(self.monkeypatch, self.solver, ERRORS["out_of_memory"])
        if state.global_step == self.last:
            self.monkeypatch.undo()


@pytest.mark.parametrize("name", [name for name in NAMES if NEEDED[name]])
def test_training_goes_on_where_a_solver_fails_for_a_while(name, tmp_path, monkeypatch):
    more = ",basis_tolerance=0" if name == "adamr" else ""
    trainer = make(name, tmp_path, max_steps=12, optim_args=OFTEN[name] + more, learning_rate=1e-2)
    trainer.add_callback(Fault(monkeypatch, NEEDED[name][0], 6, 8))
    trainer.train()
    seen = losses(trainer)
    assert len(seen) == 12 and all(map(math.isfinite, seen))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = [e.get("optim_refresh_out_of_memory", 0) + e.get("optim_inverse_kept", 0) for e in logs]
    assert kept[5] == 0 and kept[7] > 0 and kept[-1] == kept[7]


@pytest.mark.parametrize("name", [name for name in NAMES if NEEDED[name]])
def test_training_stops_where_a_solver_fails_for_good(name, tmp_path, monkeypatch):
    more = ",basis_tolerance=0" if name == "adamr" else ""
    trainer = make(name, tmp_path, max_steps=30, optim_args=OFTEN[name] + more)
    trainer.add_callback(Fault(monkeypatch, NEEDED[name][0], 6, 30))
    with pytest.raises(RuntimeError, match="3 times in a row"):
        trainer.train()
    assert 8 <= trainer.state.global_step <= 14


# Checkpoints -----------------------------------------------------------------------------------


def saved(name, folder, **fields):
    trainer = make(
        name, folder, cls=PrecondTrainer, max_steps=6, save_strategy="steps", save_steps=2, **fields
    )
    trainer.train()
    return trainer


def truncate(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path.read_bytes()


@each_name
def test_a_truncated_optimizer_is_refused_and_the_last_whole_checkpoint_found(name, tmp_path):
    whole = saved(name, tmp_path)
    file = tmp_path / "checkpoint-6" / "optimizer.pt"
    left = truncate(file)
    broken = make(name, tmp_path, bert(seed=3), max_steps=6)
    with pytest.raises((OSError, RuntimeError)):  # torch.load's, without the file's name
        broken.train(resume_from_checkpoint=str(file.parent))
    assert not own_optimizer(broken.optimizer).state
    named = make(name, tmp_path, bert(seed=3), cls=PrecondTrainer, max_steps=6)
    with pytest.raises(ValueError, match=r"optimizer\.pt: it ends too early.*earlier checkpoint"):
        named.train(resume_from_checkpoint=str(file.parent))
    assert file.read_bytes() == left
    again = make(name, tmp_path, bert(seed=3), cls=PrecondTrainer, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    for key, value in weights(again.model).items():
        assert torch.equal(value, weights(whole.model)[key]), key


@each_name
def test_a_checkpoint_of_another_optimizer_is_refused_under_the_trainer(name, tmp_path):
    saved(name, tmp_path)
    other = NAMES[NAMES.index(name) - 1]
    trainer = make(other, tmp_path, max_steps=8)
    with pytest.raises(ValueError, match=f"saved by {name}; resume with --optim {name}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_of_another_model_is_refused_under_the_trainer(tmp_path):
    saved("nkfac", tmp_path)
    trainer = make("nkfac", tmp_path, bert(num_labels=3), max_steps=8)
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    # The same weights, but other parameters are trained.
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    trainer = make("nkfac", tmp_path, model, max_steps=8)
    with pytest.raises(ValueError, match=r"another model.*embeddings"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_damage_is_found_in_every_file(tmp_path):
    saved("adamr", tmp_path)
    checkpoint = tmp_path / "checkpoint-6"
    assert damage(checkpoint) is None and last_checkpoint(tmp_path) == str(checkpoint)
    names = {path.name for path in checkpoint.iterdir()}
    looked_at = {"optimizer.pt", "scheduler.pt", "model.safetensors", "training_args.bin"}
    looked_at |= {"rng_state.pth", "trainer_state.json"}
    assert looked_at <= names
    for name in looked_at:
        broken = tmp_path / "copy" / "checkpoint-9"
        shutil.copytree(checkpoint, broken)
        truncate(broken / name)
        assert name in damage(broken)
        (broken / name).write_bytes(b"")
        assert name in damage(broken)
        assert last_checkpoint(tmp_path / "copy") is None
        shutil.rmtree(broken)
    shutil.copytree(checkpoint, broken)
    (broken / "trainer_state.json").unlink()
    assert "saved last" in damage(broken)


@pytest.mark.parametrize(
    "lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]
)
def test_a_checkpoint_that_lost_a_file_is_passed_over(lost, tmp_path, caplog):
    saved("adamr", tmp_path)
    (tmp_path / "checkpoint-6" / lost).unlink()
    with caplog.at_level("WARNING"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert "checkpoint-6" in caplog.text and "passed over" in caplog.text


def test_a_run_that_saves_only_models_goes_on_from_one_and_says_so(tmp_path, caplog):
    fields = {"cls": PrecondTrainer, "save_strategy": "steps", "save_steps": 2}
    make("afopt", tmp_path, max_steps=4, save_only_model=True, **fields).train()
    again = make("afopt", tmp_path, max_steps=6, **fields)
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and own_optimizer(again.optimizer).steps == 2
    assert "goes on at step 4" in caplog.text and "optimizer starts anew" in caplog.text


def test_the_newest_whole_checkpoint_is_found_by_its_number(tmp_path):
    saved("adamr", tmp_path)
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-14").write_text("a file")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path / "none") is None
    assert json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())


def test_resuming_without_any_checkpoint_is_the_trainers_own_error(tmp_path):
    trainer = make("adamr", tmp_path, cls=PrecondTrainer)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer.train(resume_from_checkpoint=True)


# Mixed precision -------------------------------------------------------------------------------


class Half(Trainer):
    """Float16 passes, which a Trainer on a CPU leaves out."""

    def autocast_smart_context_manager(self, cache_enabled=True):
        return torch.autocast("cpu", torch.float16, cache_enabled=cache_enabled)


@pytest.mark.slow
@each_name
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_classifier_learns_under_autocast(name, kind, tmp_path):
    fields = {"max_steps": 40, "learning_rate": 2e-2}
    if kind == "bfloat16":
        trainer = make(name, tmp_path, bf16=True, **fields)
        trainer.train()
    else:
        # Starts with a scale that overflows, as on a GPU, and finds its way down.
        trainer = scaled(make(name, tmp_path, cls=Half, **fields), 2.0**24)
        assert own_optimizer(trainer.optimizer).steps < 40
    seen = losses(trainer)
    assert len(seen) == 40
    assert sum(seen[-8:]) < 0.7 * sum(seen[:8])
    state = own_optimizer(trainer.optimizer).state
    for held in state.values():
        for key, value in held.items():
            if torch.is_tensor(value) and value.is_floating_point():
                assert value.dtype == torch.float32, key
