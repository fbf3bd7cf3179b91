"""Processes that a launched script starts know the names, and are otherwise left as they were."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STARTUP = ROOT / "hf_precond" / "cli" / "startup"


def run(words, folder, **environment):
    """A Python process; ``transformers`` is a package of one line."""
    fake = folder / "fake" / "transformers"
    fake.mkdir(parents=True, exist_ok=True)
    (fake / "__init__.py").write_text("__version__ = '5.23.0'\n")
    paths = [environment.pop("first", ""), str(folder / "fake"), environment.pop("last", "")]
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


ASK = (
    "import sys; early = 'hf_precond' in sys.modules; import transformers; "
    "print(early, 'hf_precond' in sys.modules, any('startup' in p for p in sys.path))"
)


@pytest.mark.parametrize(("switch", "registered"), [("1", True), ("0", False), ("", False)])
def test_a_child_registers_when_it_imports_transformers(switch, registered, tmp_path):
    shown, _ = run(["-c", ASK], tmp_path, first=str(STARTUP), last=str(ROOT), HF_PRECOND=switch)
    assert shown == f"False {registered} False\n"


def test_a_checkout_that_is_not_on_the_childs_path_is_found(tmp_path):
    shown, _ = run(["-c", ASK], tmp_path, first=str(STARTUP), HF_PRECOND="1")
    assert shown == "False True False\n"


def test_the_sitecustomize_that_stood_there_runs_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("VALUE = 7")
    words = ["-c", "import sitecustomize; print(sitecustomize.VALUE)"]
    shown, _ = run(words, tmp_path, first=str(STARTUP), last=str(tmp_path), HF_PRECOND="1")
    assert shown == "7\n"


def test_a_child_that_cannot_register_says_so_and_goes_on(tmp_path):
    (tmp_path / "wrapt.py").write_text("raise RuntimeError('a broken environment')")
    words = ["-c", "import transformers; print('went on')"]
    shown, said = run(words, tmp_path, first=str(STARTUP), last=str(tmp_path), HF_PRECOND="1")
    assert shown == "went on\n" and "a broken environment" in said and said.count("\n") == 1


def test_the_launcher_hands_it_to_children_of_children(tmp_path):
    (tmp_path / "ask.py").write_text(ASK)
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\n"
        "code = 'import subprocess, sys; subprocess.run([sys.executable, \"ask.py\"])'\n"
        "subprocess.run([sys.executable, '-c', code], check=True)\n"
    )
    shown, _ = run(["-m", "hf_precond", "parent.py"], tmp_path, last=str(ROOT))
    assert shown == "False True False\n"


def test_a_child_that_never_imports_transformers_imports_nothing(tmp_path):
    words = ["-c", "import sys; print('wrapt' in sys.modules, 'hf_precond' in sys.modules)"]
    shown, _ = run(words, tmp_path, first=str(STARTUP), last=str(ROOT), HF_PRECOND="1")
    assert shown == "False False\n"
