"""Configs in folders and on the Hub (a server on the loopback interface)."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_precond import AdamRConfig, AFOptConfig, NKFACConfig, OptimizerConfig, SGDPHConfig
from hf_precond import load_config as load
from hf_precond.config.hub import CONFIG_FILE, version, write_whole
from tests.config.loopback import loopback_hub

ROOT = Path(__file__).parents[2]
CONFIGS = [
    AFOptConfig(lr=3e-4, scope="all_linear", betas=(0.8, 0.95), nesterov=False),
    AdamRConfig(state_dtype="bfloat16", basis="one_sided"),
    NKFACConfig(base="sgd", damping=0.3, newton_steps=2),
    SGDPHConfig(probe="exact", gamma=1e-3),
]
by_name = pytest.mark.parametrize("config", CONFIGS, ids=[c.name for c in CONFIGS])


@by_name
def test_a_folder_gives_back_the_config(config, tmp_path):
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path == str(tmp_path / "new" / "folder" / CONFIG_FILE)
    assert type(config).from_pretrained(tmp_path / "new/folder") == config
    assert load(path) == config and type(load(path)) is type(config)
    assert OptimizerConfig.from_pretrained(tmp_path / "new/folder") == config
    saved = json.loads(Path(path).read_text())
    assert saved["optimizer"] == config.name and saved["hf_precond_version"]


def test_fields_given_beside_replace_the_saved_ones(tmp_path):
    CONFIGS[0].save_pretrained(tmp_path)
    assert AFOptConfig.from_pretrained(tmp_path, lr=1.0) == CONFIGS[0].replace(lr=1.0)


def test_the_file_is_written_whole_with_the_usual_mode(tmp_path):
    config = CONFIGS[2]
    config.save_pretrained(tmp_path)
    (tmp_path / "plain").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CONFIG_FILE, "plain")]
    assert modes[0] == modes[1]
    before = (tmp_path / CONFIG_FILE).read_text()

    class Broken(NKFACConfig):
        def to_json(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Broken().save_pretrained(tmp_path)
    assert (tmp_path / CONFIG_FILE).read_text() == before
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, "plain"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_file_that_is_there_stays_until_the_new_one_is_whole(fails, tmp_path, monkeypatch):
    card = tmp_path / "README.md"
    write_whole(card, "old")

    def breaks(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, fails, breaks)
    with pytest.raises(OSError, match="no space"):
        write_whole(card, "new")
    assert card.read_text() == "old" and os.listdir(tmp_path) == ["README.md"]
    monkeypatch.undo()
    write_whole(card, "new")
    assert card.read_text() == "new"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"optimizer": "afopt", "dampin": 1.0}', "did you mean 'damping'"),
        ('{"optimizer": "afopt", "damping": -1}', r"damping=-1.*\(0, infinity\)"),
        ('{"optimizer": "afopt", "damping": "os.system(1)"}', "damping='os.system"),
        ('{"optimizer": "afopt", "__class__": "os.system"}', "__class__: afopt has no such field"),
        ('{"optimizer": "afopt", "damping": NaN}', "NaN is not a number"),
        ('{"optimizer": "nkfac", "damping": 1.0}', "use the config class of that optimizer"),
        ('["afopt"]', "holds a JSON list"),
        ("import os", "not a JSON file"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(text, message, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        AFOptConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["lion", None, ["afopt"]])
def test_a_file_of_no_known_optimizer_is_refused(name, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"optimizer": name, "lr": 1.0}))
    message = f"optimizer={name!r}: hf_precond knows adamr, afopt, muon, nkfac, sgdph"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path)


def test_a_refused_file_of_another_release_says_so(tmp_path):
    values = {"optimizer": "afopt", "new": 1, "hf_precond_version": "9.0"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"new: afopt has no.*written by hf_precond 9\.0, "):
        load(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values | {"hf_precond_version": version()}))
    with pytest.raises(ValueError, match="new: afopt has no") as refusal:
        load(tmp_path)
    assert "written by" not in str(refusal.value)


def test_a_missing_file_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"holds no {CONFIG_FILE}"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder, and it is no repository id"):
        load(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        load("nobody/nothing")


@pytest.fixture(scope="module")
def hub():
    with loopback_hub() as server:
        yield server


def client(code, hub, folder):
    """Run code in a process whose Hub is ``hub``."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_dummy",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "hf_home"),
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_hub_gives_back_the_config_and_refuses_with_sentences(hub, tmp_path):
    code = """
import hf_precond, pytest
from hf_precond import AFOptConfig, NKFACConfig, load_config
config = AFOptConfig(lr=2e-4, betas=(0.8, 0.9))
print(config.push_to_hub("tester/tuned"))
config.replace(lr=5e-4).push_to_hub("short-name")
assert AFOptConfig.from_pretrained("tester/tuned") == config == load_config("tester/tuned")
assert load_config("tester/short-name", damping=2.0) == config.replace(lr=5e-4, damping=2.0)
with pytest.raises(ValueError, match="this config is for 'afopt'"):
    NKFACConfig.from_pretrained("tester/tuned")
from huggingface_hub import HfApi
HfApi().create_repo("tester/empty")
with pytest.raises(FileNotFoundError, match="holds no optimizer_config.json"):
    load_config("tester/empty")
with pytest.raises(FileNotFoundError, match="no such repository"):
    load_config("tester/absent")
"""
    done = client(code, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.url}/tester/tuned/commit/")
    assert json.loads(hub.repos["tester/tuned"][CONFIG_FILE])["lr"] == 2e-4


@pytest.mark.parametrize("trainer", ["Trainer", "PrecondTrainer"])
def test_trainer_push_carries_config_and_card(hub, tmp_path, trainer):
    code = f"""
import hf_precond
from transformers import Trainer, TrainingArguments
from hf_precond import AFOptConfig, PrecondTrainer
from tests.integrations.tiny import bert, text_data
AFOptConfig(damping=0.5).push_to_hub("tester/settings")
args = TrainingArguments("out", optim="afopt", max_steps=2, report_to=[], learning_rate=3e-4,
    optim_args="config=tester/settings,stat_interval=1,lr=2e-3", use_cpu=True,
    hub_model_id="tester/{trainer}", save_strategy="no", disable_tqdm=True)
trainer = {trainer}(bert(), args, train_dataset=text_data())
trainer.train()
trainer.push_to_hub()
"""
    done = client(code, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--learning_rate 0.0003 is not used: --optim_args sets lr=0.002" in done.stderr
    repo = hub.repos[f"tester/{trainer}"]
    config = json.loads(repo[CONFIG_FILE])
    assert (config["damping"], config["lr"], config["stat_interval"]) == (0.5, 2e-3, 1)
    card = repo["README.md"].decode()
    assert "OptimizerNames" not in card
    assert "- learning_rate: 0.002" in card
    assert "- optimizer: AFOpt (hf_precond, --optim afopt) with" in card
    assert ("### Optimizer" in card) == (trainer == "PrecondTrainer")
    assert ("--optim_args config=tester/PrecondTrainer`" in card) == (trainer == "PrecondTrainer")
