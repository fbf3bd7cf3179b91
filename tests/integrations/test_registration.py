"""The names under ``--optim``: parser, arguments, pickles, versions, import."""

import copy
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_precond.compat import transformers_internals as internals
from hf_precond.integrations.registration import register
from hf_precond.registry import get_info, list_optimizers

NAMES = list_optimizers()
ROOT = Path(__file__).parents[2]
each_name = pytest.mark.parametrize("name", NAMES)


def python(code, *words, folder=None):
    """Run code in a fresh process and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@each_name
def test_members_are_like_the_stock_ones(name):
    member = OptimizerNames(name)
    stock = OptimizerNames.ADAMW_TORCH
    assert type(member) is type(stock) and isinstance(member, str)
    assert member == name and hash(member) == hash(OptimizerNames[name.upper()])
    assert (member.name, member.value) == (name.upper(), name)
    assert member in list(OptimizerNames) and getattr(OptimizerNames, name.upper()) is member
    assert list(OptimizerNames).count(member) == 1
    assert str(member) == f"OptimizerNames.{name.upper()}"
    assert repr(member) == f"<OptimizerNames.{name.upper()}: {name!r}>"


def test_registering_again_changes_nothing():
    trainer = sys.modules["transformers.trainer"]
    before = (
        list(OptimizerNames),
        Trainer.get_optimizer_cls_and_kwargs,
        list(trainer.DEFAULT_CALLBACKS),
    )
    register()
    register()
    assert before == (
        list(OptimizerNames),
        Trainer.get_optimizer_cls_and_kwargs,
        list(trainer.DEFAULT_CALLBACKS),
    )


def test_bad_names_are_still_refused_and_the_names_are_listed():
    with pytest.raises(ValueError, match=r"afop is not a valid OptimizerNames.*'afopt'"):
        TrainingArguments("out", optim="afop")


@pytest.mark.parametrize("first", ["hf_precond", "transformers"])
def test_help_lists_the_names(first):
    code = f"""
import {first}
import hf_precond, transformers
transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses()
"""
    shown = python(code, "--help")
    choices = "".join(shown.split("--optim {")[1].split("}")[0].split())
    assert choices.split(",")[-len(NAMES) :] == list(NAMES)


def test_parser_refuses_an_unknown_name_and_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args(["--output_dir", "o", "--optim", "afop"])
    assert "afopt" in capsys.readouterr().err


def trips(args):
    """The same arguments by every way that they travel."""
    yield copy.deepcopy(args)
    yield pickle.loads(pickle.dumps(args))
    yield HfArgumentParser(type(args)).parse_dict(
        {k: v for k, v in args.to_dict().items() if k in ("output_dir", "optim", "optim_args")}
    )[0]


@each_name
@pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
def test_training_arguments_round_trip(name, kind, tmp_path):
    args = kind(str(tmp_path), optim=name, optim_args="lr=0.01,eps=1e-6", use_cpu=True)
    assert json.loads(args.to_json_string())["optim"] == args.to_dict()["optim"] == name
    torch.save(args, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    for back in [loaded, *trips(args)]:
        assert back.optim is args.optim is OptimizerNames(name)
        assert back.optim_args == args.optim_args


def test_a_process_that_did_not_import_the_package_opens_pickled_arguments(tmp_path):
    path = tmp_path / "training_args.bin"
    torch.save(TrainingArguments(str(tmp_path), optim="nkfac", use_cpu=True), path)
    code = "import sys, torch; print(repr(torch.load(sys.argv[1], weights_only=False).optim))"
    assert python(code, str(path)) == "<OptimizerNames.NKFAC: 'nkfac'>\n"


@each_name
def test_the_trainer_gets_an_optimizer_class_and_fields(name):
    text = "lr=0.5,state_dtype=float64"
    args = TrainingArguments(
        "out", optim=name, optim_args=text, weight_decay=0.25, adam_beta1=0.5, use_cpu=True
    )
    kind, values = Trainer.get_optimizer_cls_and_kwargs(args)
    assert kind is get_info(name).optimizer_cls and issubclass(kind, torch.optim.Optimizer)
    assert values == {
        "lr": 0.5, "weight_decay": 0.25, "betas": (0.5, 0.999), "eps": 1e-8,
        "state_dtype": "float64",
    }  # fmt: skip
    model = torch.nn.Linear(2, 2)
    assert Trainer.get_optimizer_cls_and_kwargs(args, model)[1] == values | {"attach_to": model}


def test_other_optimizers_are_looked_up_as_before():
    args = TrainingArguments("out", optim="sgd", optim_args="momentum=0.5", use_cpu=True)
    assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is torch.optim.SGD


def test_the_lookup_is_wrapped_once_and_for_the_added_names_alone():
    class OldTrainer:
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return "the stock way", {}

    module = types.SimpleNamespace(Trainer=OldTrainer)
    internals.wrap_lookup(module, lambda args, model: ("ours", {}))
    internals.wrap_lookup(module, lambda args, model: ("ours twice", {}))
    ask = OldTrainer.get_optimizer_cls_and_kwargs
    assert ask(types.SimpleNamespace(optim=OptimizerNames("afopt")), None) == ("ours", {})
    assert ask(types.SimpleNamespace(optim=OptimizerNames("sgd"))) == ("the stock way", {})


def test_a_class_in_a_script_is_known_after_registering_again():
    code = """
