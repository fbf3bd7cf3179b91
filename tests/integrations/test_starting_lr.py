"""The learning rate of a Trainer whose user has set none."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_precond import PrecondTrainer, create_optimizer, list_optimizers
from hf_precond.architectures.pretrained import starting_lr
from hf_precond.integrations.arguments import lr_is_unset, own_optimizer
from tests.integrations.tiny import bert, text_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("body"))
    bert().bert.save_pretrained(path)
    return path


def pretrained(folder: str) -> nn.Module:
    torch.manual_seed(1)
    return BertForSequenceClassification.from_pretrained(folder, num_labels=2)


def trainer(model: nn.Module, out: Any, kind: type = Trainer, **own: Any) -> Trainer:
    own = {"optim": "afopt", "max_steps": 6, "disable_tqdm": True, "report_to": "none"} | own
    args = TrainingArguments(str(out), use_cpu=True, **own)
    return kind(model, args, train_dataset=text_data())


def rates(trainer: Trainer) -> set[float]:
    trainer.create_optimizer()
    return {group["lr"] for group in trainer.optimizer.param_groups}


@pytest.mark.parametrize("name", list_optimizers())
def test_a_rate_that_nobody_set_follows_from_the_weights(folder, tmp_path, caplog, name) -> None:
    model = pretrained(folder)
    with caplog.at_level(logging.WARNING):
        found = rates(trainer(model, tmp_path, optim=name))
    rate = starting_lr(model, 6)
    assert found == {rate} and rate != 5e-5
    said = [text for text in caplog.messages if "learning rate was left" in text]
    assert len(said) == 1 and f"training starts at {rate:g}" in said[0]


def test_a_rate_that_was_set_is_taken(folder, tmp_path, monkeypatch) -> None:
    model = pretrained(folder)
    assert rates(trainer(model, tmp_path, learning_rate=1e-4)) == {1e-4}
    assert rates(trainer(model, tmp_path, optim_args="lr=5e-5")) == {5e-5}
    for words in (["--learning_rate", "5e-5"], ["--learning-rate=5e-5"]):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        assert rates(trainer(model, tmp_path, learning_rate=5e-5)) == {5e-5}


class Stop(TrainerCallback):
    """Ends a training after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def test_epochs_are_counted_as_steps(folder, tmp_path) -> None:
    """Known to the Trainer once it trains; before, a training counts as a long one."""

    for epochs, batch in ((2.0, 4), (400.0, 8), (1.0, 1)):
        own = {"max_steps": -1, "num_train_epochs": epochs, "per_device_train_batch_size": batch}
        model = pretrained(folder)
        assert rates(trainer(model, tmp_path, **own)) == {starting_lr(model)}
        made = trainer(model, tmp_path, **own, save_strategy="no", lr_scheduler_type="constant")
        rate = starting_lr(model, math.ceil(len(made.train_dataset) / batch) * int(epochs))
        made.add_callback(Stop())
        made.train()
        assert {group["lr"] for group in made.optimizer.param_groups} == {rate}, epochs


