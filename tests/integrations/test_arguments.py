"""``--optim_args`` and the Trainer's own arguments become a config."""

import dataclasses
import logging

import pytest
from transformers import Trainer, TrainingArguments

from hf_precond import AFOpt, AFOptConfig, NKFACConfig, PrecondTrainer
from hf_precond.integrations.arguments import config_from_arguments, parse_pairs
from tests.integrations.tiny import bert


def arguments(optim="afopt", optim_args=None, **own):
    return TrainingArguments("out", optim=optim, optim_args=optim_args, use_cpu=True, **own)


def test_defaults_are_the_trainers_then_the_configs():
    config = config_from_arguments(arguments())
    assert config == AFOptConfig(lr=5e-5)


def test_the_trainers_own_arguments_act():
    config = config_from_arguments(
        arguments(
            learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6
        )
    )
    assert config == AFOptConfig(lr=3e-4, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)


def test_optim_args_come_first_and_have_the_fields_types(caplog):
    text = (
        "lr=1e-2, betas=0.7:0.95,scope=all_linear , inverse_interval=7,nesterov=false,"
        "state_dtype=none,weight_decay=0"
    )
    with caplog.at_level(logging.WARNING):
        config = config_from_arguments(arguments("afopt", text, learning_rate=3e-4), warn=True)
    assert config == AFOptConfig(
        lr=1e-2, betas=(0.7, 0.95), scope="all_linear", inverse_interval=7, nesterov=False
    )
    assert [r.getMessage() for r in caplog.records] == [
        "--learning_rate 0.0003 is not used: --optim_args sets lr=0.01."
    ]


def test_an_overruled_argument_is_told_once(caplog):
    args = arguments("afopt", "lr=1e-2", learning_rate=3e-4)
    with caplog.at_level(logging.WARNING, logger="hf_precond"):
        trainer = PrecondTrainer(bert(), args)
        assert trainer.optimizer_config.lr == 1e-2
        trainer.create_optimizer()
    assert [r.getMessage() for r in caplog.records if r.name.startswith("hf_precond")] == [
        "--learning_rate 0.0003 is not used: --optim_args sets lr=0.01."
    ]
    trainer.optimizer.close()


def test_a_saved_config_stands_before_the_trainers_and_behind_the_other_pairs(tmp_path, caplog):
    folder = tmp_path / "a folder with spaces"
    NKFACConfig(lr=0.1, damping=0.5, base="sgd", betas=(0.5, 0.6)).save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        config = config_from_arguments(
            arguments("nkfac", f"damping=0.25,config={folder}", weight_decay=0.3, adam_beta2=0.9),
            warn=True,
        )
    assert config == NKFACConfig(lr=0.1, damping=0.25, base="sgd", betas=(0.5, 0.6))
    assert [r.getMessage() for r in caplog.records] == [
        f"--optim_args config={folder} sets the learning rate: lr=0.1. For another write lr=… "
        "beside it.",
        f"--weight_decay 0.3 is not used: --optim_args config={folder} sets weight_decay=0.0.",
        f"--adam_beta2 0.9 is not used: --optim_args config={folder} sets betas=(0.5, 0.6).",
    ]


def test_a_saved_learning_rate_that_is_the_trainers_is_not_told(tmp_path, caplog):
    NKFACConfig(lr=3e-4).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        given = arguments("nkfac", f"config={tmp_path}", learning_rate=3e-4)
        assert config_from_arguments(given, warn=True).lr == 3e-4
    assert not caplog.records


def test_another_optimizers_config_is_refused(tmp_path):
    NKFACConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this config is for 'nkfac', and AFOptConfig reads"):
        config_from_arguments(arguments("afopt", f"config={tmp_path}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dampin=1.0", "--optim_args: dampin: afopt has no such field; did you mean 'damping'"),
        ("damping=-1", r"damping=-1.0: afopt takes a number in \(0, infinity\)"),
        ("damping=much", "damping='much': afopt takes a number"),
        ("inverse_interval=2.5", "inverse_interval='2.5': afopt takes an integer"),
        ("scope=atention", "did you mean 'attention'"),
        ("nesterov=maybe", "nesterov='maybe': afopt takes True or False"),
        ("betas=0.9", "betas.*two numbers, each"),
        ("damping", "damping is not of the form key=value"),
        ("damping=1=2", "damping=1=2 is not of the form key=value"),
        ("damping=1,", "an empty piece"),
        ("damping=,lr=1", "damping= is not of the form key=value"),
        ("=1", "=1 is not of the form key=value"),
        ("damping=1,damping=2", "damping stands twice"),
        ("betas=(0.9,0.99)", "betas=0.9:0.99"),
        ("learning_rate=1e-3", "learning_rate: afopt has no such field; did you mean 'lr'"),
        ("Scope=attention", "did you mean 'scope'"),
        ({"damping": 1.0}, "it is a dict and must be one string, key=value"),
    ],
)
def test_bad_optim_args_get_a_sentence_when_they_are_parsed(text, message):
    with pytest.raises(ValueError, match=message):
        arguments("afopt", text)
    given = arguments()
    given.optim_args = text  # by the script, later
    with pytest.raises(ValueError, match=message):
        Trainer(bert(), given)
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(given)


def test_optim_args_of_another_optimizer_are_not_parsed():
    assert arguments("rmsprop", "alpha=0.9").optim_args == "alpha=0.9"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"adam_beta1": 1.5}, r"^--adam_beta1 and --adam_beta2: betas=\(1.5, 0.999\): afopt takes"),
        ({"learning_rate": -1.0}, r"^--learning_rate: lr=-1.0: afopt takes a number in \[0"),
        ({"weight_decay": float("nan")}, "^--weight_decay: weight_decay=nan"),
        ({"adam_epsilon": -1e-8}, "^--adam_epsilon: eps=-1e-08"),
    ],
)
def test_a_bad_argument_of_the_trainer_is_named_as_it_was_given(own, message):
    with pytest.raises(ValueError, match=message):
        arguments(**own)


def test_a_bad_argument_of_the_trainer_that_is_not_used_is_no_matter():
    assert config_from_arguments(arguments("afopt", "lr=1e-2", learning_rate=-1.0)).lr == 1e-2


def test_a_missing_config_gets_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--optim_args config=.*holds no optimizer_"):
        arguments("afopt", f"config={tmp_path}")


@pytest.mark.parametrize("text", [None, "", "  "])
def test_no_pairs(text):
    assert parse_pairs(text) == {}


def test_a_name_that_is_set_later_is_one_of_ours():
    args = TrainingArguments("out", use_cpu=True)
    args.optim = "afopt"
    assert isinstance(Trainer(bert(), args).create_optimizer(), AFOpt)
    args = TrainingArguments("out", use_cpu=True)
    made = Trainer(bert(), args)
    args.optim = "afopt"
    assert isinstance(made.create_optimizer(), AFOpt)


def test_a_class_that_completes_its_arguments_is_checked_when_the_trainer_is_made():
    @dataclasses.dataclass
    class Late(TrainingArguments):
        learning_rate: float | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self.learning_rate = self.learning_rate or 3e-4

    args = Late("out", optim="afopt", use_cpu=True)
    assert config_from_arguments(args).lr == 3e-4
    args = Late("out", optim="afopt", optim_args="momentum=2", use_cpu=True)
    with pytest.raises(ValueError, match="momentum"):
        Trainer(bert(), args)
