"""A script that never mentions this package, through the launcher, alone and on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_precond.config.hub import CONFIG_FILE
from hf_precond.registry import list_optimizers

NAMES = list_optimizers()
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "train.py"
OFTEN = {
    "adamr": "basis_interval=5",
    "afopt": "stat_interval=2,inverse_interval=5",
    "muon": "variant=normuon",
    "nkfac": "base=adamw,stat_interval=2,inverse_interval=5",
    "sgdph": "base=adamw,probe_interval=5",
}
each_name = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.slow


def train(start, name, folder, *words):
    """Train through the launcher and return the losses of every step."""
    command = [
        *start, "-m", "hf_precond", SCRIPT, "--optim", name, "--optim_args", OFTEN[name],
        "--output_dir", folder, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
        "--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3",
        "--seed", "3", *words,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((folder / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


ONE = [sys.executable]
TWO = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
]  # fmt: skip
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip


@each_name
def test_a_script_that_never_mentions_the_package_trains(name, tmp_path):
    losses = train(ONE, name, tmp_path, "--max_steps", 30, "--learning_rate", "1e-2")
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["optimizer"] == name


# BERT's head takes num_items_in_batch and ignores it: by default the Trainer then trains twice its
# loss on two ranks, whatever the optimizer. AdamR trains the language model alone: the gradients of
# a small classifier are rank-deficient, the eigenvectors of their null space are arbitrary, and
# rounding (even in float64) then chooses among steps that differ; the loss is determined to 1e-3.
FAMILIES = [("llama", name) for name in NAMES] + [
    ("bert", name) for name in NAMES if name != "adamr"
]


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_two_ranks_train_like_one_at_the_same_global_batch(family, name, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    average = "true" if family == "llama" else "false"
    words = ["--max_steps", 50, "--family", family, "--average_tokens_across_devices", average]
    one = train(ONE, name, tmp_path / "one", *words, "--per_device_train_batch_size", 16)
    two = train(TWO, name, tmp_path / "two", *words, "--per_device_train_batch_size", 8)
    assert len(one) == len(two) == 50
    assert two == pytest.approx(one, rel=1e-4)


def test_accelerate_launch_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    losses = train(ACCELERATE, "afopt", tmp_path, "--max_steps", 4)
    assert len(losses) == 4
