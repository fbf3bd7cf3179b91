"""The two Trainer scripts on the shipped data and on local files, offline."""

import json
import sys

import pytest

from tests.examples.scripts import EXAMPLES, run_example


@pytest.fixture
def classification(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import classification

    yield classification
    del sys.modules["classification"]


def test_text_script_on_own_files(tmp_path):
    """A tiny BERT from a folder, json files with integer labels, two steps with AFOpt."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = tmp_path / "model"
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(model)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(model)
    for name in ("train.json", "test.json"):
        rows = [{"words": f"{w} film", "sentiment": int(w == "good")} for w in ("good", "bad")] * 8
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))

    run_example(
        "text_classification.py", "--do_train", "--do_eval", "--optim", "afopt",
        "--model_name_or_path", str(model),
        "--train_file", str(tmp_path / "train.json"),
        "--validation_file", str(tmp_path / "test.json"),
        "--text_column", "words", "--label_column", "sentiment",
        "--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--output_dir", "out",
        "--save_steps", "2", "--optim_args", "head_lr_scale=10",
        folder=tmp_path,
    )  # fmt: skip
    scores = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 0 <= scores["eval_accuracy"] <= 1 and scores["train_loss"] > 0
    config = json.loads((tmp_path / "out" / "checkpoint-2" / "optimizer_config.json").read_text())
    assert config["optimizer"] == "afopt" and config["head_lr_scale"] == 10


@pytest.mark.slow
def test_text_script_fine_tunes_minilm(tmp_path):
    """The command of the script's docstring, shortened, learns on the shipped BANKING77 subset."""
    run_example(
        "text_classification.py", "--do_train", "--do_eval", "--optim", "afopt",
        "--learning_rate", "3e-4", "--optim_args", "scope=all_linear,head_lr_scale=33",
        "--per_device_train_batch_size", "32", "--max_steps", "60",
        "--max_eval_samples", "300", "--report_to", "none", "--output_dir", "out",
        "--save_strategy", "no", folder=tmp_path,
    )  # fmt: skip
    scores = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert scores["eval_accuracy"] > 0.5  # chance is .013


def test_image_script_on_the_shipped_images(tmp_path):
    run_example(
        "image_classification.py", "--do_train", "--do_eval", "--optim", "adamr",
        "--learning_rate", "1e-3", "--max_steps", "30", "--per_device_train_batch_size", "64",
        "--max_eval_samples", "300", "--report_to", "none", "--output_dir", "out",
        "--save_strategy", "no", folder=tmp_path,
    )  # fmt: skip
    scores = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert scores["eval_accuracy"] > 0.25  # chance is .1


def test_image_script_on_folders_of_images(tmp_path):
    """Grey and colour PNGs of two classes, one sub-folder each, and a saved checkpoint."""
    import numpy as np
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    for split in ("train", "test"):
        for level, kind in ((30, "dark"), (220, "light")):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            for index in range(6):
                shape = (20, 24) if index % 2 else (20, 24, 3)
                Image.fromarray(np.full(shape, level + index, np.uint8)).save(
                    folder / f"{index}.png"
                )
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    run_example(
        "image_classification.py", "--do_train", "--do_eval", "--optim", "nkfac",
        "--model_name_or_path", str(tmp_path / "model"),
        "--train_dir", str(tmp_path / "train"), "--validation_dir", str(tmp_path / "test"),
        "--max_steps", "3", "--report_to", "none", "--output_dir", "out",
        folder=tmp_path,
    )  # fmt: skip
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(saved["label2id"]) == ["dark", "light"]


def test_half_a_pair_of_sources_is_refused(classification):
    arguments = classification.DataArguments()
    arguments.train_dir, arguments.validation_dir = "images", None
    with pytest.raises(ValueError, match="train_dir and validation_dir"):
        classification.check_pair(arguments, "train_dir", "validation_dir")
    arguments.validation_dir, arguments.dataset_name = "images", "beans"
    with pytest.raises(ValueError, match="one of the two"):
        classification.check_pair(arguments, "train_dir", "validation_dir")


@pytest.mark.parametrize("column", ["label_column", "text_column", "image_column"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(
    column, classification, tmp_path
):
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    arguments = classification.DataArguments()
    setattr(arguments, column, "body")
    files = {split: str(tmp_path / "rows.csv") for split in ("train", "validation")}
    with pytest.raises(ValueError, match=f"{column}='body': the columns are text, label"):
        classification.load_splits(arguments, "csv", files)


def test_labels_are_numbered_by_name(classification):
    import datasets

    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"label": ["b", "a", "c"]}),
        validation=datasets.Dataset.from_dict({"label": ["c", "a"]}),
    )
    numbered, names = classification.number_labels(splits, "label")
    assert names == ["a", "b", "c"]
    assert numbered["train"]["label"][:] == [1, 0, 2]
    assert numbered["validation"]["label"][:] == [2, 0]

    splits["validation"] = datasets.Dataset.from_dict({"label": ["d"]})
    with pytest.raises(ValueError, match="no training row has: d"):
        classification.number_labels(splits, "label")
