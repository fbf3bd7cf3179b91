"""Fields and values that earlier releases had: at their defaults they are left out."""

import dataclasses
from typing import ClassVar, Literal

import pytest
import torch

from hf_precond import create_optimizer
from hf_precond.config.base import Removed
from hf_precond.optimizers.muon.config import MuonConfig


@dataclasses.dataclass(frozen=True)
class Later(MuonConfig):
    """Muon's config of a later release."""

    removed: ClassVar = {"polar": Removed(False, "0.2.0"), "power": Removed(0.5, "0.2.0")}
    removed_values: ClassVar = {"variant": {"mega": "0.1.0"}}
    layout: ClassVar = ("variant",)
    variant: Literal["muon", "normuon"] = "muon"


@pytest.mark.parametrize("value", [False, "false", "off"])
def test_a_removed_field_at_its_default_is_left_out(value):
    plain = Later()
    assert Later.create(polar=value, power=0.5) == plain
    assert plain.replace(polar=value) == plain
    assert Later.from_strings({"polar": str(value), "lr": "0.001"}) == plain
    assert Later.from_dict({"optimizer": "muon", "polar": False}) == plain


@pytest.mark.parametrize("value", [True, "true"])
def test_another_value_is_refused_with_the_last_release_that_has_it(value):
    said = r"polar=True: muon no longer has this field, and hf_precond 0\.2\.0 is the last"
    for read in (lambda **v: Later.create(**v), Later().replace):
        with pytest.raises(ValueError, match=said):
            read(polar=value)
    with pytest.raises(ValueError, match=said):
        Later.from_strings({"polar": str(value)})
    with pytest.raises(ValueError, match=r"power=0\.25.*power=0\.5 there"):
        Later.from_dict({"power": 0.25})


def test_a_removed_value_is_refused_with_the_last_release_that_has_it():
    with pytest.raises(ValueError, match=r"takes one of .*hf_precond 0\.1\.0 is the last"):
        Later.create(variant="mega")
    with pytest.raises(ValueError, match=r"no such field; did you mean"):
        Later.create(polr=True)


def test_checkpoints_follow_the_same_rule():
    def optimizer():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        made = create_optimizer(model, "muon")
        made.config = Later()
        model(torch.ones(2, 4)).sum().backward()
        made.step()
        return made

    saved = optimizer().state_dict()
    layout = saved["hf_precond"]["layout"]
    layout["polar"] = False
    optimizer().load_state_dict(saved)
    layout["polar"] = True
    with pytest.raises(ValueError, match=r"polar=True: .*0\.2\.0 is the last"):
        optimizer().load_state_dict(saved)
    layout |= {"polar": False, "variant": "mega"}
    with pytest.raises(ValueError, match=r"variant='mega', and hf_precond 0\.1\.0 is the last"):
        optimizer().load_state_dict(saved)
