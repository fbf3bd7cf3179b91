"""Layers trained in evaluation mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from tests.architectures.families import FAMILIES, build, loss_of
from tests.statistics.support import close_all, linears, opened, requests_for


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


def test_layers_trained_in_evaluation_mode_beside_others_are_named() -> None:
    model = build("bert")
    collector = opened(model, requests_for(linears(model)))
    batch = FAMILIES["bert"].batch()
    model.bert.encoder.layer[0].eval()
    loss_of(model, batch)  # an evaluation: no gradient comes
    loss_of(model.train(), batch).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collector.take()
    model.bert.encoder.layer[0].eval()
    loss_of(model, batch).backward()
    with pytest.warns(UserWarning, match=r"6 layers \(bert\.encoder\.layer\.0.*train\(\) on them"):
        assert collector.take()
