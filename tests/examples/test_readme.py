"""The README: its two commands, its tables, and the settings that the quickstart runs with."""

import re
import tomllib

import pytest

from tests.examples.scripts import ROOT

README = (ROOT / "README.md").read_text()


def blocks(text):
    return re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)


def test_two_commands_come_first():
    first = blocks(README.split("\n## ")[0])
    assert len(first) == 2
    for command, ending in zip(first, ("examples/quickstart.py", "-m pytest -n 2"), strict=True):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.")
        assert command.strip().endswith(ending)


def test_ci_finds_the_test_command():
    pattern = re.search(r"grep -E '(.*)' README.md", (ROOT / ".ci" / "run").read_text()).group(1)
    found = [line for line in README.splitlines() if re.search(pattern, line)]
    assert found == [blocks(README)[1].strip()]


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_constraints_pin_versions_and_name_no_host():
    assert pins("constraints.txt").keys() >= {"torch", "transformers", "accelerate", "peft"}


def test_the_lowest_constraints_are_the_lowest_that_are_admitted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pattern = re.compile(r"([\w-]+)>=([\d.]+)")
    floors = dict(pattern.match(item).groups() for item in project["dependencies"])
    del floors["torch"]  # a lower one than 2.13 has not been tested
    lowest = pins("constraints-min.txt")
    for name, floor in floors.items():
        assert re.fullmatch(rf"{re.escape(floor)}(\.0)*", lowest[name]), name


def test_tables_fit_eighty_columns():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert rows and max(map(len, rows)) <= 80


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:examples|\.ci)/[\w./]*)`", README))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()
