import dataclasses
import json

import numpy as np
import pytest
import torch

from hf_precond.config.base import OptimizerConfig
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.optimizers.sgdph.config import SGDPHConfig

CONFIGS = [AdamRConfig, AFOptConfig, NKFACConfig, SGDPHConfig]


@pytest.mark.parametrize("cls", CONFIGS)
def test_round_trips_through_plain_values(cls):
    config = cls(lr=0.25, betas=(0.8, 0.99))
    values = config.to_dict()
    assert values["optimizer"] == cls.name and values["betas"] == [0.8, 0.99]
    assert cls.from_dict(values) == config


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_is_documented_and_has_a_legal_default(cls):
    documented = OptimizerConfig.__doc__ + cls.__doc__
    for item in dataclasses.fields(cls):
        assert f"{item.name}:" in documented or f"{item.name}," in documented, item.name
        assert getattr(cls(), item.name) == item.default


@pytest.mark.parametrize(
    ("cls", "field", "value", "said"),
    [
        (AFOptConfig, "lr", -1.0, "[0, infinity)"),
        (AFOptConfig, "scope", "atention", "did you mean 'attention'"),
        (AFOptConfig, "nesterov", 1, "True or False"),
        (AFOptConfig, "stat_interval", 0, "an integer in [1, infinity)"),
        (AFOptConfig, "stat_interval", 2.0, "an integer"),
        (AFOptConfig, "betas", (0.9, 1.0), "two numbers, each in [0, 1)"),
        (AFOptConfig, "betas", 0.9, "two numbers"),
        (AdamRConfig, "floor", True, "a number in [0, infinity)"),
        (NKFACConfig, "damping", 0.0, "(0, infinity)"),
        (NKFACConfig, "state_dtype", "int8", "'bfloat16'"),
        (AFOptConfig, "state_dtype", "float16", "'bfloat16'"),
        (AdamRConfig, "state_dtype", torch.float16, "'bfloat16'"),
        (SGDPHConfig, "tau", float("nan"), "(0, infinity)"),
        (SGDPHConfig, "probe", None, "'rademacher'"),
    ],
)
def test_a_bad_value_names_the_field_and_the_legal_range(cls, field, value, said):
    with pytest.raises(ValueError) as refusal:
        cls.create(**{field: value})
    assert str(refusal.value).startswith(field) and said in str(refusal.value)


def test_an_unknown_field_names_the_nearest_legal_one():
    with pytest.raises(ValueError, match="dampin: nkfac has no such field; did you mean 'damping'"):
        NKFACConfig.create(dampin=1.0)
    with pytest.raises(ValueError, match="did you mean 'scope'"):
        AFOptConfig().replace(scop="attention")
    with pytest.raises(ValueError, match=r"zzz: nkfac has no such field\. Its fields are lr,"):
        NKFACConfig.create(zzz=1.0)
    with pytest.raises(ValueError, match=r"lr_scale: nkfac has no .*; it is one of afopt and muon"):
        NKFACConfig.create(lr_scale=1.0)
    with pytest.raises(ValueError, match=r"basis_interval: afopt .*; it is one of adamr"):
        AFOptConfig.create(basis_interval=3)
    with pytest.raises(ValueError, match=r"max_grad_norm: afopt .*the Trainer has it, as --max_gr"):
        AFOptConfig.create(max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"lr=None: afopt takes .*starting_lr\(\) is None where"):
        AFOptConfig.create(lr=None)


@pytest.mark.parametrize(
    ("name", "field"),
    [("learning_rate", "lr"), ("adam_beta2", "betas"), ("adam_epsilon", "eps"), ("LR", "lr")],
)
def test_the_trainers_names_lead_to_the_fields(name, field):
    with pytest.raises(ValueError, match=f"{name}: sgdph has no such.*did you mean '{field}'"):
        SGDPHConfig.create(**{name: 1.0})


def test_numbers_of_numpy_become_plain_ones():
    config = NKFACConfig(lr=np.float32(0.5), stat_interval=np.int64(7), betas=(np.float32(0.5), 0))
    assert config == NKFACConfig(lr=0.5, stat_interval=7, betas=(0.5, 0.0))
    assert NKFACConfig.from_dict(json.loads(config.to_json())) == config
    with pytest.raises(ValueError, match="an integer"):
        NKFACConfig(stat_interval=np.float64(7.0))


def test_strings_take_the_fields_types():
    config = AFOptConfig.from_strings(
        {
            "lr": "2e-3",
            "betas": "0.8:0.95",
            "nesterov": "False",
            "stat_interval": "7",
            "scope": "all_linear",
            "state_dtype": "none",
        }
    )
    assert config == AFOptConfig(
        lr=2e-3, betas=(0.8, 0.95), nesterov=False, stat_interval=7, scope="all_linear"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"stat_interval": "2.5"}, "stat_interval='2.5': afopt takes an integer"),
        ({"nesterov": "maybe"}, "nesterov='maybe'"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"betas": "0.9"}, "betas"),
    ],
)
def test_strings_of_the_wrong_type_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        AFOptConfig.from_strings(text)


def test_a_config_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="this config is for 'adamr'"):
        NKFACConfig.from_dict(AdamRConfig().to_dict())


def test_state_dtype():
    assert NKFACConfig(state_dtype=torch.bfloat16).state_dtype == "bfloat16"
    assert NKFACConfig().factor_dtype(torch.float64) == torch.float64
    assert NKFACConfig().factor_dtype(torch.bfloat16) == torch.float16
    assert NKFACConfig(state_dtype="float32").factor_dtype(torch.bfloat16) == torch.float32
    assert AFOptConfig().factor_dtype(torch.bfloat16) == torch.float32
    assert NKFACConfig(state_dtype="bfloat16").factor_dtype(torch.float64) == torch.bfloat16
