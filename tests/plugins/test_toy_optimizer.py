"""An optimizer of another package: found by its entry point, used like the built-in ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.install import install

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "cli" / "scripts" / "train.py"


@pytest.fixture
def python(tmp_path):
    """Runs Python where the package is installed; returns what was printed."""
    (tmp_path / "site").mkdir()
    site = install("toy_optimizer", tmp_path / "site")

    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def test_the_launcher_trains_with_it(python, tmp_path):
    words = [
        *("--optim", "toy", "--optim_args", "size=0.5", "--learning_rate", "1e-2"),
        *("--output_dir", tmp_path, "--max_steps", 30, "--logging_steps", 1, "--use_cpu"),
        *("--report_to", "none", "--disable_tqdm", "true", "--seed", 3),
    ]
    python("-m", "hf_precond", SCRIPT, *words)
    history = json.loads((tmp_path / "log_history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    config = json.loads((tmp_path / "optimizer_config.json").read_text())
    assert (config["optimizer"], config["size"], config["lr"]) == ("toy", 0.5, 1e-2)


def test_its_name_is_listed_without_importing_it_or_torch(python):
    code = "import sys, hf_precond; print(*hf_precond.list_optimizers()); "
    code += "print({'torch', 'transformers', 'toy_optimizer'} & set(sys.modules))"
    assert python("-c", code) == "adamr afopt muon nkfac sgdph toy\nset()\n"
    assert "--optim adamr, afopt, muon, nkfac, sgdph, toy" in python("-m", "hf_precond", "--help")


def test_commands_arguments_and_saved_configs_know_it(python, tmp_path):
    shown = python("-m", "hf_precond", "list")
    assert "toy      the sign of the gradient of linear layers\n" in shown
    code = f"""
from hf_precond import create_optimizer, load_config, register
from hf_precond.integrations.model_card import section, summary
from torch import nn, ones
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

assert TrainingArguments("out", optim="toy", use_cpu=True).optim is OptimizerNames.TOY
layer = nn.Linear(2, 2, bias=False)
nn.init.ones_(layer.weight)
optimizer = create_optimizer(layer, "toy", lr=0.25)
(-layer(ones(1, 2)).sum()).backward()
optimizer.step()
assert (layer.weight == 1.25).all() and not optimizer.state
optimizer.config.save_pretrained({str(tmp_path)!r})
assert load_config({str(tmp_path)!r}) == optimizer.config
print(summary(optimizer.config))
print(section(optimizer.config, optimizer))
"""
    shown = python("-c", code)
    assert shown.startswith("Sign descent (toy_optimizer, --optim toy) with lr=0.25\n")
    assert "Sign descent of `toy_optimizer`. The file" in shown and "| size | 1.0 |" in shown
