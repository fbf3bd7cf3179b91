"""The GPU suite in tiny sizes on the CPU, and its tables of what is counted."""

import importlib
import json
import sys

import pytest
import torch

from tests.examples.scripts import EXAMPLES


@pytest.fixture(scope="module")
def folder():
    sys.path.insert(0, str(EXAMPLES / "benchmarks"))
    yield
    sys.path.remove(str(EXAMPLES / "benchmarks"))


@pytest.fixture(scope="module")
def gpu(folder):
    return importlib.import_module("gpu")


@pytest.fixture(scope="module")
def gpu_tables(folder):
    return importlib.import_module("gpu_tables")


@pytest.mark.slow
def test_the_suite_runs_is_resumed_and_stops_at_its_limit(gpu, tmp_path, capsys):
    words = ["--out", str(tmp_path), "--device", "cpu", "--tiny"]
    assert gpu.main([*words, "--limit", "0"]) == 3
    assert "no time is left" in capsys.readouterr().out
    assert gpu.main([*words, "--limit", "500"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["about"]["torch"] == torch.__version__ and found["about"]["tiny"]
    assert found["correctness"]["passed"] and found["convergence"]["complete"]
    (rows,) = found["cost"].values()
    assert set(rows) == set(gpu.ARMS) and rows["adamw"]["ratio"] == 1.0
    for arm, row in rows.items():
        assert row["ms"] > 0 and row["state_mib"] > 0, arm
    assert (tmp_path / "convergence" / "loss.png").exists()
    capsys.readouterr()
    # Nothing but the bench is run again, and that finds all it needs.
    assert gpu.main([*words, "--limit", "500"]) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert "ms" not in capsys.readouterr().out


def test_results_of_another_card_are_not_mixed(gpu, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"about": {"card": "another"}}))
    with pytest.raises(SystemExit, match="another card"):
        gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "speed"], "--only speed"), (["--device", "cuda"], "no CUDA device")],
)
def test_mistakes_are_said(gpu, words, message, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), *words])
    assert message in capsys.readouterr().err


def test_a_card_is_known_by_its_name(gpu):
    for name, key in (("NVIDIA H100 80GB HBM3", "h100"), ("Tesla T4", "t4"), ("NVIDIA L40", None)):
        assert gpu._known_card(name) == key


@pytest.mark.slow
def test_the_tables_are_printed(gpu_tables, capsys):
    gpu_tables.main(["--models", "tiny", "--tokens", "64,256"])
    lines = capsys.readouterr().out.splitlines()
    for arm in gpu_tables.ARMS[2:]:
        assert sum(line.startswith(f"| {arm} |") for line in lines) == 2, arm
        assert sum(line.startswith(f"| tiny | {arm} |") for line in lines) == 1, arm
