"""The two Trainer scripts on the shipped data and on local files, offline."""

import json
import sys

import pytest

from tests.examples.scripts import EXAMPLES, run_example, tiny_bert


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import common

    yield common
    del sys.modules["common"]


def test_text_script_on_own_files(tmp_path):
    """A tiny BERT from a folder, json files with integer labels, two steps with AFOpt.

    The folder's head has three classes and the files two: it is made anew, and counts as new.
    """
    from transformers import BertForSequenceClassification

    model = tiny_bert(
        tmp_path, ["good", "bad", "film"], kind=BertForSequenceClassification, num_labels=3
    )
    for name in ("train.json", "test.json"):
        rows = [{"words": f"{w} film", "sentiment": int(w == "good")} for w in ("good", "bad")] * 8
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))

    run_example(
        "text_classification.py", "--do_train", "--do_eval", "--optim", "afopt",
        "--model_name_or_path", model,
        "--train_file", str(tmp_path / "train.json"),
        "--validation_file", str(tmp_path / "test.json"),
        "--text_column", "words", "--label_column", "sentiment",
        "--max_steps", "2", "--logging_steps", "1", "--report_to", "none", "--output_dir", "out",
        "--save_steps", "2", "--optim_args", "head_lr_scale=10",
        folder=tmp_path,
    )  # fmt: skip
    scores = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 0 <= scores["eval_accuracy"] <= 1 and scores["train_loss"] > 0
    checkpoint = tmp_path / "out" / "checkpoint-2"
    config = json.loads((checkpoint / "optimizer_config.json").read_text())
    assert config["optimizer"] == "afopt" and config["head_lr_scale"] == 10
    assert json.loads((checkpoint / "config.json").read_text())["id2label"] == {"0": "0", "1": "1"}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["max_steps"] == 2

    printed = run_example(
        "text_classification.py", "--do_eval", "--model_name_or_path", str(checkpoint),
        "--train_file", str(tmp_path / "train.json"),
        "--validation_file", str(tmp_path / "test.json"),
        "--text_column", "words", "--label_column", "sentiment", "--output_dir", "evaluated",
        folder=tmp_path,
    )  # fmt: skip
    assert "Without --do_train nothing is trained" in printed
    again = json.loads((tmp_path / "evaluated" / "all_results.json").read_text())
    assert again["eval_loss"] == scores["eval_loss"]


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


@pytest.mark.slow
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


def test_half_a_pair_of_sources_is_refused(common, tmp_path):
    arguments = common.DataArguments()
    arguments.train_dir, arguments.validation_dir = "images", None
    with pytest.raises(ValueError, match="--train_dir and --validation_dir"):
        common.check_pair(arguments, "train_dir", "validation_dir")
    arguments.validation_dir, arguments.dataset_name = "images", "beans"
    with pytest.raises(ValueError, match="one of the two"):
        common.check_pair(arguments, "train_dir", "validation_dir")
    arguments.dataset_name, arguments.train_dir = None, str(tmp_path)
    with pytest.raises(ValueError, match="--validation_dir: there is nothing at 'images'"):
        common.check_pair(arguments, "train_dir", "validation_dir")


@pytest.mark.parametrize("column", ["label_column", "text_column", "image_column"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(
    column, common, tmp_path, capsys
):
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    arguments = common.DataArguments()
    setattr(arguments, column, "body")
    files = {split: str(tmp_path / "rows.csv") for split in ("train", "validation")}
    with pytest.raises(SystemExit, match="2"):
        common.load_splits(arguments, "csv", files)
    assert f"--{column} body: the columns are text, label." in capsys.readouterr().err


def test_labels_are_numbered_by_name(common, capsys):
    import datasets

    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"label": ["b", "a", "c"]}),
        validation=datasets.Dataset.from_dict({"label": ["c", "a"]}),
    )
    numbered, names = common.number_labels(splits, "label")
    assert names == ["a", "b", "c"]
    assert numbered["train"]["label"][:] == [1, 0, 2]
    assert numbered["validation"]["label"][:] == [2, 0]

    splits["validation"] = datasets.Dataset.from_dict({"label": ["d"]})
    with pytest.raises(SystemExit, match="2"):
        common.number_labels(splits, "label")
    assert "no training row has: d" in capsys.readouterr().err
