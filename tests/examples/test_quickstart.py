"""The quickstart: its table, and all its optimizers for a few steps."""

import importlib.util
import json
import sys

import pytest

from tests.examples.scripts import EXAMPLES, run_example


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def make_run(quickstart, **fields):
    values = {
        "arm": "afopt_attention", "optim": "afopt", "optim_args": "", "learning_rate": 1e-3,
        "seed": 0, "losses": [2.0, 1.0], "train_loss": 1.0, "test_loss": 1.5,
        "test_accuracy": 0.5, "seconds_per_step": 0.1,
    }  # fmt: skip
    return quickstart.Run(**(values | fields))


def test_table_averages_over_seeds_and_fits_eighty_columns(quickstart):
    runs = [
        make_run(quickstart, seed=0, test_accuracy=0.80, test_loss=0.5),
        make_run(quickstart, seed=1, test_accuracy=0.84, test_loss=0.7),
        make_run(quickstart, learning_rate=2e-3, test_accuracy=1.0),
    ]
    lines = quickstart.table(runs).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == [
        "afopt_attention", "1.0e-03", "1.000", "0.600", "82.0", "±", "2.8", "0.100",
    ]  # fmt: skip
    assert lines[3].split() == ["afopt_attention", "2.0e-03", "1.000", "1.500", "100.0", "0.100"]
    assert len({len(line) for line in lines[2:]}) == 1


def test_plot_writes_a_png(quickstart, tmp_path):
    runs = [make_run(quickstart), make_run(quickstart, learning_rate=3e-3, losses=[2.0, 1.5])]
    quickstart.plot(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seeds", "0"], ["--optim", "adamm"]])
def test_bad_options_are_refused(quickstart, arguments):
    with pytest.raises(SystemExit):
        quickstart.parse(arguments)


def test_all_optimizers_train_and_differ(tmp_path):
    output = tmp_path / "results"
    printed = run_example("quickstart.py", "--steps", "5", "--output", str(output), folder=tmp_path)
    results = json.loads((output / "results.json").read_text())
    names = [run["arm"] for run in results]
    assert names == ["adamw", "afopt", "afopt_attention", "muon", "adamr", "nkfac", "sgdph"]
    assert all(name in printed for name in names)
    assert (output / "loss_curves.png").stat().st_size > 0
    # Same initial weights and batches: the first losses agree, the last ones do not.
    assert len({round(run["losses"][0], 4) for run in results}) == 1
    assert len({run["losses"][-1] for run in results}) == len(results)
    for run in results:
        assert len(run["losses"]) == 5
        assert run["losses"][-1] < run["losses"][0]


@pytest.mark.slow
def test_the_notebooks_cells_run(tmp_path):
    """Its code cells one after the other, in its folder, with three steps; no Jupyter is needed."""
    book = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    script = "\n".join(cells)
    assert script.count("STEPS = 12") == 1
    path = tmp_path / "notebook.py"
    setup = f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n"
    path.write_text(setup + script.replace("STEPS = 12", "STEPS = 3"))
    printed = run_example(str(path), folder=tmp_path)
    assert "adamw_torch_fused  test loss" in printed and "afopt              test loss" in printed


def test_the_notebook_keeps_the_outputs_of_one_run():
    book = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds == {"stream", "display_data", "execute_result"}
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 60_000
