"""``create_optimizer``'s first argument."""

import pytest
from torch import nn

from hf_precond import AFOptConfig, create_optimizer


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda model: model.parameters(), "a generator"),
        (lambda model: list(model.parameters()), "a list"),
        (lambda model: "adamr", "a str"),
    ],
    ids=["generator", "list", "name"],
)
def test_what_is_no_model_is_refused_with_the_right_call(given, said):
    with pytest.raises(TypeError, match=rf"first argument is {said}.*create_optimizer\(model, "):
        create_optimizer(given(nn.Linear(2, 2)), "adamr")


@pytest.mark.parametrize("name", ["afop", 3, None, ["afopt"], {"optimizer": "afopt"}, AFOptConfig])
def test_what_is_no_name_is_refused_with_the_names(name):
    with pytest.raises(ValueError, match=r"is unknown.* The names are adamr, afopt, nkfac, sgdph"):
        create_optimizer(nn.Linear(2, 2), name)
