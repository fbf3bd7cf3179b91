"""Fields of AFOpt that exclude each other."""

import pytest

from hf_precond.optimizers.afopt.config import AFOptConfig


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"joint": True}, "direction='inverse'"),
        ({"joint": True, "direction": "inverse", "space": "product"}, "space='logits'"),
        ({"center": True, "space": "product"}, "center"),
        ({"scaling": "cap", "space": "product"}, "scaling"),
        ({"scaling": "graft", "base": "muon"}, "graft"),
    ],
)
def test_contradictions_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        AFOptConfig.create(**fields)