class OutOfMemory(Trainer):
    """Whose batches of more than 30 rows do not fit; stops after the first step that does."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._train_batch_size > 30:
            raise RuntimeError("CUDA out of memory.")
        self.control.should_training_stop = True
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("fields", ["", "head_lr_scale=10", "layer_lr_decay=0.5"])
def test_the_steps_are_those_of_the_batch_size_that_fits(folder, tmp_path, caplog, fields) -> None:
    """32 rows take 142 steps, 28 rows 213."""
    own = {"max_steps": -1, "num_train_epochs": 71, "optim_args": fields or None}
    own |= {"save_strategy": "no", "lr_scheduler_type": "polynomial", "warmup_steps": 10}
    own |= {"per_device_train_batch_size": 32, "auto_find_batch_size": True}
    made = trainer(pretrained(folder), tmp_path, OutOfMemory, **own)
    own |= {"per_device_train_batch_size": 28, "auto_find_batch_size": False}
    fits = trainer(pretrained(folder), tmp_path, OutOfMemory, **own)
    with caplog.at_level(logging.WARNING):
        fits.train()
        made.train()
    keys = ("lr", "initial_lr", "name")
    groups, expected = (
        [{key: group[key] for key in keys} for group in t.optimizer.param_groups]
        for t in (made, fits)
    )
    assert made.state.max_steps == 213 and groups == expected
    one, two = (own_optimizer(t.optimizer) for t in (made, fits))
    assert one.config == two.config and one.config.lr == starting_lr(pretrained(folder), 213)
    assert (one.common_lr, one.defaults["lr"]) == (two.common_lr, two.defaults["lr"])
    assert one.head is None or one.head.lr == two.head.lr
    said = re.findall("training starts at .* a training of (.*) steps", caplog.text)
    assert said == ["213", "142", "213"]


def test_the_steps_of_a_schedule_made_by_hand_are_heard(folder, tmp_path) -> None:
    made = trainer(pretrained(folder), tmp_path, max_steps=-1)
    made.create_optimizer_and_scheduler(6)
    rate = starting_lr(made.model, 6)
    assert rate != starting_lr(made.model)
    assert {group["initial_lr"] for group in made.optimizer.param_groups} == {rate}


def test_a_rate_that_was_changed_by_hand_is_kept(folder, tmp_path) -> None:
    made = trainer(pretrained(folder), tmp_path, max_steps=-1)
    first, *others = made.create_optimizer().param_groups
    first["lr"] = 1e-4
    made.create_scheduler(6)
    assert first["initial_lr"] == 1e-4
    assert {group["initial_lr"] for group in others} == {starting_lr(made.model, 6)}


def test_a_model_that_was_sharded_since_keeps_its_rate(folder, tmp_path) -> None:
    made = trainer(pretrained(folder), tmp_path, max_steps=-1)
    made.create_optimizer()
    rate = starting_lr(made.model)
    for parameter in made.model.parameters():
        parameter._is_hf_initialized = False
    made.create_scheduler(6)
    assert {group["initial_lr"] for group in made.optimizer.param_groups} == {rate}


@pytest.mark.parametrize("how", ["argument", "optim_args", "optimizer", "groups"])
def test_a_rate_that_was_given_does_not_follow_the_steps(folder, tmp_path, how) -> None:
    model = pretrained(folder)
    rate = starting_lr(model)
    own = {"argument": {"learning_rate": rate}, "optim_args": {"optim_args": f"lr={rate}"}}
    made = trainer(model, tmp_path, max_steps=-1, **own.get(how, {}))
    if how == "optimizer":
        made.optimizer = create_optimizer(model, "afopt", lr=rate)
    if how == "groups":
        cls, fields = Trainer.get_optimizer_cls_and_kwargs(made.args, model)
        halves = [{"params": [p], "lr": rate / 2} for p in model.parameters()]
        made.optimizer = cls(halves, **fields)
    before = [group["lr"] for group in made.create_optimizer().param_groups]
    made.create_scheduler(6)
    assert [group["initial_lr"] for group in made.optimizer.param_groups] == before


@pytest.mark.parametrize("how", ["argument", "optim_args", "optimizer"])
def test_a_rate_that_was_given_after_a_training_without_is_kept(folder, tmp_path, how) -> None:
    model = pretrained(folder)
    first = trainer(model, tmp_path, max_steps=-1)
    first.create_optimizer()
    rate = starting_lr(model)
    own = {"argument": {"learning_rate": rate}, "optim_args": {"optim_args": f"lr={rate}"}}
    made = trainer(model, tmp_path, max_steps=-1, **own.get(how, {}))
    if how == "optimizer":
        made.optimizer = create_optimizer(model, "afopt", lr=rate)
    made.create_optimizer()
    for each in (made, first):  # the first one's still follows
        each.create_scheduler(6)
    assert {group["initial_lr"] for group in made.optimizer.param_groups} == {rate}
    assert {group["initial_lr"] for group in first.optimizer.param_groups} == {
        starting_lr(model, 6)
    }


@pytest.mark.parametrize("tensors", [False, True])
def test_nothing_is_said_where_no_rate_follows(folder, tmp_path, caplog, tensors) -> None:
    made = trainer(pretrained(folder), tmp_path, max_steps=-1)
    for group in made.create_optimizer().param_groups:
        group["lr"] = torch.tensor(group["lr"]) if tensors else 1e-4
    caplog.clear()
    made.create_scheduler(6)
    assert "training starts at" not in caplog.text
    assert own_optimizer(made.optimizer).config.lr == starting_lr(made.model)


def test_nothing_follows_from_random_weights(tmp_path) -> None:
    assert rates(trainer(bert(), tmp_path)) == {5e-5}


def test_arguments_with_a_default_of_their_own_have_set_it(tmp_path) -> None:
    @dataclasses.dataclass
    class Mild(TrainingArguments):
        learning_rate: float = 2e-5

    @dataclasses.dataclass
    class Same(TrainingArguments):
        more: int = 0

    assert lr_is_unset(TrainingArguments(str(tmp_path)))
    assert lr_is_unset(Same(str(tmp_path)))
    assert not lr_is_unset(Mild(str(tmp_path)))
    assert not lr_is_unset(Mild(str(tmp_path), learning_rate=5e-5))


def test_the_model_card_and_the_config_have_it(folder, tmp_path) -> None:
    made = trainer(pretrained(folder), tmp_path, PrecondTrainer)
    rate = starting_lr(made.model, 6)
    made.train()
    made.create_model_card()
    made.save_model()
    assert f"learning_rate: {rate}" in (tmp_path / "README.md").read_text()
    assert f'"lr": {rate}' in (tmp_path / "optimizer_config.json").read_text()


class Larger(TrainerCallback):
    """Makes the weights larger under way, so that another rate would follow from them."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            with torch.no_grad():
                for parameter in model.bert.parameters():
                    parameter.mul_(1.5)


