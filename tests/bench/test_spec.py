"""The file: what is read, and what is refused in which words."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from hf_precond.bench.spec import Training, load, runs_of

TINY = str(Path(__file__).with_name("tiny.py"))
BASE = f"""
steps = 10
trials = 3
[tasks.mine]
function = "{TINY}:make"
[optimizers.adamw]
grid = {{lr = [1e-3, 1e-2]}}
[optimizers.afopt]
grid = {{lr = [1e-3, 1e-2], momentum = [0.8, 0.9]}}
"""


def read(tmp_path, text, name="compare.toml"):
    path = tmp_path / name
    path.write_text(text)
    return load(path)


def test_defaults_and_overrides(tmp_path):
    spec = read(tmp_path, BASE + "[optimizers.afopt.on.mine]\ngrid = {momentum = []}\n")
    assert (spec.seeds, spec.tuning_seeds, spec.trials) == ([1, 2, 3], [0], 3)
    assert spec.output == "outputs/compare"
    entries = spec.entries["mine"]
    assert list(entries["afopt"].grid) == ["lr"]  # an empty list: not tuned there
    assert spec.tasks["mine"].training == Training(steps=10)


def test_json_says_the_same(tmp_path):
    values = tomllib.loads(BASE)
    one, other = read(tmp_path, BASE), read(tmp_path, json.dumps(values), "compare.json")
    assert replace(one, text="") == replace(other, text="")


def test_a_shared_grid_holds_where_the_optimizer_has_the_field(tmp_path):
    text = BASE.replace("grid = {lr = [1e-3, 1e-2]}\n", "").replace(
        "steps = 10", "steps = 10\ngrid = {lr = [1, 2], momentum = [0.7]}"
    )
    entries = read(tmp_path, text).entries["mine"]
    assert entries["adamw"].grid == {"lr": [1.0, 2.0]}
    assert entries["afopt"].grid == {"lr": [1e-3, 1e-2], "momentum": [0.8, 0.9]}


def test_evaluation_is_denser_towards_the_end():
    steps = Training(steps=100).evaluated()
    assert steps == [20, 40, 60, 80, 85, 90, 95, 100]
    assert Training(steps=7, eval_every=3, late=0.0).evaluated() == [3, 6, 7]


def test_a_run_is_known_by_what_decides_its_outcome(tmp_path):
    spec = read(tmp_path, BASE)
    entry = spec.entries["mine"]["afopt"]
    settings = {"lr": 1e-3, "momentum": 0.8}
    one, other = runs_of(spec, entry, "mine", settings, [0, 1], False)
    assert one.key != other.key
    assert replace(one, label="another").key == one.key
    assert type(one).from_json(one.to_json()) == one
    longer = replace(one.task, training=replace(one.task.training, steps=11))
    assert replace(one, task=longer).key != one.key
    edited = tmp_path / "tiny.py"
    edited.write_text(Path(TINY).read_text())
    first = read(tmp_path, BASE.replace(TINY, "tiny.py")).tasks["mine"]
    edited.write_text(Path(TINY).read_text() + "\n")
    second = read(tmp_path, BASE.replace(TINY, "tiny.py")).tasks["mine"]
    assert first.function == second.function and first != second


REFUSED = {
    "seeds = [0, 1]": "seeds and tuning_seeds both have 0",
    "tuning_seeds = [3]": "seeds and tuning_seeds both have 3",
    "seeds = []": "seeds = []: it is a list of integers",
    "trials = 2": "trials = 2: the grids of afopt on mine alone have 3",
    "trials = 0": "an integer of at least 1",
    "step = 5": "did you mean 'steps'?",
    'schedule = "cosin"': "legal is cosine, linear, constant",
    "warmup = 2": "float in [0, 1]",
    'reference = "adam"': "there is no [optimizers.adam]",
}


@pytest.mark.parametrize("line", REFUSED)
def test_top_level_refusals(tmp_path, line):
    name = line.partition(" ")[0]
    text = re.sub(rf"^{name} = .*$", "", BASE, flags=re.MULTILINE)
    with pytest.raises(ValueError, match=re.escape(REFUSED[line])):
        read(tmp_path, line + "\n" + text)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[optimizers.afopt]", "[optimizers.afop]", "did you mean 'afopt'?"),
        ("momentum = [0.8, 0.9]", "momentun = [0.8]", "did you mean 'momentum'?"),
        ("momentum = [0.8, 0.9]", "momentum = [1.8]", "momentum=1.8"),
        ("momentum = [0.8, 0.9]", "momentum = 0.8", "it is a list of values"),
        ("grid = {lr = [1e-3, 1e-2]}\n", "", "[optimizers.adamw] has no grid on mine while"),
        (f"{TINY}:make", "nowhere.py:make", "there is no"),
        (f"{TINY}:make", "gtp", "did you mean 'gpt'?"),
        (f'function = "{TINY}:make"', 'script = "no.py"', "[tasks.mine] script: there is no"),
        ("[optimizers.afopt]", "[optimizers.afopt.on.other]", "other is no task of this file"),
    ],
)
def test_refusals_name_the_table_and_the_field(tmp_path, old, new, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        read(tmp_path, BASE.replace(old, new))
    assert "compare.toml" in str(refused.value)


def test_a_control_is_no_optimizer_of_a_script(tmp_path):
    (tmp_path / "train.py").write_text("")
    text = BASE.replace(f'function = "{TINY}:make"', 'script = "train.py"')
    read(tmp_path, text)
    with pytest.raises(ValueError, match="no --optim name"):
        read(tmp_path, text + "[optimizers.soap]\ngrid = {lr = [1e-3, 1e-2]}\n")
    given = "fields = {lr = 'auto'}\ngrid = {eps = [1e-8, 1e-6]}"
    with pytest.raises(ValueError, match="under adamw a Trainer takes 5e-5"):
        read(tmp_path, text.replace("grid = {lr = [1e-3, 1e-2]}", given))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(tmp_path / "none.toml")


def test_fields_are_tuned_in_the_order_of_rate_momentum_and_decay(tmp_path):
    grid = "{eps = [5], weight_decay = [0.1], beta1 = [0.9], lr = [1e-3, 1e-2]}"
    text = BASE.replace("grid = {lr = [1e-3, 1e-2]}", f"grid = {grid}")
    found = read(tmp_path, text.replace("[5]", "[1e-8]")).entries["mine"]["adamw"]
    assert list(found.grid) == ["lr", "beta1", "weight_decay", "eps"]


def test_the_shipped_comparison_tunes_alike():
    folder = Path(__file__).parents[2] / "examples" / "benchmarks"
    spec = load(folder / "compare.toml")
    assert list(spec.tasks) == ["gpt", "vit"]
    for entries in spec.entries.values():
        assert len(entries) == 10
        for entry in entries.values():
            momentum = "beta1" if "beta1" in entry.grid else "momentum"
            assert list(entry.grid) == ["lr", momentum, "weight_decay"]
            assert [len(values) for values in entry.grid.values()] == [3, 3, 2]
