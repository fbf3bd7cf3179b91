"""The soak: what it calls wrong, and short runs that are killed and resumed."""

import importlib.util
import json
import sys

import pytest

from tests.examples.scripts import EXAMPLES, run_example


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", EXAMPLES / "benchmarks" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def runs_of(soak, **changes):
    """Three undisturbed runs and a disturbed one."""
    values = {"equal": True, "memory": [(0, 0, 500.0, 505.0)]}
    calm = [
        soak.Run("nkfac", seed, False, final_loss=loss, test_loss=loss + 0.1, **values)
        for seed, loss in enumerate((1.0, 1.1, 1.2))
    ]
    fields = {"final_loss": 1.2, "test_loss": 1.1, "kills": [310, 600]} | values | changes
    return [soak.Run("nkfac", 0, True, **fields), *calm]


def test_nothing_is_wrong_within_the_noise(soak):
    runs = runs_of(soak)
    assert soak.verdicts(runs) == []
    lines = soak.table(runs).splitlines()
    assert len(lines) == 6 and "310, 600" in lines[2] and "500 / 505" in lines[2]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"final_loss": 1.4}, "final_loss differs by +0.400 (noise 0.300)"),
        ({"test_loss": 0.7}, "test_loss differs by -0.400"),
        ({"final_loss": float("nan")}, "final_loss differs by +nan"),
        ({"equal": False}, "weights differ"),
        ({"memory": [(0, 0, 500.0, 505.0), (1, 300, 500.0, 560.0)]}, "memory grows by 12 %"),
    ],
)
def test_what_is_wrong_is_said(soak, changes, found):
    (line,) = soak.verdicts(runs_of(soak, **changes))
    assert line.startswith("nkfac-0-disturbed: ") and found in line


def test_kills_hit_every_rank_and_a_checkpoint_under_way(soak):
    kills = soak.targets(2000, 300, seed=0)
    assert [step // 300 for step, _, _ in kills] == [1, 2, 3, 4, 5, 6]
    assert kills[1] == (600, True, (0, 1))
    assert {ranks for _, _, ranks in kills} == {(0,), (1,), (0, 1)}


def test_memory_counts_from_the_warm_step_of_every_process(soak, tmp_path):
    lines = [[0, 0, 50, 100.0], [0, 0, 200, 300.0], [0, 0, 350, 310.0], [0, 300, 350, 290.0]]
    for rank in range(2):
        path = tmp_path / f"memory{rank}.jsonl"
        path.write_text("".join(json.dumps([rank, *line[1:]]) + "\n" for line in lines))
    assert soak.read_memory(tmp_path) == [(0, 0, 300.0, 310.0), (1, 0, 300.0, 310.0)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["afopt", "adamr", "muon", "nkfac", "sgdph"])
def test_a_killed_run_ends_as_if_nothing_had_happened(name, tmp_path):
    printed = run_example(
        "benchmarks/soak.py", "--optim", name, "--steps", "160", "--seeds", "0",
        "--kill-every", "105", "--bad-share", "0", "--folder", str(tmp_path / "soak"),
        folder=tmp_path,
    )  # fmt: skip
    assert "as it should be" in printed
    killed, whole = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert len(killed["kills"]) == 1 and not whole["kills"]
    assert killed["losses"] == whole["losses"] and killed["test_loss"] == whole["test_loss"]


@pytest.mark.slow
def test_bad_batches_are_skipped_through_kills(tmp_path):
    run_example(
        "benchmarks/soak.py", "--optim", "nkfac", "--steps", "200", "--seeds", "0", "1",
        "--kill-every", "110", "--bad-share", "0.02", "--folder", str(tmp_path / "soak"),
        folder=tmp_path,
    )  # fmt: skip
    disturbed, *_ = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert disturbed["skipped"] == 4 and len(disturbed["kills"]) == 1 and disturbed["equal"]
    assert (tmp_path / "soak" / "soak.png").stat().st_size > 5000
