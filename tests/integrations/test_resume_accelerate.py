"""``Accelerator.save_state`` and ``load_state`` in a loop of one's own."""

import pytest
import torch
from accelerate import Accelerator

from hf_precond import create_optimizer
from hf_precond.integrations.arguments import parse_pairs
from hf_precond.registry import list_optimizers, make_config
from tests.distributed.test_ranks_agree import flat_state
from tests.integrations.test_resume import KINDS, LAST, MIDWAY, SAVED, in_new_processes
from tests.integrations.tiny import bert, text_data
from tests.optimizers.models import weights

NAMES = list_optimizers()
CASES = [(name, kind) for name in NAMES for kind in KINDS]


class Loop:
    """What ``prepare`` made of a model, an optimizer, a scheduler and a loader."""

    def __init__(self, name, kind, seed):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = bert(seed=seed).to(KINDS[kind])
        config = make_config(name, lr=1e-3, weight_decay=0.01)
        config = config.replace(**type(config).parse(parse_pairs(MIDWAY[name])))
        optimizer = create_optimizer(model, config)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, LAST)
        loader = torch.utils.data.DataLoader(text_data(), batch_size=2)
        self.optimizer = optimizer
        self.model, self.stepper, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )

    def advance(self, first, last):
        """Optimizer steps ``first`` to ``last``, two micro-batches each; the weights then."""
        micro_batches = list(self.loader)[2 * first : 2 * last]
        for inputs in micro_batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**inputs).loss)
                self.stepper.step()
                self.scheduler.step()
                self.stepper.zero_grad()
        assert self.optimizer.steps == last
        return weights(self.accelerator.unwrap_model(self.model))


def whole_loops(folder):
    outcomes = {}
    for name, kind in CASES:
        loop = Loop(name, kind, seed=0)
        loop.advance(0, SAVED)
        loop.accelerator.save_state(f"{folder}/{name}-{kind}")
        outcomes |= {f"{name}-{kind}/{k}": v for k, v in loop.advance(SAVED, LAST).items()}
    return outcomes


def resumed_loops(folder):
    outcomes = {}
    for name, kind in CASES:
        loop = Loop(name, kind, seed=7)
        loop.accelerator.load_state(f"{folder}/{name}-{kind}")
        assert loop.optimizer.steps == SAVED
        outcomes |= {f"{name}-{kind}/{k}": v for k, v in loop.advance(SAVED, LAST).items()}
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2], ids=["one rank", "two ranks"])
def test_a_loaded_state_goes_on_bit_for_bit(size, tmp_path):
    whole = in_new_processes(whole_loops, str(tmp_path), size)
    for result in in_new_processes(resumed_loops, str(tmp_path), size):
        assert result.keys() == whole[0].keys() and len(result) > 20 * len(CASES)
        for key, value in result.items():
            assert torch.equal(value, whole[0][key]), key


def restored(folder, save):
    """Weights and optimizer state after the first half, saved or loaded."""
    outcomes = {}
    for name, kind in CASES:
        loop = Loop(name, kind, seed=0 if save else 7)
        if save:
            loop.advance(0, SAVED)
            loop.accelerator.save_state(f"{folder}/{name}-{kind}")
        else:
            loop.accelerator.load_state(f"{folder}/{name}-{kind}")
        held = weights(loop.accelerator.unwrap_model(loop.model)) | flat_state(loop.optimizer)
        outcomes |= {f"{name}-{kind}/{key}": value for key, value in held.items()}
        assert loop.optimizer.steps == SAVED
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_any_number_of_ranks_loads_the_whole_state(before, after, tmp_path):
    saved = in_new_processes(restored, str(tmp_path), before, True)[0]
    for result in in_new_processes(restored, str(tmp_path), after, False):
        assert result.keys() == saved.keys()
        for key, value in result.items():
            assert value.dtype == saved[key].dtype and torch.equal(value, saved[key]), key
