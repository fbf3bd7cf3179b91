"""Second moments of some of the rows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.moments import as_rows, thinned
from hf_precond.statistics.requests import MomentRequest
from tests.optimizers.models import batch, make

F64 = torch.float64


def test_evenly_spaced_and_from_everywhere_in_time():
    rows = torch.arange(100.0).unsqueeze(1)
    seen = set()
    for step in range(0, 2000, 10):
        chosen = thinned(rows, 20, step)[:, 0]
        assert len(chosen) == 20 and (chosen.diff() == 5).all()
        assert chosen.data_ptr() != 0 and chosen._base is not None
        seen |= set(chosen.tolist())
    assert len(seen) == 100
    assert thinned(rows, 0, 3) is rows and thinned(rows, 100, 3) is rows


def requests(matrix, rows):
    return [MomentRequest(kind, kind, matrix, rows=rows) for kind in ("input", "output_grad")]


def test_sums_and_counts_are_of_the_chosen_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    collector = MomentCollector(model, requests(LayerMatrix("0", model[0], bias="bias"), 10))
    collector.enable(True, 30)
    inputs = torch.randn(6, 8, 4, dtype=F64)
    outputs = model[0](inputs)
    loss = model[1:](outputs).square().sum()
    (deltas,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    model.zero_grad()
    collector.drop()
    model(inputs).square().sum().backward()
    taken = collector.take()
    rows = thinned(inputs.flatten(0, 1), 10, 30)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], 1)
    deltas = thinned(deltas.flatten(0, 1), 10, 30)
    torch.testing.assert_close(taken["input"].sum, rows.T @ rows)
    torch.testing.assert_close(taken["output_grad"].sum, deltas.T @ deltas)
    assert taken["input"].count == taken["output_grad"].count == len(rows) == 10
    collector.close()


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_only_rows_that_enter_are_converted(scale, monkeypatch):
    converted = []

    def note(tensor, dtype, low=None):
        converted.append(len(tensor))
        return as_rows(tensor, dtype, low)

    monkeypatch.setattr("hf_precond.statistics.collector.as_rows", note)
    layer = nn.Linear(4, 3)
    found = [replace(r, scale=scale) for r in requests(LayerMatrix("0", layer, bias="bias"), 10)]
    collector = MomentCollector(layer, found)
    collector.loss_scale = 2.0
    collector.enable(True, 0)
    layer(torch.randn(50, 4)).square().sum().backward()
    assert set(collector.take()) == {"input", "output_grad"}
    assert max(converted) == 10
    collector.close()


def test_padded_tokens_still_weigh_nothing():
    model, inputs = make("bert", dtype=F64), batch("bert")
    query = model.bert.encoder.layer[0].attention.self.query
    collector = MomentCollector(model, requests(LayerMatrix("q", query, bias="bias"), 10))
    collector.enable(True, 0)
    model(**inputs).loss.backward()
    taken = collector.take()
    mask = thinned(inputs["attention_mask"].flatten(), 10, 0)
    assert 0 < mask.sum() < len(mask)
    assert taken["input"].count == taken["output_grad"].count == mask.sum()
    assert taken["input"].sum[-1, -1] == mask.sum()
    collector.close()


def test_positions_of_a_convolution():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    model = nn.Sequential(layer, nn.Flatten()).double()
    matrix = LayerMatrix("0", layer, bias="bias", layout="conv")
    collector = MomentCollector(model, requests(matrix, 30))
    collector.enable(True, 7)
    inputs = torch.randn(4, 2, 5, 5, dtype=F64)
    model(inputs).square().sum().backward()
    taken = collector.take()
    rows = thinned(F.unfold(inputs, 3, padding=1).mT.flatten(0, 1), 30, 7)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=F64)], 1)
    torch.testing.assert_close(taken["input"].sum, rows.T @ rows)
    assert taken["input"].count == len(rows) == 25
    collector.close()
