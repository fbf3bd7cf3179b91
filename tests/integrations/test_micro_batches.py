"""Accumulation and activation checkpointing under the Trainer leave everything as it was."""

import pytest
import torch

from hf_precond.integrations.arguments import own_optimizer
from hf_precond.registry import list_optimizers
from tests import ranks
from tests.integrations.test_trainer import losses, make
from tests.integrations.tiny import bert, llama, text_data
from tests.optimizers.models import NO_STATISTICS, weights

NAMES = list_optimizers()
each_name = pytest.mark.parametrize("name", NAMES)
# Statistics on every step, so that every step's are compared.
OFTEN = {
    "adamr": "basis_source=feature,stat_interval=1,basis_interval=2",
    "afopt": "scope=all_linear,stat_interval=1,inverse_interval=2",
    "muon": "variant=normuon",
    "nkfac": "stat_interval=1,inverse_interval=2",
    "sgdph": "probe_interval=1",
}


def run(name, folder, model, data, steps, **fields):
    """A Trainer after training, and the statistics that each of its steps took."""
    fields = {"optim_args": OFTEN[name], "max_steps": steps, "weight_decay": 0.01} | fields
    trainer = make(name, folder, model, data, **fields)
    # The Trainer divides the loss; that of transformers 5.4 let accelerate divide it again.
    trainer.accelerator.gradient_accumulation_steps = 1
    optimizer = own_optimizer(trainer.create_optimizer())
    update, committed = optimizer.update_statistics, []

    def noted(statistics):
        assert statistics
        committed.append({k: (s.sum.clone(), s.count.clone()) for k, s in statistics.items()})
        return update(statistics)

    optimizer.update_statistics = noted
    trainer.train()
    assert len(committed) == (0 if name in NO_STATISTICS else steps)
    return trainer, committed


# A model whose loss is summed over num_items_in_batch (Llama; in others the Trainer trains a loss
# that is larger by the number of micro-batches), in float64, where what differs is not rounding.
@each_name
def test_four_micro_batches_are_one_batch_of_four_times_the_size(name, tmp_path):
    data = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in text_data(128)]
    sizes = (
        {"per_device_train_batch_size": 32},
        {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
        },
    )
    whole, parts = (
        run(name, tmp_path, llama().double(), data, 3, max_grad_norm=0.0, **size) for size in sizes
    )
    for one, four in zip(whole[1], parts[1], strict=True):
        assert one.keys() == four.keys()
        for key in one:
            for ours, theirs in zip(one[key], four[key], strict=True):
                scale = theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale, msg=key)
    assert losses(parts[0]) == pytest.approx(losses(whole[0]), rel=1e-5)
    start, one, four = weights(llama().double()), weights(whole[0].model), weights(parts[0].model)
    for key, first in start.items():
        moved = (one[key] - first).abs().max().item()
        assert moved > 0
        torch.testing.assert_close(one[key], four[key], rtol=0.0, atol=1e-5 * moved, msg=key)


@each_name
@pytest.mark.parametrize("family", [pytest.param(bert, marks=pytest.mark.slow), llama])
def test_activation_checkpointing_changes_nothing(name, family, tmp_path):
    data = text_data()
    if family is llama:
        data = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in data]
    plain, committed = run(name, tmp_path, family(), data, 4)
    for reentrant in (False, True):
        checkpointed, again = run(
            name,
            tmp_path,
            family(),
            data,
            4,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        assert losses(checkpointed) == losses(plain)
        for one, other in zip(committed, again, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key][1], other[key][1]) for key in one)
        for key, value in weights(plain.model).items():
            assert torch.equal(value, checkpointed.model.get_parameter(key)), key


KINDS = {
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "checkpointed": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


def of_one_family(folder, kinds, size):
    """Losses of each optimizer by kind of run, sixteen rows a step over all ranks."""
    data = [{"input_ids": d["input_ids"], "labels": d["input_ids"]} for d in text_data()]
    outcomes = {}
    for kind in kinds:
        for name in NAMES:
            fields = {"per_device_train_batch_size": 16 // size} | KINDS.get(kind, {})
            trainer, _ = run(name, folder, llama(), data, 4, **fields)
            outcomes[f"{kind}/{name}"] = torch.tensor(losses(trainer), dtype=torch.float64)
    return outcomes


@pytest.mark.slow
def test_two_ranks_accumulate_checkpoint_and_compile_like_one(tmp_path):
    one = of_one_family(str(tmp_path), ["plain"], 1)
    for result in ranks.run(of_one_family, str(tmp_path), list(KINDS), 2):
        for key, value in result.items():
            expected = one[f"plain/{key.split('/')[1]}"]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=0.0, msg=key)
