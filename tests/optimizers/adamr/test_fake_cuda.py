"""What AdamR's steps start on a pretended GPU: launches, precision, waits, memory."""

import pytest
import torch
from torch import nn

from hf_precond.cost.memory import MemoryCounter
from hf_precond.optimizers.adamr.batch import GPU_ELEMENTS
from hf_precond.optimizers.adamr.refresh import PORTION
from hf_precond.registry import create_optimizer
from tests.fake_cuda import bert_base, on_gpu, pretended, step


def bert(layers, **sizes):
    """A BERT, of base's sizes unless others are given, on the pretended GPU."""
    import transformers

    with torch.device("meta"):
        config = transformers.BertConfig(num_hidden_layers=layers, **sizes)
        model = transformers.BertForSequenceClassification(config)
    return on_gpu(model)


def plain_step(model):
    """What is seen of the first step without a refresh: bases turn before the first three."""
    with pretended():
        optimizer = create_optimizer(model(), "adamr", basis_interval=10**6)
        for _ in range(4):
            step(optimizer)
        return step(optimizer)


def test_a_plain_step_starts_as_many_kernels_however_many_layers_there_are():
    def network(layers):
        pairs = [nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)) for _ in range(layers)]
        return lambda: on_gpu(nn.Sequential(*pairs))

    two, five = plain_step(network(2)), plain_step(network(5))
    assert two.total == five.total <= 100
    assert two.waits == five.waits == []
    assert five.counts.share("tf32") == 1.0


@pytest.mark.slow
def test_launches_on_the_whole_of_bert_base():
    plain = plain_step(lambda: bert(12))
    assert plain.total <= 300 and plain.waits == []
    average = bert_base("adamr").average
    assert average.launches <= 600
    # Cholesky factors, triangular solves and the corrections of orthogonality are float32.
    assert average.share("tf32") >= 0.9
    assert set(average.flops) == {"tf32", "float32"}


@pytest.mark.slow
def test_the_first_steps_cost_no_more_than_later_ones():
    """Operations, those of the first eigendecompositions among them, at the default interval."""
    with pretended():
        # A vocabulary as small beside two layers as BERT's is beside twelve.
        optimizer = create_optimizer(bert(2, vocab_size=4000), "adamr")
        counts = [step(optimizer).counts for _ in range(9)]
    work = [sum(count.flops.values()) for count in counts]
    # All bases are refreshed at one step in three, in the first interval one side at a step.
    assert max(work[:6]) <= max(work[6:])
    assert sum(work[:6]) / 6 <= 1.5 * sum(work[6:]) / 3


@pytest.mark.slow
def test_memory_beside_the_state_is_bounded():
    """By batches and portions, not by the model: 24 layers need as much as 48."""
    peaks = {}
    for layers in (24, 48):
        with pretended():
            optimizer = create_optimizer(bert(layers), "adamr")
            counter, peaks[layers] = MemoryCounter("cuda"), []
            for _ in range(8):
                give_gradients(optimizer)
                counter.peak = 0.0
                with counter:
                    step(optimizer)
                peaks[layers].append(counter.peak / 4)
    plain, refreshed = ([max(p[i] for i in steps) for p in peaks.values()]
                        for steps in ((5, 6), (4, 7)))  # fmt: skip
    assert plain[1] <= 1.1 * plain[0] and max(plain) <= 4 * GPU_ELEMENTS
    assert refreshed[1] <= 1.1 * refreshed[0] and max(refreshed) <= 6 * PORTION


def give_gradients(optimizer):
    """Every parameter a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
