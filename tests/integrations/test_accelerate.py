"""accelerate with two models, each with an optimizer of its own, made in every way."""

import pytest
import torch
from accelerate import Accelerator

from hf_precond import create_optimizer
from hf_precond.registry import get_info, list_optimizers
from tests import ranks
from tests.integrations.tiny import bert, text_data
from tests.optimizers.models import weights
from tests.optimizers.test_shared import QUICK

NAMES = list_optimizers()
WAYS = ("factory", "class", "attached after prepare")


def optimizer_of(way, name, model):
    """An optimizer of a model; the last way attaches it later."""
    fields = {"lr": 1e-3, "weight_decay": 0.01} | QUICK[name]
    if way == "factory":
        return create_optimizer(model, name, **fields)
    kind = get_info(name).optimizer_cls
    return kind(model.parameters(), attach_to=model if way == "class" else None, **fields)


def two_models(name, way, together=True, steps=4, states=None):
    """A student and a teacher that learns too; each alone unless ``together``."""
    accelerator = Accelerator(cpu=True)
    models = [bert(seed=0), bert(seed=5)]
    owns = [optimizer_of(way, name, model) for model in models]
    # In another order than the models, which must not matter.
    prepared = accelerator.prepare(*models, *reversed(owns))
    models, steppers = list(prepared[:2]), list(reversed(prepared[2:]))
    if way == "attached after prepare":
        for own, model in zip(owns, models, strict=True):
            own.attach(model)
    data = text_data()
    share = 8 // accelerator.num_processes
    for step in range(steps):
        first = 8 * step + share * accelerator.process_index
        rows = data[first : first + share]
        inputs = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
        turns = ((0, 1),) if together else ((0,), (1,))
        for turn in turns:
            losses = [models[index](**inputs).loss for index in turn]
            for loss in losses:
                accelerator.backward(loss)
            for index in turn:
                steppers[index].step()
                steppers[index].zero_grad()
    for own in owns:
        assert own.steps == steps
        own.close()
    found = [weights(accelerator.unwrap_model(model)) for model in models]
    if states is not None:
        states += [own.state_dict()["hf_precond"] for own in owns]
    return {f"{index}.{key}": v for index, part in enumerate(found) for key, v in part.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_two_models_train_as_each_alone(name, way):
    """The statistics of one never enter the other, whose passes lie between."""
    together, alone = two_models(name, way), two_models(name, way, together=False)
    assert together.keys() == alone.keys()
    for key, value in together.items():
        assert torch.equal(value, alone[key]), key


def both_ways(name):
    """Weights by way, and whether the checkpoints' identities are those of bare models."""
    found = {}
    for way in WAYS[1:]:
        states = []
        parts = two_models(name, way, steps=2, states=states)
        found |= {f"{way}/{key}": value for key, value in parts.items()}
        bare = optimizer_of("class", name, bert())
        own = bare.state_dict()["hf_precond"]
        bare.close()
        found[f"{way}/same names"] = torch.tensor([state == own for state in states])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_agree_and_name_parameters_as_one_does(name):
    one, other = ranks.run(both_ways, name)
    assert len(one) > 100
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    for way in WAYS[1:]:
        assert one[f"{way}/same names"].all(), way
