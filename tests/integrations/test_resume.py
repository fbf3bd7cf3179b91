"""Half a run, saved, gone on with by new processes: bit for bit what the whole run is."""

import logging

import pytest
import torch
from transformers import Trainer

from hf_precond import load_config
from hf_precond.integrations.arguments import own_optimizer
from hf_precond.registry import list_optimizers
from tests import ranks
from tests.integrations.test_trainer import losses, make
from tests.integrations.tiny import bert, llama, text_data
from tests.optimizers.models import weights

NAMES = list_optimizers()
SAVED, LAST = 3, 6
# Statistics every other step and refreshes every fourth: the checkpoint lies between both.
MIDWAY = {
    "adamr": "basis_source=feature,stat_interval=2,basis_interval=4",
    "afopt": "scope=all_linear,stat_interval=2,inverse_interval=4",
    "muon": "variant=normuon",
    "nkfac": "stat_interval=2,inverse_interval=4",
    "sgdph": "probe_interval=2",
}
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [(name, kind) for name in NAMES for kind in KINDS]


def trainer_of(name, kind, folder, seed, size, family=bert, cls=Trainer):
    """A Trainer that saves after half of its steps; eight rows a step over all ranks."""
    data = text_data()
    if family is llama:
        data = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in data]
    return make(
        name,
        f"{folder}/{name}-{kind}",
        family(seed=seed).to(KINDS[kind]),
        data,
        cls,
        optim_args=MIDWAY[name],
        max_steps=LAST,
        per_device_train_batch_size=8 // size,
        save_strategy="steps",
        save_steps=SAVED,
        weight_decay=0.01,
    )


def outcome(trainer):
    """Losses of the second half, weights, and the optimizer's numbers, after training."""
    assert own_optimizer(trainer.optimizer).steps == LAST
    after = torch.tensor(losses(trainer)[SAVED:], dtype=torch.float64)
    return weights(trainer.model) | {"losses": after}


def whole_runs(folder, cases, size, family=bert):
    outcomes = {}
    for name, kind in cases:
        trainer = trainer_of(name, kind, folder, 0, size, family)
        trainer.train()
        outcomes |= {f"{name}-{kind}/{key}": v for key, v in outcome(trainer).items()}
    return outcomes


def resumed_runs(folder, cases, size, family=bert):
    outcomes = {}
    for name, kind in cases:
        trainer = trainer_of(name, kind, folder, 7, size, family)
        trainer.train(resume_from_checkpoint=f"{folder}/{name}-{kind}/checkpoint-{SAVED}")
        outcomes |= {f"{name}-{kind}/{key}": v for key, v in outcome(trainer).items()}
    return outcomes


def in_new_processes(function, folder, size, *arguments):
    """The outcome on every rank."""
    if size == 1:
        return [ranks.alone(function, folder, *arguments)]
    return ranks.run(function, folder, *arguments, size=size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2], ids=["one rank", "two ranks"])
def test_a_new_process_goes_on_bit_for_bit(size, tmp_path):
    folder = str(tmp_path)
    whole = in_new_processes(whole_runs, folder, size, CASES, size)
    resumed = in_new_processes(resumed_runs, folder, size, CASES, size)
    for one, other in zip(whole, resumed, strict=True):
        assert len(one) > 20 * len(CASES) and one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
            if not key.endswith("losses"):
                assert torch.equal(value, whole[0][key]), key


# The state is the same on every rank, so any number of ranks can load it. Eight rows a step in
# either world; the loss is averaged over the tokens of all ranks.
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(before, after, tmp_path):
    cases = [(name, "float32") for name in NAMES]
    whole = in_new_processes(whole_runs, str(tmp_path), before, cases, before, llama)[0]
    resumed = in_new_processes(resumed_runs, str(tmp_path), after, cases, after, llama)
    for name in NAMES:
        for result in resumed:
            key = f"{name}-float32/losses"
            torch.testing.assert_close(result[key], whole[key], rtol=1e-4, atol=0.0, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    whole = make(name, tmp_path / "whole", max_steps=8)
    whole.train()
    first = make(name, tmp_path / "cut", max_steps=8, save_strategy="steps", save_steps=5)
    first.train()
    again = make(name, tmp_path / "cut", bert(seed=7), max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    assert losses(again) == losses(whole)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


# torch and the Trainer restore them too; what is said and written must be what is used.
@pytest.mark.parametrize("name", NAMES)
def test_settings_that_a_checkpoint_overrules_are_told_and_written(name, tmp_path, caplog):
    first = make(
        name, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, weight_decay=0.25
    )
    first.train()
    saved = load_config(tmp_path / "checkpoint-2")
    other = {"learning_rate": 5e-3, "weight_decay": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-5}
    again = make(name, tmp_path, max_steps=4, **other)
    with caplog.at_level(logging.WARNING, logger="hf_precond"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (warning,) = (r.getMessage() for r in caplog.records if r.name.startswith("hf_precond"))
    kept = "betas=(0.9, 0.999), eps=1e-08, lr=0.001, weight_decay=0.25"
    assert f"{name}: the checkpoint's {kept}" in warning
    assert own_optimizer(again.optimizer).config == load_config(tmp_path) == saved
    assert losses(again) == losses(first)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_told_where_the_settings_are_the_same(name, tmp_path, caplog):
    own = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.25, "max_steps": 4}
    make(name, tmp_path, save_strategy="steps", save_steps=2, **own).train()
    with caplog.at_level(logging.WARNING, logger="hf_precond"):
        make(name, tmp_path, **own).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not [r for r in caplog.records if r.name.startswith("hf_precond")]
