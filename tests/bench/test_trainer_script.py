"""A Trainer's script as a task: its command line, its log, and one that runs."""

import json

import pytest

from hf_precond.bench.spec import Run, TaskSpec, Training
from hf_precond.bench.trainer_script import command, result
from hf_precond.cli.main import main


def options(run):
    words = command(run, "folder")
    start = words.index("script.py")
    named = {}
    for word, following in zip(words[start + 1 :], [*words[start + 2 :], ""], strict=True):
        if word.startswith("--"):
            named.setdefault(word, []).append(following)
    return words, named


def run(optimizer, fields, args=(), course=False):
    training = Training(steps=40, eval_every=10)
    task = TaskSpec("mine", None, "script.py", list(args), None, "", training)
    return Run(task, optimizer, optimizer, fields, 5, course)


def test_fields_become_the_trainers_arguments_or_optim_args():
    fields = {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95], "beta1": 0.8, "momentum": 0.7}
    fields |= {"scope": "attention"}
    words, named = options(run("afopt", fields, ["--do_train", "--max_steps", "7"], course=True))
    assert words[1:4] == ["-m", "hf_precond", "script.py"]
    assert named["--optim"] == ["afopt"] and named["--learning_rate"] == ["0.001"]
    assert named["--optim_args"] == ["momentum=0.7,scope=attention"]
    assert (named["--adam_beta1"], named["--adam_beta2"]) == (["0.8"], ["0.95"])
    assert named["--seed"] == ["5"] and named["--output_dir"] == ["folder"]
    assert named["--max_steps"] == ["7"]  # as the file has it
    assert named["--eval_steps"] == ["10"] and named["--eval_strategy"] == ["steps"]


def test_a_rate_that_is_left_to_the_trainer_is_no_argument():
    words = command(run("afopt", {"lr": "auto", "weight_decay": 0.1}), "out")
    assert "--learning_rate" not in words and words[words.index("--weight_decay") + 1] == "0.1"


def test_adamw_is_torchs_fused_one_and_trials_evaluate_at_the_end():
    _, named = options(run("adamw", {"lr": 1e-3}))
    assert named["--optim"] == ["adamw_torch_fused"] and "--optim_args" not in named
    assert named["--eval_steps"] == ["40"]


def test_what_a_trainer_logged():
    history = [
        {"step": 10, "loss": 2.0, "learning_rate": 1e-3},
        {"step": 20, "eval_loss": 1.5, "eval_accuracy": 0.5, "eval_runtime": 9.0},
        {"step": 20, "loss": 1.0},
        {"step": 40, "eval_loss": 1.25, "eval_accuracy": 0.75, "eval_samples_per_second": 3.0},
        {"step": 40, "train_runtime": 1.0, "train_loss": 1.5},
    ]
    found = result({"log_history": history, "global_step": 40})
    assert found["final"] == {"loss": 1.25, "accuracy": 0.75} and found["steps"] == 40
    assert [(e["step"], e["loss"]) for e in found["evaluations"]] == [(20, 1.5), (40, 1.25)]
    assert found["losses"] == [2.0, 1.0] and not found["diverged"]
    with pytest.raises(RuntimeError, match="no eval_loss"):
        result({"log_history": history[:1], "global_step": 40})


TRAINING = """
import torch
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
    def forward(self, x, labels):
        logits = self.norm(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(args.seed)
rows = [{"x": torch.randn(4), "labels": i % 3} for i in range(24)]
trainer = Trainer(Net(), args, train_dataset=rows, eval_dataset=rows)
trainer.train()
"""


@pytest.mark.slow
def test_a_script_is_compared(tmp_path, capsys):
    (tmp_path / "train.py").write_text(TRAINING)
    file = tmp_path / "compare.toml"
    file.write_text(
        'steps = 4\nseeds = [1]\neval_every = 2\n[tasks.mine]\nscript = "train.py"\n'
        'args = ["--use_cpu", "True"]\n'
        "[optimizers.adamw]\nfields = {lr = 1e-2}\n"
        "[optimizers.nkfac]\nfields = {lr = 1e-3, damping = 0.1}\n"
    )
    words = ["bench", str(file), "--output", str(tmp_path / "out"), "--no-plot", "--quiet"]
    assert main(words) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["mine"]
    for row in found.values():
        assert row["mean"] > 0 and not row["trials"]
        assert [e["step"] for e in row["seeds"]["1"]["evaluations"]] == [2, 4]
    assert "script included" in (tmp_path / "out/cost.txt").read_text()


@pytest.mark.slow
def test_a_script_that_fails_says_why(tmp_path, capsys):
    (tmp_path / "train.py").write_text("raise SystemExit('out of luck')\n")
    file = tmp_path / "compare.toml"
    file.write_text('seeds = [1]\n[tasks.mine]\nscript = "train.py"\n[optimizers.adamw]\n')
    words = ["bench", str(file), "--output", str(tmp_path / "out"), "--no-plot", "--quiet"]
    assert main(words) == 1
    assert "out of luck" in capsys.readouterr().err