from dataclasses import dataclass
from typing import ClassVar
import hf_precond
from hf_precond.optimizers.base.optimizer import PrecondOptimizer
from transformers import Trainer, TrainingArguments

@dataclass(frozen=True)
class MineConfig(hf_precond.OptimizerConfig):
    name: ClassVar[str] = "mine"

@hf_precond.register_optimizer("mine", config=MineConfig, select=None, description="of a script")
class Mine(PrecondOptimizer):
    pass

hf_precond.register()
args = TrainingArguments("out", use_cpu=True, optim="mine", optim_args="lr=0.5")
print(Trainer.get_optimizer_cls_and_kwargs(args)[1]["lr"], repr(args.optim))
"""
    assert python(code) == "0.5 <OptimizerNames.MINE: 'mine'>\n"


def test_a_name_that_transformers_has_itself_stays_its_own():
    code = """
import transformers.training_args as training_args
names = {name.name: name.value for name in training_args.OptimizerNames} | {"AFOPT": "afopt"}
training_args.OptimizerNames = training_args.ExplicitEnum("OptimizerNames", names)
import hf_precond
from transformers import Trainer, TrainingArguments
args = TrainingArguments("out", use_cpu=True, optim="nkfac")
print(Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__)
args = TrainingArguments("out", use_cpu=True, optim="afopt", optim_args="made_by=transformers")
assert list(training_args.OptimizerNames).count("afopt") == 1
try:
    Trainer.get_optimizer_cls_and_kwargs(args)
except ValueError as error:
    print(error)
from tests.integrations.tiny import bert
Trainer(bert(), args)
print(type(hf_precond.create_optimizer(bert(), "afopt")).__name__)
"""
    assert python(code) == (
        "NKFAC\nTrainer cannot instantiate unsupported optimizer: OptimizerNames.AFOPT\nAFOpt\n"
    )


@pytest.mark.parametrize("version", ["5.4.0", "5.23.0", "5.24.0.dev0", "5.99"])
def test_supported_versions(version):
    assert internals.is_supported(version)


@pytest.mark.parametrize("version", ["4.57.1", "5.3.9", "6.0.0", "6.0.0.dev0", None])
def test_other_versions_are_refused_with_the_range(version, monkeypatch):
    monkeypatch.setattr(internals, "transformers_version", lambda: version)
    with pytest.raises(RuntimeError, match=r"transformers>=5\.4,<6") as refusal:
        register()
    assert (version or "not installed") in str(refusal.value)
    assert "create_optimizer" in str(refusal.value)


def test_importing_beside_an_unsupported_transformers_warns_and_works():
    code = """
import sys, types, warnings
fake = types.ModuleType("transformers")
fake.__version__ = "4.57.1"
sys.modules["transformers"] = fake
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_precond
print(len(caught), "transformers 4.57.1 is installed" in str(caught[0].message))
print(hf_precond.AFOptConfig(lr=0.1).lr)
"""
    assert python(code) == "1 True\n0.1\n"


def test_importing_costs_little_and_needs_torch_and_transformers_only():
    code = """
import sys
import hf_precond
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers",
    "huggingface_hub", "accelerate", "datasets", "evaluate", "peft", "numpy"}))
from transformers import Trainer
before = set(sys.modules)
hf_precond.create_optimizer, hf_precond.AFOpt, hf_precond.PrecondTrainer
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}
    & {"accelerate", "datasets", "evaluate", "peft", "matplotlib", "pandas"}))
"""
    assert python(code) == "[]\n[]\n"


def test_importing_without_the_optional_packages():
    code = """
import sys
for name in ("datasets", "evaluate", "peft", "accelerate"):
    sys.modules[name] = None
import hf_precond, torch
from transformers import BertConfig, BertModel
model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=8))
print(type(hf_precond.create_optimizer(model, "afopt")).__name__)
"""
    assert python(code) == "AFOpt\n"
