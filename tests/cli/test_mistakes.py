"""Mistakes on the command line: one sentence with field, range and remedy, and exit code 2."""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import BertConfig

from hf_precond.cli import mistakes
from hf_precond.cli.main import main
from hf_precond.integrations.callback import PrecondCallback

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).parent / "scripts" / "parse.py")


@pytest.fixture
def launcher(monkeypatch, tmp_path):
    """The command line in this process, which is left as it was."""
    monkeypatch.setattr(argparse.ArgumentParser, "error", argparse.ArgumentParser.error)
    monkeypatch.setattr(sys, "argv", ["hf-precond"])
    monkeypatch.setattr(sys, "path", ["bin", *sys.path])
    monkeypatch.setenv("HF_PRECOND", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    BertConfig(num_hidden_layers=1).save_pretrained("model")
    for name, text in BENCHES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "x.tsv").touch()

    def launch(words):
        try:
            return main(words)
        except SystemExit as end:
            return end.code

    return launch


def fields(text, optim="afopt"):
    """A run whose mistake is in the fields."""
    return ["run", SCRIPT, "--optim", optim, "--optim_args", text]


def trainer(*words):
    """A run whose mistake is in the Trainer's own arguments."""
    return ["run", SCRIPT, "--optim", "afopt", *words]


MISTAKES = [
    # The name
    (["run", SCRIPT, "--optim", "afpot"], ["--optim afpot", "did you mean 'afopt'?"]),
    (["run", SCRIPT, "--optim", "nkfak"], ["did you mean 'nkfac'?"]),
    (["run", SCRIPT, "--optim", "SGDPH"], ["did you mean 'sgdph'?"]),
    (["run", SCRIPT, "--optim=adam-r"], ["did you mean 'adamr'?"]),
    (["list", "afop"], ["'afop'", "did you mean 'afopt'?"]),
    (["explain", "model", "--optim", "afop"], ["did you mean 'afopt'?"]),
    (["explain", "model", "--optim", "adamw"], ["'adamw' is unknown", "afopt"]),
    # The fields
    (fields("damping=-1"), ["damping=-1.0", "(0, infinity)", "default is 1.0"]),
    (fields("damping=zero"), ["damping='zero'", "a number in (0, infinity)"]),
    (fields("dampin=1"), ["dampin", "did you mean 'damping'?"]),
    (fields("learning_rate=1"), ["learning_rate", "did you mean 'lr'?"]),
    (fields("scope=mlp"), ["scope='mlp'", "'query_key', 'attention', 'all_linear'"]),
    (fields("scope=atention"), ["did you mean 'attention'?"]),
    (fields("momentum=1"), ["momentum=1.0", "[0, 1)", "default is 0.8"]),
    (fields("betas=0.9"), ["betas=(0.9,)", "two numbers, each in [0, 1)"]),
    (fields("betas=0.9:1.5"), ["betas=(0.9, 1.5)", "two numbers"]),
    (fields("max_dim=0"), ["max_dim=0", "an integer in [1, infinity)"]),
    (fields("max_dim=2.5"), ["max_dim='2.5'", "an integer"]),
    (fields("nesterov=maybe"), ["nesterov='maybe'", "True or False"]),
    (fields("stat_interval=0"), ["stat_interval=0", "[1, infinity)"]),
    (fields("state_dtype=float16"), ["state_dtype='float16'", "'float32', 'float64', 'bfloat16'"]),
    (fields("base=adam"), ["base='adam'", "did you mean 'adamw'?"]),
    (fields("diagnostics=always"), ["diagnostics='always'", "'auto', 'full', 'off'"]),
    (fields("precision=fp8"), ["precision='fp8'", "'highest'"]),
    (fields("joint=true"), ["joint=True", "hf_precond 0.2.0 is the last release"]),
    (fields("reference=true,base=adamr", "nkfac"), ["reference=True", "base='sgd'"]),
    (fields("basis_tolerance=2", "adamr"), ["basis_tolerance=2.0", "[0, 1]"]),
    (fields("probe=one", "sgdph"), ["probe='one'", "did you mean 'ones'?"]),
    (fields("config=nowhere"), ["config=nowhere", "there is no such folder"]),
    # Their form
    (fields("damping"), ["damping is not of the form key=value"]),
    (fields("damping=1,,lr_scale=2"), ["a comma too many"]),
    (fields("damping=1,damping=2"), ["damping stands twice"]),
    # The Trainer's arguments
    (trainer("--learning_rate", "-1"), ["--learning_rate", "lr=-1.0", "[0, infinity)"]),
    (trainer("--weight_decay", "-0.1"), ["--weight_decay", "weight_decay=-0.1"]),
    (trainer("--adam_beta1", "1.5"), ["--adam_beta1", "betas=(1.5, 0.999)"]),
    (trainer("--adam_epsilon", "-1"), ["--adam_epsilon", "eps=-1.0"]),
    # What is run
    (["run"], ["no script was given"]),
    (["run", "nowhere.py"], ["there is no script at 'nowhere.py'"]),
    (["run", "empty"], ["a folder without a __main__.py"]),
    (["run", "--optim", "afopt", "train.py"], ["--optim stands before the script"]),
    (["run", "-m"], ["no module was given"]),
    (["run", "-m", "nowhere.train"], ["-m nowhere.train", "no module 'nowhere'"]),
    (["run", "-m", "json.nowhere"], ["-m json.nowhere", "no module 'json.nowhere'"]),
    (["run", "-m", "xml"], ["-m xml", "no module 'xml.__main__'"]),
    (["run", "ls"], ["'ls'", "no Python program"]),
    # The commands
    (["explian", "model"], ["'explian' is no command", "did you mean 'explain'?"]),
    (["lst", "afopt"], ["'lst' is no command", "did you mean 'list'?"]),
    ([], ["COMMAND", "--help"]),
    (["explain"], ["model", "--optim", "hf-precond explain --help"]),
    (["explain", "model", "--optim", "afopt", "--optin_args", "x"], ["--optin_args", "--help"]),
    (["explain", "nowhere", "--optim", "afopt"], ["nowhere"]),
    (["explain", "./nowhere", "--optim", "afopt"], ["./nowhere", "no such folder"]),
    (["explain", "model", "--optim", "afopt", "--optim-args", "scope=mlp"], ["scope='mlp'"]),
    (["compare"], ["RUN_DIR", "hf-precond compare --help"]),
    (["compare", "nowhere"], ["nowhere", "no such folder"]),
    (["compare", "empty"], ["empty", "trainer_state.json", "Trainer"]),
    (["doctor", "--optim", "afpot"], ["did you mean 'afopt'?"]),
    (["explain", "empty", "--optim", "afopt"], ["empty", "config.json"]),
    (["explain", "broken", "--optim", "afopt"], ["broken", "config.json"]),
    (["explain", "model", "--optim", "afopt", "--optim_args", "dampin=1"], ["'damping'"]),
    (["explain", "model", "--optim", "afopt", "--auto_class", "Trainer"], ["--auto_class"]),
    (["explain", "model", "--optim", "afopt", "--device", "h1000"], ["h1000", "h100"]),
    (["explain", "model", "--optim", "afopt", "--device", "h100", "--tokens", "0"], ["--tokens"]),
    (["explain", "model", "--optim", "afopt", "--device", "h100", "--length", "-1"], ["--length"]),
    (["explain", "model", "--optim", "afopt", "--tokens", "many"], ["--tokens", "int"]),
    (["explain", "model", "--optim", "afopt", "--tokens", "64"], ["--tokens", "--device"]),
    (["bench"], ["file", "hf-precond bench --help"]),
    (["bench", "nowhere.toml"], ["nowhere.toml", "no such file"]),
    (["bench", "empty"], ["empty", "no such file"]),
    (["bench", "tasks.toml", "--jobs", "0"], ["--jobs 0", "at least 1"]),
    (["bench", "tasks.toml", "--jobs", "all"], ["--jobs", "int"]),
    (["bench", "no.toml"], ["no.toml", "at end of document"]),
    (["bench", "tasks.toml"], ["tasks.toml", "optimizers"]),
    (["bench", "arms.toml"], ["arms.toml", "did you mean 'afopt'?"]),
    (["bench", "place.toml"], ["place.toml", "[optimizers.afopt] lr: unknown", "are fields"]),
    (["bench", "field.toml"], ["field.toml", "did you mean 'damping'?"]),
    (["bench", "trials.toml"], ["trials.toml", "trials = 0", "at least"]),
]

