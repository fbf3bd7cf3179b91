"""Fields and values that AFOpt no longer has."""

import pytest

from hf_precond.optimizers.afopt.config import AFOptConfig


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"joint": True}, "joint=True"),
        ({"center": True}, "center=True"),
        ({"direction": "inverse_sqrt"}, "has 'inverse_sqrt'"),
        ({"covariant_damping": True}, "covariant_damping=True"),
        ({"space": "product"}, "space='product'"),
        ({"scaling": "graft"}, "has 'graft'"),
        ({"scaling": "logit_rms"}, "has 'logit_rms'"),
    ],
)
def test_they_are_refused_with_the_last_release_that_has_them(fields, word):
    with pytest.raises(ValueError, match=r"hf_precond 0\.2\.0 is the last") as refusal:
        AFOptConfig.create(**fields)
    assert word in str(refusal.value)


def test_configs_with_their_defaults_are_read():
    old = {
        "joint": False,
        "center": False,
        "covariant_damping": False,
        "space": "logits",
        "lr": 0.5,
    }
    assert AFOptConfig.from_dict(old) == AFOptConfig(lr=0.5)
