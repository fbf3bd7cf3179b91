"""What AdamR's steps start on a pretended GPU: launches, precision, waits, memory."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_precond.optimizers.adamr.batch import GPU_ELEMENTS
from hf_precond.registry import create_optimizer
from tests.fake_cuda import bert_base, on_gpu, pretended, step


class Memory(TorchDispatchMode):
    """The most bytes of tensors that were made inside and not freed yet, at any moment."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                self._see(tensor)
        return result

    def _see(self, tensor):
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.known:
            return
        if place not in self.live:
            self.live[place] = [0, storage.nbytes()]
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self.live[place][0] += 1
        weakref.finalize(tensor, self._drop, place)

    def _drop(self, place):
        self.live[place][0] -= 1
        if not self.live[place][0]:
            self.now -= self.live.pop(place)[1]


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
def test_the_first_steps_cost_half_as_much_again_as_later_ones_at_most():
    """Operations, those of the first eigendecompositions among them, at the default interval."""
    with pretended():
        # A vocabulary as small beside two layers as BERT's is beside twelve.
        optimizer = create_optimizer(bert(2, vocab_size=4000), "adamr")
        counts = [step(optimizer).counts for _ in range(9)]
    work = [sum(count.flops.values()) for count in counts]
    assert max(work[:6]) <= 1.5 * sum(work[6:]) / 3


@pytest.mark.slow
def test_memory_beside_the_state_is_bounded():
    """By batches and portions of 128 MiB, not by the model: 12 layers need as much as 24."""
    peaks = []
    for layers in (12, 24):
        with pretended():
            optimizer = create_optimizer(bert(layers), "adamr")
            for _ in range(7):
                with Memory(held(optimizer)) as memory:
                    step(optimizer)
            peaks.append(memory.peak / 4)
    assert peaks[1] <= 1.1 * peaks[0] and max(peaks) <= 6 * GPU_ELEMENTS


def held(optimizer):
    """The tensors that stay: parameters, gradients, state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [parameter.grad for parameter in parameters]
    return [*parameters, *gradients, *(s for s in states if isinstance(s, torch.Tensor))]
