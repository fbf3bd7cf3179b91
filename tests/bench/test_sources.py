"""The tokens of Python sources: their size, their licences, and that they come back as text."""

import importlib
from importlib import metadata

import pytest
import torch
from tokenizers import Tokenizer

from hf_precond.bench import sources


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A handful of files instead of an environment's."""
    library = importlib.import_module("json").__path__[0]
    email = importlib.import_module("email").__path__[0]
    found = [p for folder in (library, email) for p in sorted(sources.Path(folder).glob("*.py"))]
    monkeypatch.setattr(sources, "files", lambda: iter(found))
    monkeypatch.setattr(sources, "HELD_OUT", 5)
    return tmp_path


def test_tokens_are_of_two_bytes_within_the_budget_and_are_the_files(few):
    train, held = sources.tokens(few, 0.1)
    assert train.dtype == held.dtype == torch.uint16
    assert 0 < len(held) < len(train) and 2 * (len(train) + len(held)) <= 100_000
    folder = few / f"{sources.VOCABULARY}-0.1"
    assert (folder / "train.bin").stat().st_size == 2 * len(train)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = "".join(tokenizer.decode([i]) for i in train[1:40].tolist())
    texts = [path.read_text() for path in sources.files()]
    assert any(pieces in text for text in texts)
    assert int(train.long().max()) < sources.VOCABULARY and int(train[0]) == 0


def test_the_cache_is_read_again(few, monkeypatch):
    first, _ = sources.tokens(few, 0.1)
    monkeypatch.setattr(sources, "_make", None)
    again, _ = sources.tokens(few, 0.1)
    assert torch.equal(first.long(), again.long())


@pytest.mark.parametrize(
    ("header", "permissive"),
    [
        ("License-Expression: MIT", True),
        ("License-Expression: Apache-2.0 OR BSD-3-Clause", True),
        ("License: BSD License", True),
        ("Classifier: License :: OSI Approved :: MIT License", True),
        ("License-Expression: Apache-2.0 AND LGPL-2.1", False),
        ("License-Expression: MPL-2.0", False),
        ("License: NVIDIA Proprietary Software", False),
        ("License: see the file LIMITS", False),
        ("Summary: nothing said", False),
    ],
)
def test_permissive_is_what_the_metadata_says(tmp_path, header, permissive):
    folder = tmp_path / "thing-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: thing\n{header}\n\n")
    assert sources.is_permissive(metadata.PathDistribution(folder)) is permissive


@pytest.mark.slow
def test_the_standard_library_is_there_and_no_package_of_another_licence():
    found = list(sources.files())
    names = {path.name for path in found}
    assert "argparse.py" in names and len(found) > 500
    assert not [path for path in found if "tqdm" in path.parts]  # MPL beside MIT


@pytest.mark.slow
def test_the_model_reads_the_tokens(few, monkeypatch):
    from hf_precond.bench import tasks

    small = {"hidden": 64, "layers": 1, "rows": 2, "length": 16, "megabytes": 0.1}
    task = tasks.make("python_sources", 0, None, small | {"cache": str(few)})
    batch = task.batches(0)
    assert batch["input_ids"].shape == (2, 16)
    assert task.loss_of(batch).item() == pytest.approx(9.01, abs=0.3)
    assert task.evaluate(task.model)["loss"] == pytest.approx(9.01, abs=0.3)