TASK = '[tasks.text]\nfunction = "gpt"\n'
BENCHES = {
    "no.toml": "trials = [",
    "tasks.toml": TASK,
    "arms.toml": TASK + "[optimizers.afop]\nfields = { lr = 1e-3 }\n",
    "place.toml": TASK + "[optimizers.afopt]\nlr = 1e-3\n",
    "field.toml": TASK + "[optimizers.afopt]\nfields = { lr = 1e-3, dampin = 1 }\n",
    "trials.toml": "trials = 0\n" + TASK + "[optimizers.afopt]\nfields = { lr = 1e-3 }\n",
}

EXAMPLES = [
    ("text_classification", "", ["nothing to do", "--do_train, --do_eval or both"]),
    ("text_classification", "--do_trian", ["--do_trian", "did you mean --do_train?"]),
    ("text_classification", "--do_train --optim afpot", ["did you mean 'afopt'?"]),
    ("text_classification", "--do_train --optim afopt --optim_args damping=-1", ["(0, infinity)"]),
    ("text_classification", "--do_train --optim muon --learning_rate -1", ["lr=-1.0", "infinity"]),
    ("text_classification", "--do_train --learning_rate fast", ["--learning_rate", "'fast'"]),
    ("text_classification", "--do_train --train_file a.csv", ["--validation_file", "give both"]),
    ("text_classification", "--do_train --train_file a.csv --validation_file a.csv", ["'a.csv'"]),
    ("text_classification", "--do_train --train_file x.tsv --validation_file x.tsv", [".parquet"]),
    ("text_classification", "nowhere.json", ["nowhere.json"]),
    ("image_classification", "--do_train --train_dir empty --dataset_name beans", ["give both"]),
    ("causal_lm_lora", "--do_train --lora_r 0", ["--lora_r", "[1, infinity)"]),
    ("accelerate_loop", "--max_steps 0", ["--max_steps", "[1, infinity)"]),
    ("accelerate_loop", "--mixed_precision fp8", ["--mixed_precision fp8", "no, bf16 or fp16"]),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(w[-2:]) for w, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_exit_code_2(words, said, launcher, capsys):
    assert launcher(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("hf_precond: ") and shown.err.count("\n") == 1, shown.err
    for part in said:
        assert part in shown.err


@pytest.mark.parametrize(
    ("script", "words", "said"), EXAMPLES, ids=[f"{e[0]} {e[1]}" for e in EXAMPLES]
)
def test_so_is_a_mistake_in_the_arguments_of_an_example(script, words, said, launcher, capsys):
    before = set(sys.modules)
    path = ROOT / "examples" / f"{script}.py"
    assert launcher(["run", str(path), *words.split()]) == 2
    for name in (
        "common",
        "shakespeare",
        "text_classification",
    ):  # of other folders they are others
        if name not in before:
            sys.modules.pop(name, None)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "error: " in line or "hf_precond: " in line]
    assert len(lines) == 1 and "Traceback" not in shown.err, shown.err
    assert shown.err.splitlines()[-1] == lines[0]
    for part in said:
        assert part in lines[0]


def test_a_name_that_only_transformers_knows_is_left_to_it(launcher, capsys):
    assert launcher(["run", SCRIPT, "--optim", "sgd"]) == 0
    assert "parsed sgd" in capsys.readouterr().out


def test_another_parsers_error_is_its_own(launcher, capsys, tmp_path):
    script = tmp_path / "own.py"
    script.write_text(
        "import argparse\np = argparse.ArgumentParser()\n"
        "p.add_argument('--optim', choices=['adam', 'lbfgs'])\n"
        "p.add_argument('--size', type=int)\nprint(p.parse_args())\n"
    )
    assert launcher(["run", str(script), "--optim", "adam"]) == 0
    assert "optim='adam'" in capsys.readouterr().out
    assert launcher(["run", str(script), "--size", "x"]) == 2
    assert "usage: own.py" in capsys.readouterr().err


def test_an_error_of_the_package_that_is_no_mistake_keeps_its_traceback(launcher, tmp_path):
    script = tmp_path / "own.py"
    script.write_text(
        "import hf_precond\nfrom torch import nn\n"
        "hf_precond.create_optimizer(nn.Linear(2, 2), 'nkfac', damping=-1)\n"
    )
    with pytest.raises(ValueError, match="damping"):
        launcher(["run", str(script)])


@pytest.mark.parametrize(
    ("optim", "text", "said"),
    [
        ("adamw_torch", "damping=1", "--optim_args damping=1: adamw_torch does not take damping"),
        ("adamw_torch", "basis_interval=5", "write --optim adamr, which does"),
        ("adamw_torch", "betas=0.9", None),
        ("rmsprop", "momentum=0.1,alpha=0.9", None),
    ],
)
def test_fields_of_ours_that_another_optimizer_is_given_are_told(optim, text, said, caplog):
    args = SimpleNamespace(optim=optim, optim_args=text, process_index=0)
    with caplog.at_level(logging.WARNING):
        PrecondCallback().on_init_end(args, None, None)
    assert [said in message for message in caplog.messages] == ([] if said is None else [True])


def test_arguments_without_optim_are_left_alone():
    """Those of setfit, say, which hands its own to transformers' callbacks."""
    args, state = SimpleNamespace(output_dir="out"), SimpleNamespace(global_step=0, log_history=[])
    callback = PrecondCallback()
    for event in ("init_end", "train_begin", "step_begin", "optimizer_step", "log", "save",
                  "train_end"):  # fmt: skip
        getattr(callback, f"on_{event}")(args, state, None, model=None, optimizer=None, logs={})


def test_a_failure_that_a_child_has_told_is_not_told_again():
    error = subprocess.CalledProcessError(2, ["python", "train.py"])
    assert mistakes.explained(error) is None
    namespace = {"__name__": "accelerate.commands.launch", "error": error}
    with pytest.raises(subprocess.CalledProcessError) as caught:
        exec("raise error", namespace)
    assert mistakes.explained(caught.value) == ""


@pytest.mark.slow
def test_a_mistake_in_a_process_that_the_script_starts(tmp_path):
    words = ["-m", "hf_precond", "accelerate", "launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [sys.executable, *words, SCRIPT, "--optim", "afopt", "--optim_args", "damping=-1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("hf_precond: --optim_args: damping=-1.0")
