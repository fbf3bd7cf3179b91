"""``--optim_args reference=True`` under the stock Trainer: the authors' trajectories."""

import dataclasses

import pytest
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_precond import SGDPHConfig
from hf_precond.integrations.arguments import own_optimizer
from tests.optimizers.nkfac import test_reference as nkfac
from tests.optimizers.sgdph import test_reference as sgdph

NAMES = ["nkfac_mlp", "nkfac_conv", "adankfac_mlp", "sgdph_bn", "sgdph_ln"]


class Regression(nn.Module):
    """A network with its loss."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs, labels):
        """Mean squared error."""
        return {"loss": nn.functional.mse_loss(self.network(inputs), labels)}


def golden(name):
    """The tensors of a golden file, its network at the start, and its config."""
    values, tensors = sgdph.read(name)
    if name.startswith("sgdph"):
        network = sgdph.batch_norm() if name == "sgdph_bn" else sgdph.layer_norm()
        config = SGDPHConfig(**sgdph.fields_of(values))
    else:
        network, config = nkfac.network(name), nkfac.config_of(name, values)
    start = {key: tensors[f"init/{key}"] for key, _ in network.named_parameters()}
    network.load_state_dict(start, strict=False)
    return tensors, network, config


def check(network, tensors, step):
    """The parameters after so many steps are the authors'."""
    for key, value in network.named_parameters():
        wanted = tensors.get(f"step{step}/{key}")
        if wanted is not None:
            error = (value - wanted).norm() / wanted.norm()
            assert error < 1e-9, (step, key, error)


class Check(TrainerCallback):
    """Compares the parameters after every step."""

    def __init__(self, network, tensors):
        self.network, self.tensors = network, tensors

    def on_step_end(self, args, state, control, **kwargs):
        """After the optimizer's step."""
        check(self.network, self.tensors, state.global_step)


@pytest.mark.parametrize("name", NAMES)
def test_optim_args_reproduce_the_published_code(name, tmp_path):
    tensors, network, config = golden(name)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del fields["betas"]
    steps, batch = tensors["y"].shape[:2]
    args = TrainingArguments(
        str(tmp_path),
        optim=config.name,
        optim_args=",".join(f"{key}={value}" for key, value in fields.items()),
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=batch,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = zip(tensors["x"].flatten(0, 1), tensors["y"].flatten(0, 1), strict=True)
    data = [{"inputs": x, "labels": y} for x, y in rows]
    trainer = Trainer(Regression(network), args, train_dataset=data)
    trainer.add_callback(Check(network, tensors))
    trainer.train()
    assert own_optimizer(trainer.optimizer).config == config
    assert trainer.state.global_step == steps
