"""Trainers that make their own groups: four ways to hand them over, resumed bit for bit."""

import pytest
import torch
from torch import nn
from transformers import Trainer

from hf_precond.integrations.arguments import own_optimizer
from hf_precond.registry import get_info, list_optimizers
from tests.integrations.test_trainer import losses, make
from tests.integrations.tiny import bert, text_data
from tests.optimizers.models import weights

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)
HEAD_RATE = 1e-2


def layerwise(model):
    """The body at the run's rate, without decay, and the head at another."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "classifier" not in n], "weight_decay": 0.0},
        {"params": [], "lr": 1e-6, "weight_decay": 0.5},
        {"params": [p for n, p in named if "classifier" in n], "lr": HEAD_RATE},
    ]


class Overriding(Trainer):
    """LLaVA's way: class and arguments from ``get_optimizer_cls_and_kwargs``."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, values = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(layerwise(self.model), **values)
        return self.optimizer


class OverridingWithoutModel(Trainer):
    """LLaMA-Factory's way: the look-up is not told the model."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, values = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(layerwise(self.model), **values)
        return self.optimizer


class Dictionary(Trainer):
    """sentence-transformers' way: groups among the arguments."""

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        kind, values = super().get_optimizer_cls_and_kwargs(args, model)
        return kind, values | {"optimizer_dict": layerwise(self.model)}


def class_and_arguments(name, folder, model, **fields):
    """The class and its arguments for the Trainer, whose groups are its own."""
    kind = get_info(name).optimizer_cls
    return Trainer(
        model, make(name, folder, **fields | {"optim": "adamw_torch"}).args,
        train_dataset=text_data(), optimizer_cls_and_kwargs=(kind, {"lr": 1e-3} | often(name)),
    )  # fmt: skip


def ready_made(name, folder, model, **fields):
    """An optimizer that is made before the Trainer, which knows nothing of the model."""
    optimizer = get_info(name).optimizer_cls(layerwise(model), lr=1e-3, **often(name))
    return Trainer(
        model, make(name, folder, **fields | {"optim": "adamw_torch"}).args,
        train_dataset=text_data(), optimizers=(optimizer, None),
    )  # fmt: skip


def often(name):
    """The fields of :data:`tests.integrations.test_trainer.OFTEN`."""
    from hf_precond.integrations.arguments import parse_pairs
    from tests.integrations.test_trainer import OFTEN

    return get_info(name).config_cls.parse(parse_pairs(OFTEN[name]))


def with_class(cls):
    return lambda name, folder, model, **fields: make(name, folder, model, cls=cls, **fields)


WAYS = {
    "create_optimizer": with_class(Overriding),
    "create_optimizer without a model": with_class(OverridingWithoutModel),
    "optimizer_cls_and_kwargs": class_and_arguments,
    "optimizers": ready_made,
    "optimizer_dict": with_class(Dictionary),
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
@each_name
def test_groups_of_ones_own_train_and_resume_bit_for_bit(name, way, tmp_path):
    def run(folder, seed=0, checkpoint=None, **fields):
        model = bert(seed=seed)
        trainer = WAYS[way](name, folder, model, max_steps=4, weight_decay=0.1, **fields)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=2)
    again = run(tmp_path / "again", seed=7, checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again)[2:] == losses(whole)[2:] and len(losses(whole)) == 4
    for key, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[key]), key

    own = own_optimizer(whole.optimizer)
    assert own.attached and own.steps == 4
    treated = own.routing.count()
    assert treated["preconditioned"] and "not stepped" not in treated
    peaks = {id(p): g for g in own.param_groups for p in g["params"]}
    for key, parameter in whole.model.named_parameters():
        group = peaks[id(parameter)]
        if way == "optimizer_cls_and_kwargs":  # the Trainer's own rule
            decays = "bias" not in key and "LayerNorm" not in key
            assert (group["initial_lr"], group["weight_decay"]) == (1e-3, 0.1 * decays), key
        elif "classifier" in key:
            assert group["initial_lr"] == HEAD_RATE, key
        else:
            assert (group["initial_lr"], group["weight_decay"]) == (1e-3, 0.0), key
    assert not any(module._forward_hooks for module in whole.model.modules())


