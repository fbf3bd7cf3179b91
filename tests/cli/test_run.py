"""The launcher runs a script as Python itself would, with the names registered."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_precond.cli.main import main

ROOT = str(Path(__file__).parents[2])


def python(*words, folder, module=True):
    """Run ``python [-m hf_precond] words`` in ``folder``."""
    start = [sys.executable, "-m", "hf_precond"] if module else [sys.executable]
    return subprocess.run(
        [*start, *map(str, words)],
        cwd=folder,
        env={"PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def both(script, *words, folder):
    """The same script through Python and through the launcher."""
    return [python(script, *words, folder=folder, module=module) for module in (False, True)]


def write(folder, text, name="script.py"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_script_sees_what_it_sees_under_python(tmp_path):
    write(tmp_path, "VALUE = 'beside the script'\n", "scripts/beside.py")
    write(tmp_path, "VALUE = 'in the working directory'\n", "beside.py")
    script = write(
        tmp_path,
        "import json, sys, beside\n"
        "print(json.dumps([sys.argv[1:], __name__, __file__, sys.path[0], beside.VALUE,\n"
        "    __spec__ is None, __package__, sys.modules['__main__'].__dict__ is globals()]))\n",
        "scripts/script.py",
    )
    plain, launched = both(script, "--lr", "1e-3", "-m", "run", folder=tmp_path)
    assert launched.returncode == plain.returncode == 0, launched.stderr
    seen, expected = json.loads(launched.stdout), json.loads(plain.stdout)
    expected[6] = expected[6] or ""
    assert seen == expected
    assert seen[0] == ["--lr", "1e-3", "-m", "run"]
    assert seen[4] == "beside the script"


@pytest.mark.parametrize("name", ["package.script", "package"])
def test_a_module_sees_what_it_sees_under_python(name, tmp_path):
    text = (
        "import json, sys\n"
        "from package import VALUE\n"
        "print(json.dumps([sys.argv, __name__, __file__, sys.path[0], VALUE, __spec__.name,\n"
        "    __package__, sys.modules['__main__'].__dict__ is globals()]))\n"
    )
    write(tmp_path, "VALUE = 7", "package/__init__.py")
    write(tmp_path, text, "package/script.py")
    write(tmp_path, text, "package/__main__.py")
    words = ["-m", name, "--lr", "1e-3", "-m", "run"]
    plain, launched = both(*words, folder=tmp_path)
    assert launched.returncode == plain.returncode == 0, launched.stderr
    assert json.loads(launched.stdout) == json.loads(plain.stdout)
    write(tmp_path, "def f():\n    1 / 0\nf()", "package/script.py")
    plain, launched = both("-m", "package.script", folder=tmp_path)
    assert launched.returncode == plain.returncode == 1
    own = plain.stderr.index('  File "' + str(tmp_path))
    assert launched.stderr.endswith(plain.stderr[own:]) and "hf_precond" not in launched.stderr


def test_a_program_on_the_path_runs(tmp_path, capsys, monkeypatch):
    program = write(tmp_path, f"#!{sys.executable}\nimport sys\nprint('ran', sys.argv)", "train-it")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", ["hf-precond"])
    monkeypatch.setattr(sys, "path", ["bin", *sys.path])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HF_PRECOND", "0")
    monkeypatch.chdir("/")
    assert main(["run", "train-it", "sft", "--optim", "afopt"]) == 0
    assert capsys.readouterr().out == f"ran ['{program}', 'sft', '--optim', 'afopt']\n"


def test_a_script_that_loads_no_torch_gets_none(tmp_path):
    code = "import sys\nprint('torch' in sys.modules, 'hf_precond' in sys.modules)"
    script = write(tmp_path, code)
    assert python(script, folder=tmp_path).stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "raise SystemExit(0)",
        "raise SystemExit(7)",
        "raise SystemExit('a message of the script')",
        "import os; os._exit(5)",
        "raise ValueError('deep inside')",
        "raise KeyboardInterrupt",
        "try:\n    {}['missing']\nexcept KeyError as e:\n    raise RuntimeError('because') from e",
        "def f(n):\n    return f(n - 1) if n else 1 / n\nf(40)",
        "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])",
        "def broken(:\n    pass",
        "import json\njson.loads('{')",
        "import sys\nsys.excepthook = lambda kind, e, tb: print(kind, tb.tb_lineno)\n1 / 0",
    ],
)
def test_exit_code_output_and_traceback_are_the_scripts_own(tmp_path, ending):
    script = write(tmp_path, f"print('starts')\n{ending}\n")
    plain, launched = both(script, folder=tmp_path)
    assert launched.returncode == plain.returncode
    assert launched.stdout == plain.stdout
    assert launched.stderr == plain.stderr


def test_a_folder_with_a_main_runs(tmp_path):
    write(tmp_path, "import sys\nprint('ran', sys.argv[1:])", "app/__main__.py")
    launched = python(tmp_path / "app", "--x", folder=tmp_path)
    assert launched.stdout == "ran ['--x']\n"
    assert launched.returncode == 0, launched.stderr


@pytest.mark.parametrize(
    "words", [["nowhere.py", "--optim", "afopt"], ["run", "nowhere.py"], ["."]]
)
def test_a_missing_script_is_one_sentence_and_exit_code_2(tmp_path, words):
    launched = python(*words, folder=tmp_path)
    assert launched.returncode == 2
    assert launched.stdout == ""
    assert launched.stderr.startswith("hf_precond: ") and launched.stderr.count("\n") == 1
    assert words[-1] in launched.stderr or "nowhere.py" in launched.stderr


def test_without_a_script_the_usage_is_shown(tmp_path):
    launched = python(folder=tmp_path)
    assert launched.returncode == 2
    assert "SCRIPT.py" in launched.stdout


def test_the_console_script_passes_the_scripts_options_through(tmp_path, capsys, monkeypatch):
    script = write(tmp_path, "import sys\nprint(sys.argv[1:])")
    monkeypatch.setattr(sys, "argv", ["hf-precond"])
    monkeypatch.setattr(sys, "path", ["bin", *sys.path])
    assert main(["run", str(script), "--help", "--optim", "afopt"]) == 0
    assert capsys.readouterr().out == "['--help', '--optim', 'afopt']\n"
    assert sys.path[0] == str(tmp_path) and "bin" not in sys.path


def test_unsupported_transformers_is_refused_before_the_script_runs(tmp_path, capsys, monkeypatch):
    internals = "hf_precond.compat.transformers_internals"
    monkeypatch.setattr(f"{internals}.transformers_version", lambda: "4.57.1")
    script = write(tmp_path, "print('ran')")
    assert main(["run", str(script)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "transformers>=5.4,<6" in shown.err and "4.57.1" in shown.err


SPAWN = """
import multiprocessing as mp
import sys
from transformers.training_args import OptimizerNames

def work(name, queue):
    queue.put((type(name).__name__, name.value, __name__))

if __name__ == "__main__":
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(OptimizerNames("afopt"), queue))
    process.start()
    print(queue.get(timeout=200))
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.slow
def test_spawned_processes_know_the_names(tmp_path):
    script = write(tmp_path, SPAWN)
    launched = python(script, folder=tmp_path)
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout == "('OptimizerNames', 'afopt', '__mp_main__')\n"


def test_a_process_group_that_a_script_leaves_open_is_ended(tmp_path):
    script = write(
        tmp_path,
        "import atexit\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo', init_method='file://' + __file__ + '.store', rank=0,\n"
        "    world_size=1)\n"
        "atexit.register(lambda: print(dist.is_initialized()))\n",
    )
    plain, launched = both(script, folder=tmp_path)
    assert (plain.stdout, launched.stdout) == ("True\n", "False\n"), launched.stderr
