"""Whole comparisons of a tiny task: by the command, killed and started again, on two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_precond.bench import results
from hf_precond.cli.main import main

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.py")
FILE = """
steps = 10
trials = 4
seeds = [1, 2]
reference = "adamw"
eval_every = 4
eval_every_late = 1
[tasks.mine]
function = "tiny.py:make"
[optimizers.adamw]
grid = {lr = [1e-3, 1e-2]}
[optimizers.newton_muon]
grid = {lr = [1e-2, 3e-2], momentum = [0.8, 0.9]}
fields = {momentum = 0.9, inverse_interval = 3}
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY.read_text())
    path = tmp_path / "compare.toml"
    path.write_text(FILE)
    return path


def bench(file, folder, *words):
    return main(["bench", str(file), "--output", str(folder), "--no-plot", "--quiet", *words])


def test_one_command_tunes_reports_and_writes(file, tmp_path, capsys):
    assert bench(file, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["table"].strip() == text.strip()
    assert (tmp_path / "out/table.txt").read_text() == text
    cost = (tmp_path / "out/cost.txt").read_text()
    assert "newton_muon" in cost and max(map(len, cost.splitlines())) <= 80
    for label, row in found["tasks"]["mine"].items():
        assert len(row["trials"]) == 4, label
        assert set(row["seeds"]) == {"1", "2"} and row["mean"] > 0
        steps = [e["step"] for e in row["seeds"]["1"]["evaluations"]]
        assert steps == [4, 8, 9, 10]
        best = min(row["trials"], key=lambda trial: trial["loss"])
        assert row["tuned"] == best["settings"]
        assert row["seeds"]["1"]["processor_seconds"] > 0
    (machine,) = found["machines"]
    assert machine["hardware"]["processor"] and machine["versions"]["torch"]
    assert found["file"] == FILE
    first = found["tasks"]["mine"]["adamw"]["seeds"]["1"]["losses"]
    assert len(first) == 10 and first != found["tasks"]["mine"]["adamw"]["seeds"]["2"]["losses"]


def test_stopped_anywhere_it_ends_with_the_same_table(file, tmp_path, capsys, monkeypatch):
    assert bench(file, tmp_path / "whole") == 0
    expected = capsys.readouterr().out
    perform, count = results.perform, 0

    def interrupted(run, path, progress):
        nonlocal count
        count += 1
        if count % 3 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".draft").write_text('{"half')
            raise KeyboardInterrupt
        perform(run, path, progress)

    monkeypatch.setattr(results, "perform", interrupted)
    codes, said = [], []
    for _ in range(7):
        codes.append(bench(file, tmp_path / "parts"))
        said.append(capsys.readouterr())
    assert codes[0] == 130 and codes[-1] == 0 and "goes on from" in said[0].err
    assert said[-1].out == expected
    done = count
    assert bench(file, tmp_path / "parts") == 0 and count == done  # nothing is run twice


def test_a_half_written_result_is_run_again(file, tmp_path, capsys):
    assert bench(file, tmp_path / "out") == 0
    expected = capsys.readouterr().out
    paths = sorted((tmp_path / "out/runs").rglob("*.json"))
    paths[0].write_text(paths[0].read_text()[:50])
    paths[1].unlink()
    assert bench(file, tmp_path / "out") == 0
    assert capsys.readouterr().out == expected


def test_a_failing_task_fails_its_rows_alone(file, tmp_path, capsys):
    text = FILE + '[tasks.bad]\nfunction = "tiny.py:make"\nargs = {fail = 3}\n'
    file.write_text(text.replace("[tasks.mine]", "[tasks.mine]", 1))
    assert bench(file, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "ArithmeticError" in (tmp_path / "out/logs/failed.log").read_text()
    assert "no batch 3" in said.err and said.out.count("failed") == 2
    assert "mine" in said.out and "not done" not in said.out


def test_what_cannot_be_used_is_refused(file, tmp_path, capsys, monkeypatch):
    assert bench(file, tmp_path, "--jobs", "0") == 2
    file.write_text("steps = 10")
    assert bench(file, tmp_path) == 2
    assert "there is no [tasks.NAME]" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file.write_text(FILE)
    assert main(["bench", str(file), "--output", str(tmp_path)]) == 2
    assert "needs matplotlib" in capsys.readouterr().err


def test_a_partial_table_is_printed_without_running(file, tmp_path, capsys):
    assert bench(file, tmp_path / "out", "--table") == 0
    assert capsys.readouterr().out.count("not done") == 2


def command(file, folder):
    code = "from hf_precond.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "bench", str(file), "--output", str(folder)]
    return [*words, "--jobs", "2", "--no-plot"]


@pytest.mark.slow
def test_two_processes_killed_and_started_again(file, tmp_path, capsys):
    assert bench(file, tmp_path / "whole") == 0
    expected = capsys.readouterr().out
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(file, folder), env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(folder.rglob("runs/**/*.json"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(folder.rglob("runs/**/*.json"))) < 12
    done = subprocess.run(command(file, folder), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


@pytest.mark.slow
def test_the_picture_is_drawn(file, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["bench", str(file), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 0
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
