"""``create_optimizer``'s first argument."""

import pytest
from torch import nn

from hf_precond import create_optimizer


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
