"""The shipped data: what its README says, and small."""

import collections
import json

import pyarrow.parquet as pq
import pytest

from tests.examples.scripts import EXAMPLES

DATA = EXAMPLES / "data"


@pytest.mark.parametrize(("split", "per_class"), [("train", 600), ("test", 200)])
def test_fashion_mnist_is_balanced_png(split, per_class):
    table = pq.read_table(DATA / "fashion_mnist" / f"{split}-00000-of-00001.parquet")
    counts = collections.Counter(table["label"].to_pylist())
    assert counts == dict.fromkeys(range(10), per_class)
    assert all(
        image["bytes"].startswith(b"\x89PNG") and image["path"] is None
        for image in table["image"].to_pylist()
    )


@pytest.mark.parametrize(("split", "per_class"), [("train", 20), ("test", 10)])
def test_banking77_has_all_intents(split, per_class):
    lines = (DATA / "banking77" / f"{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    counts = collections.Counter(row["label"] for row in rows)
    assert len(counts) == 77 and set(counts.values()) == {per_class}
    assert all(set(row) == {"text", "label"} and row["text"].strip() for row in rows)


def test_no_text_in_both_splits():
    texts = [
        {json.loads(line)["text"] for line in (DATA / "banking77" / name).read_text().splitlines()}
        for name in ("train.jsonl", "test.jsonl")
    ]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(("split", "rows"), [("train", 1000), ("test", 400)])
def test_wnut17_has_a_tag_for_each_word_and_all_types(split, rows):
    lines = (DATA / "wnut17" / f"{split}.jsonl").read_text().splitlines()
    assert len(lines) == rows
    found = [json.loads(line) for line in lines]
    assert all(len(row["tokens"]) == len(row["ner_tags"]) for row in found)
    types = {tag.partition("-")[2] for row in found for tag in row["ner_tags"]}
    names = ["corporation", "creative-work", "group", "location", "person", "product"]
    assert sorted(types) == ["", *names]


def test_tinyshakespeare_is_cut_after_nine_tenths():
    train, held = (
        (DATA / "tinyshakespeare" / f"{n}.txt").read_text() for n in ("train", "validation")
    )
    assert (len(train), len(held)) == (1003854, 111540)
    assert train.startswith("First Citizen:\n") and set(held) <= set(train)


def test_at_most_five_and_a_half_megabytes_and_licences_named():
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) <= 5_500_000
    assert "MIT" in (DATA / "fashion_mnist" / "LICENSE").read_text()
    readme = (DATA / "README.md").read_text()
    assert "CC BY 4.0" in readme and "MIT" in readme and "public domain" in readme