def test_a_resumed_training_keeps_its_rate(folder, tmp_path) -> None:
    """Bit for bit, although the weights have changed; so does the rule of the new head."""
    own = {"save_steps": 4, "save_strategy": "steps"}
    whole = trainer(pretrained(folder), tmp_path, **own)
    whole.add_callback(Larger())
    whole.train()
    again = trainer(pretrained(folder), tmp_path, **own)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    one, two = (own_optimizer(made.optimizer) for made in (whole, again))
    assert one.config.lr == two.config.lr
    assert two.head is not None
    state, other = (copy.deepcopy(t.model.state_dict()) for t in (whole, again))
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_an_extended_training_keeps_its_rate_and_says_so(folder, tmp_path, caplog) -> None:
    whole = trainer(pretrained(folder), tmp_path, save_steps=4, save_strategy="steps")
    whole.train()
    again = trainer(pretrained(folder), tmp_path, max_steps=400, save_strategy="no")
    again.add_callback(Stop())
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    rates = [own_optimizer(made.optimizer).config.lr for made in (whole, again)]
    assert rates[0] == rates[1] == starting_lr(pretrained(folder), 6)
    words = ("learning rate was left", "learning rate goes on", "asks for")
    said = [text for text in caplog.messages if any(word in text for word in words)]
    assert len(said) == 1
    assert f"goes on from the checkpoint's {rates[0]:g}" in said[0]
    assert f"would take {starting_lr(pretrained(folder), 400):g}" in said[0]


def test_the_steps_are_those_of_the_trainer_that_asks(folder, tmp_path) -> None:
    class Other(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True
            other.create_optimizer()

    own = {"max_steps": -1, "save_strategy": "no"}
    other = trainer(pretrained(folder), tmp_path, **own)
    first = trainer(pretrained(folder), tmp_path, **own)
    first.add_callback(Other())
    first.train()
    assert {group["lr"] for group in other.optimizer.param_groups} == {starting_lr(other.model)}


def test_a_training_that_goes_on_without_a_state_names_its_rate(folder, tmp_path, caplog) -> None:
    own = {"save_steps": 4, "save_strategy": "steps", "save_only_model": True}
    trainer(pretrained(folder), tmp_path, **own).train()
    again = trainer(pretrained(folder), tmp_path, max_steps=400, save_strategy="no")
    again.add_callback(Stop())
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (group, *_) = again.optimizer.param_groups
    said = [text for text in caplog.messages if "optimizer starts anew" in text]
    assert len(said) == 1
    assert said[0].endswith(f"at a learning rate of {group['initial_lr']:g}.")
