"""Gradual unfreezing under the Trainer, as the warning advises, with logs at every step."""

import math

import pytest
import torch
from transformers import TrainerCallback

from hf_precond.integrations.arguments import own_optimizer
from hf_precond.registry import list_optimizers
from tests.integrations.test_trainer import make
from tests.integrations.tiny import bert
from tests.optimizers.models import weights


class Unfreeze(TrainerCallback):
    """Lets the first layer train from the third step on."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            own, schedule = own_optimizer(optimizer), kwargs["lr_scheduler"]
            late = [*model.bert.encoder.layer[0].parameters()]
            for parameter in late:
                parameter.requires_grad_(True)
            own.add_param_group({"params": late, "lr": 1e-3})
            schedule.base_lrs.append(1e-3)
            schedule.lr_lambdas.append(schedule.lr_lambdas[0])
            own.attach(model)


@pytest.mark.parametrize("name", list_optimizers())
def test_the_step_that_unfreezes_is_logged_and_the_layer_is_preconditioned(name, tmp_path):
    model = bert()
    first = model.bert.encoder.layer[0]
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    trainer = make(name, tmp_path, model, max_steps=6)
    trainer.add_callback(Unfreeze())
    before = weights(first)
    trainer.train()
    assert all(not torch.equal(value, before[key]) for key, value in weights(first).items())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    for entry in logs:
        values = [value for key, value in entry.items() if key.startswith("optim_")]
        assert all(map(math.isfinite, values))
    own = own_optimizer(trainer.optimizer)
    whole = own_optimizer(untrained(name, tmp_path).optimizer).routing
    assert {r.name: r.treatment for r in own.routing} == {r.name: r.treatment for r in whole}
    if name != "sgdph":
        assert all(own.state[bound.weight] for bound in own.bound)


def untrained(name, folder):
    """A Trainer whose model was never frozen, with its optimizer."""
    trainer = make(name, folder, bert())
    trainer.create_optimizer()
    return trainer
