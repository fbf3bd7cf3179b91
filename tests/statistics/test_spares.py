"""Memory of second moments that serves one step after the other."""

import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import MomentRequest


def collect(capture, model, seed, passes=1):
    """The moments of some passes, and the inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(7, 5, generator=generator) for _ in range(passes)]
    capture.enable(True, seed)
    for rows in inputs:
        model(rows).sum().backward()
    return capture.take(), torch.cat(inputs)


def make():
    model = nn.Linear(5, 3)
    matrix = LayerMatrix("layer", model, bias="bias")
    requests = [MomentRequest("x", "input", matrix), MomentRequest("d", "output_grad", matrix)]
    return model, MomentCollector(model, requests)


def expected(inputs):
    rows = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    return rows.T @ rows


def test_recycled_memory_holds_the_next_sums():
    model, capture = make()
    taken, inputs = collect(capture, model, 0, passes=3)
    torch.testing.assert_close(taken["x"].sum, expected(inputs))
    addresses = {key: found.sum.data_ptr() for key, found in taken.items()}
    capture.recycle()
    del taken
    again, inputs = collect(capture, model, 1, passes=2)
    torch.testing.assert_close(again["x"].sum, expected(inputs))
    torch.testing.assert_close(again["d"].sum, torch.full((3, 3), 14.0))
    # One more pass brought a second matrix of each size into the pool: either may come first.
    seen = {again[key].sum.data_ptr() for key in addresses}
    third, _ = collect(capture, model, 2, passes=2)
    assert not seen & {found.sum.data_ptr() for found in third.values()}
    capture.close()


def test_what_nobody_gave_back_stays_as_it_was():
    model, capture = make()
    taken, inputs = collect(capture, model, 0)
    for seed in (1, 2):
        collect(capture, model, seed, passes=2)
    torch.testing.assert_close(taken["x"].sum, expected(inputs))
    capture.close()


def test_a_dropped_step_gives_its_memory_back():
    model, capture = make()
    capture.enable(True, 0)
    model(torch.randn(7, 5)).sum().backward()
    held = {key: total.data_ptr() for key, total in capture.stage.sums.items()}
    capture.drop()
    capture.enable(True, 1)
    model(torch.randn(7, 5)).sum().backward()
    assert {key: total.data_ptr() for key, total in capture.stage.sums.items()} == held
    capture.close()
