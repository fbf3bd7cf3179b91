"""``torch.distributed.checkpoint``: saved, loaded by another process, resumed bit for bit."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from hf_precond.registry import create_optimizer, list_optimizers
from tests import ranks
from tests.distributed.test_fsdp2 import SHARDABLE, all_full, shard
from tests.optimizers.models import batch, make, train_step, weights
from tests.optimizers.test_shared import QUICK

SAVED, LAST = 3, 6
OPTIONS = {
    "nested": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "whole": {"full_state_dict": True, "cpu_offload": True},
}
# Settings in which parameters have no state of their own.
STATELESS = {
    "afopt": {"base": "sgd", "momentum": 0.0, "direction": "inverse"},
    "nkfac": {"base": "sgd", "momentum": 0.0},
    "sgdph": {"base": "sgd", "momentum": 0.0},
}


def start(name, model_name, seed, **values):
    model = make(model_name, seed=seed)
    fields = {"lr": 1e-3, "weight_decay": 0.01} | QUICK[name] | values
    return model, create_optimizer(model, name, **fields)


def advance(model_name, model, optimizer, first, last):
    """Steps ``first`` to ``last``; the weights then."""
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        train_step(model, optimizer, batch(model_name, step, dtype=dtype))
    return weights(model)


def save(model, optimizer, folder, options):
    state = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    dcp.save(dict(zip(("model", "optimizer"), state, strict=True)), checkpoint_id=folder)


def load(model, optimizer, folder, options):
    options = StateDictOptions(**options)
    names = ("model", "optimizer")
    state = dict(zip(names, get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


CASES = [(name, kind, {}) for name in list_optimizers() for kind in OPTIONS]
CASES += [(name, "nested", values) for name, values in STATELESS.items()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_name", ["bert", "gpt2"])
@pytest.mark.parametrize(("name", "kind", "values"), CASES)
def test_one_process_resumes_bit_for_bit(name, kind, values, model_name, tmp_path):
    model, optimizer = start(name, model_name, 0, **values)
    advance(model_name, model, optimizer, 0, SAVED)
    save(model, optimizer, tmp_path, OPTIONS[kind])
    whole = advance(model_name, model, optimizer, SAVED, LAST)
    other, resumed = start(name, model_name, 7, **values)
    load(other, resumed, tmp_path, OPTIONS[kind])
    assert resumed.steps == SAVED
    for key, value in advance(model_name, other, resumed, SAVED, LAST).items():
        assert torch.equal(value, whole[key]), key


# Sharded (FSDP2) ---------------------------------------------------------------


def start_sharded(name, model_name, seed):
    model = make(model_name, seed=seed, dtype=torch.float64)
    shard(model)
    return model, create_optimizer(model, name, lr=1e-3, weight_decay=0.01, **QUICK[name])


def each_run(seed):
    for name in SHARDABLE:
        for model_name in ("bert", "gpt2"):
            yield f"{name}-{model_name}", model_name, *start_sharded(name, model_name, seed)


def trained_and_saved(folder):
    found = {}
    for case, model_name, model, optimizer in each_run(seed=0):
        advance(model_name, model, optimizer, 0, SAVED)
        save(model, optimizer, f"{folder}/{case}", OPTIONS["nested"])
        advance(model_name, model, optimizer, SAVED, LAST)
        found |= {f"{case}/{key}": value for key, value in all_full(model).items()}
    return found


def loaded_and_trained(folder):
    found = {}
    for case, model_name, model, optimizer in each_run(seed=7):
        load(model, optimizer, f"{folder}/{case}", OPTIONS["nested"])
        assert optimizer.steps == SAVED
        advance(model_name, model, optimizer, SAVED, LAST)
        found |= {f"{case}/{key}": value for key, value in all_full(model).items()}
    return found


# Every rank trains the same batch: the mean over ranks is then the same for any number of them.
@pytest.mark.slow
@pytest.mark.parametrize(("size", "others"), [(2, (2, 1)), (1, (2,))])
def test_a_sharded_run_resumes_in_new_processes_whatever_their_number(size, others, tmp_path):
    whole = ranks.run(trained_and_saved, str(tmp_path), size=size)[0]
    for other in others:
        for result in ranks.run(loaded_and_trained, str(tmp_path), size=other):
            assert result.keys() == whole.keys()
            for key, value in result.items():
                # Other numbers of ranks batch other refreshes together: rounding, of float64.
                bound = 1e-12 if other != size else 0.0
                torch.testing.assert_close(value, whole[key], rtol=0, atol=bound, msg=key)
