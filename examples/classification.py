"""What text_classification.py and image_classification.py share: arguments, splits, the run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import HfArgumentParser, Trainer, TrainingArguments

HERE = Path(__file__).resolve().parent


@dataclass
class DataArguments:
    """Where the rows come from."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the Hub (or a folder of one)."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set."}
    )
    train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Split that is evaluated on."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many rows, drawn with --data_seed."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many rows, drawn with --data_seed."}
    )
    metric: str = field(
        default=str(HERE / "metrics" / "accuracy"),
        metadata={"help": "evaluate metric: a folder or a name on the Hub."},
    )


def check_pair(arguments: DataArguments, train: str, validation: str) -> None:
    """Refuse half a pair of local sources, and a local source beside a data set's name."""
    given = [getattr(arguments, name) is not None for name in (train, validation)]
    if any(given) and not all(given):
        raise ValueError(f"{train} and {validation}: give both, or none of the two.")
    if any(given) and arguments.dataset_name:
        raise ValueError(f"dataset_name and {train}: give one of the two.")


def parse_arguments(*kinds: type) -> tuple:
    """The dataclasses ``kinds`` from the command line, or from one json file named on it."""
    parser = HfArgumentParser(kinds)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def load_splits(
    arguments: DataArguments, builder: str, files: dict[str, str]
) -> datasets.DatasetDict:
    """The splits ``train`` and ``validation``: of the named data set, or of local ``files``."""
    if not arguments.dataset_name:
        splits = datasets.load_dataset(builder, data_files=files)
    else:
        loaded = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name)
        wanted = (arguments.train_split, arguments.validation_split)
        missing = [name for name in wanted if name not in loaded]
        if missing:
            raise ValueError(
                f"{arguments.dataset_name} has the splits {', '.join(loaded)}, not "
                f"{', '.join(missing)}; choose with --train_split and --validation_split."
            )
        splits = datasets.DatasetDict(train=loaded[wanted[0]], validation=loaded[wanted[1]])
    columns = splits["train"].column_names
    for name in ("label_column", "text_column", "image_column"):
        asked = getattr(arguments, name, columns[0])
        if asked not in columns:
            raise ValueError(f"{name}={asked!r}: the columns are {', '.join(columns)}.")
    return splits


def number_labels(splits: datasets.DatasetDict, column: str) -> tuple[datasets.DatasetDict, list]:
    """The splits with the labels as class numbers, and the names of the classes."""
    if not isinstance(splits["train"].features[column], datasets.ClassLabel):
        seen, asked = (set(map(str, splits[s][column])) for s in ("train", "validation"))
        if asked - seen:
            raise ValueError(
                f"{column}: the evaluation rows hold labels that no training row has: "
                f"{', '.join(sorted(asked - seen))}."
            )
        feature = datasets.ClassLabel(names=sorted(seen))
        splits = splits.map(lambda row: {column: str(row[column])})
        splits = splits.cast_column(column, feature)
    return splits, list(splits["train"].features[column].names)


def label_config(names: Sequence[str]) -> dict:
    """The config fields that name the classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def first_rows(rows: datasets.Dataset, count: int | None, seed: int | None) -> datasets.Dataset:
    """At most ``count`` rows, drawn with ``seed``."""
    if count is None or count >= len(rows):
        return rows
    return rows.shuffle(seed=seed or 0).select(range(count))


def train_and_evaluate(trainer: Trainer, arguments: TrainingArguments, task: str) -> dict:
    """What --do_train, --do_eval and --push_to_hub ask for; returns the figures."""
    scores: dict[str, float] = {}
    if arguments.do_train:
        result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        scores |= result.metrics
    if arguments.do_eval:
        result = trainer.evaluate()
        trainer.log_metrics("eval", result)
        trainer.save_metrics("eval", result)
        scores |= result
    if arguments.push_to_hub:
        trainer.push_to_hub(tasks=task)
    return scores
