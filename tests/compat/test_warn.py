"""Warnings show the line of the script, not ours or torch's."""

import warnings

import pytest
import torch

from hf_precond.compat.warn import warn


def lines(action):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    return [(w.filename, w.category) for w in seen]


def test_a_warning_of_a_hook_shows_who_called_the_model():
    model = torch.nn.Linear(1, 1)
    package = {"warn": warn, "__name__": "hf_precond.statistics.somewhere"}
    exec("def hook(*arguments): warn('said', RuntimeWarning)", package)
    model.register_forward_hook(package["hook"])
    assert lines(lambda: model(torch.zeros(1))) == [(__file__, RuntimeWarning)]


def test_a_warning_is_shown_once_for_a_line():
    def twice():
        for _ in range(2):
            warn("said")

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        twice()
    assert len(seen) == 1


def test_a_group_with_a_wrong_key_is_told_at_the_line_that_makes_the_optimizer():
    from hf_precond import create_optimizer
    from tests.optimizers.models import make

    model = make("bert")
    groups = [{"params": model.parameters(), "lrr": 1.0}]
    with pytest.warns(UserWarning, match="lrr") as seen:
        create_optimizer(model, "muon", params=groups)
    assert [w.filename for w in seen if "lrr" in str(w.message)] == [__file__]