@each_name
def test_what_the_trainer_decays_is_what_its_method_says(name, tmp_path):
    class Trains(Trainer):
        def get_decay_parameter_names(self, model):
            names = super().get_decay_parameter_names(model)
            return [n for n in names if "embeddings" not in n]

    trainer = make(name, tmp_path, cls=Trains, weight_decay=0.1, max_steps=2)
    trainer.train()
    decays = {id(p) for g in own_optimizer(trainer.optimizer).param_groups
              if g["weight_decay"] for p in g["params"]}  # fmt: skip
    wanted = set(trainer.get_decay_parameter_names(trainer.model))
    found = {n for n, p in trainer.model.named_parameters() if id(p) in decays}
    assert found == wanted & {n for n, _ in trainer.model.named_parameters()}
    assert not any("embeddings" in n for n in found)
    routing = own_optimizer(trainer.optimizer).routing
    assert routing["bert.embeddings.word_embeddings.weight"].group == "no decay"


@each_name
def test_layer_lr_decay_divides_the_trainers_groups(name, tmp_path):
    from tests.integrations.test_trainer import OFTEN

    text = ",".join(filter(None, [OFTEN[name], "layer_lr_decay=0.5,head_lr_scale=4"]))
    fields = {"optim_args": text, "max_steps": 4, "weight_decay": 0.1, "learning_rate": 8e-3}
    whole = make(name, tmp_path, save_strategy="steps", save_steps=2, **fields)
    whole.train()
    again = make(name, tmp_path, bert(seed=7), **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    rates = {g["name"]: g["initial_lr"] for g in own_optimizer(whole.optimizer).param_groups}
    assert rates == {
        "layer 0 decay": 1e-3, "layer 0 no decay": 1e-3, "layer 1 decay": 2e-3,
        "layer 1 no decay": 2e-3, "layer 2 decay": 4e-3, "layer 2 no decay": 4e-3,
        "decay": 8e-3, "no decay": 8e-3, "head decay": 32e-3, "head no decay": 32e-3,
    }  # fmt: skip


@each_name
def test_parameters_of_a_loss_are_trained_by_a_second_train_too(name, tmp_path):
    class WithLoss(Trainer):
        """A trainer whose loss has weights, and that hands all of them over."""

        def get_optimizer_cls_and_kwargs(self, args, model=None):
            kind, values = super().get_optimizer_cls_and_kwargs(args, self.whole)
            return kind, values | {"optimizer_dict": [{"params": self.whole.parameters()}]}

        def compute_loss(self, model, inputs, **kwargs):
            labels = inputs.pop("labels")
            logits = self.whole[1](model(**inputs).logits)
            return nn.functional.cross_entropy(logits, labels)

    trainer = make(name, tmp_path, cls=WithLoss, max_steps=2)
    trainer.whole = nn.ModuleList([trainer.model, nn.Linear(2, 2)])
    before = trainer.whole[1].weight.detach().clone()
    trainer.train()
    own = own_optimizer(trainer.optimizer)
    once, routing = trainer.whole[1].weight.detach().clone(), str(own.routing)
    assert not torch.equal(before, once)
    trainer.train()
    assert not torch.equal(once, trainer.whole[1].weight)
    assert str(own.routing) == routing


@each_name
def test_two_trainers_in_one_process_each_have_their_own(name, tmp_path):
    alone = make(name, tmp_path / "alone", max_steps=3, cls=OverridingWithoutModel)
    alone.train()
    first = make(name, tmp_path / "first", max_steps=3, cls=OverridingWithoutModel)
    other = make(name, tmp_path / "other", bert(seed=5), max_steps=1, cls=OverridingWithoutModel)
    other.create_optimizer()
    first.train()
    other.train()
    assert losses(first) == losses(alone)
    ours = {id(p) for p in other.model.parameters()}
    held = {id(p) for g in own_optimizer(other.optimizer).param_groups for p in g["params"]}
    assert held == ours
