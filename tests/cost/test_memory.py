"""Storages made and freed on a pretended device."""

import torch

from hf_precond.cost.memory import MemoryCounter
from tests.fake_cuda import GPU, pretended


def test_temporaries_count_and_what_stays_does_not():
    with pretended():
        kept = []
        grown = torch.empty(10, 10, device=GPU)
        with MemoryCounter() as counter:
            temporary = grown + 1.0  # 400 bytes
            view = temporary[:5]
            del temporary
            other = view * 2.0  # 200 more
            del view, other
            kept.append(grown * 3.0)
        assert (counter.peak, counter.live) == (600 - 400, 400)
        with counter:
            grown.add_(1.0)
            del kept[0]
        assert counter.live == 0 and counter.peak == 200


def test_the_state_of_an_optimizer():
    with pretended():
        weight = torch.nn.Parameter(torch.empty(8, 4, device=GPU))
        weight.grad = torch.empty_like(weight)
        optimizer = torch.optim.SGD([weight], momentum=0.9)
        counter = MemoryCounter()
        with counter:
            optimizer.step()
        assert counter.state_of(optimizer) == 8 * 4 * 4 == counter.live
