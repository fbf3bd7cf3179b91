"""Fields and values that earlier releases had: at their defaults they are left out."""

import contextlib
import dataclasses
import json
import pickle
from typing import ClassVar, Literal

import pytest
import torch

from hf_precond import create_optimizer
from hf_precond.config.base import Removed
from hf_precond.integrations.arguments import config_from_pairs
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.optimizer import AFOpt
from hf_precond.optimizers.muon.config import MuonConfig


@dataclasses.dataclass(frozen=True)
class Later(MuonConfig):
    """Muon's config of a later release."""

    removed: ClassVar = {
        "polar": Removed(False, "0.2.0"),
        "power": Removed(0.5, "0.2.0"),
        "cap": Removed(None, "0.2.0"),
    }
    removed_values: ClassVar = {"variant": {"mega": "0.1.0"}}
    layout: ClassVar = ("variant",)
    variant: Literal["muon", "normuon"] = "muon"


def test_a_removed_field_at_its_default_is_left_out():
    plain = Later()
    assert Later.create(polar=False, power=0.5) == plain
    assert plain.replace(polar=False) == plain
    assert Later.from_strings({"polar": "false", "lr": "0.001"}) == plain
    assert Later.from_dict({"optimizer": "muon", "polar": False}) == plain


def test_another_value_is_refused_with_the_last_release_that_has_it():
    said = r"polar=True: muon no longer has this field, and hf_precond 0\.2\.0 is the last"
    for read in (lambda **v: Later.create(**v), Later().replace):
        with pytest.raises(ValueError, match=said):
            read(polar=True)
    with pytest.raises(ValueError, match=r"power=0\.25.*power=0\.5 there"):
        Later.from_dict({"power": 0.25, "polar": True})


def test_texts_are_read_as_the_field_read_them():
    assert Later.from_strings({"polar": " off", "power": "0.50"}) == Later()
    for text, said in (("yes", "polar=True"), ("maybe", "polar='maybe'")):
        with pytest.raises(ValueError, match=said):
            Later.from_strings({"polar": text})
    with pytest.raises(ValueError, match=r"power=0\.25"):
        Later.from_strings({"power": "0.25"})
    assert Later.from_strings({"cap": "None"}) == Later.from_strings({"cap": "null"}) == Later()
    with pytest.raises(ValueError, match=r"cap='0\.5'.*cap=None there"):
        Later.from_strings({"cap": "0.5"})


def test_an_old_file_may_be_overridden(tmp_path):
    values = AFOptConfig().to_dict() | {"scaling": "graft", "joint": True}
    (tmp_path / "optimizer_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"joint=True.*hf_precond 0\.2\.0 is the last"):
        AFOptConfig.from_pretrained(tmp_path)
    found = AFOptConfig.from_pretrained(tmp_path, scaling="cap", joint=False)
    assert found == AFOptConfig(scaling="cap")
    pairs = {"config": str(tmp_path), "scaling": "cap", "joint": "false"}
    assert config_from_pairs(AFOptConfig, pairs) == found


def test_parameter_groups_and_pickles_follow_the_same_rule():
    layer = torch.nn.Linear(4, 4)
    for joint in (False, True):
        groups = [{"params": list(layer.parameters()), "joint": joint}]
        refused = pytest.raises(ValueError, match="joint=True: afopt no longer has")
        with refused if joint else contextlib.nullcontext():
            AFOpt(groups, attach_to=torch.nn.Sequential(layer))
    old = AFOptConfig()
    vars(old)["joint"] = False
    assert pickle.loads(pickle.dumps(old)) == AFOptConfig()
    vars(old)["joint"] = True
    with pytest.raises(ValueError, match="joint=True"):
        pickle.loads(pickle.dumps(old))


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
    with pytest.raises(ValueError, match=r"saved with polar=True, and hf_precond 0\.2\.0 is the"):
        optimizer().load_state_dict(saved)
    layout |= {"polar": False, "variant": "mega"}
    with pytest.raises(ValueError, match=r"variant='mega', and hf_precond 0\.1\.0 is the last"):
        optimizer().load_state_dict(saved)
