"""Translate with any ``--optim``: PrecondSeq2SeqTrainer, whose evaluation generates.

Offline, a small T5 from random weights that learns to write dates as 1997-03-02, from rows that
the script makes:

    python examples/seq2seq.py --do_train --do_eval --optim afopt --learning_rate 3e-3 \\
        --max_steps 300 --per_device_train_batch_size 64

A pretrained model, on files of your own (json lines, csv or parquet) or data of the Hub:

    python examples/seq2seq.py --do_train --do_eval --model_name_or_path FOLDER_OR_ID \\
        --train_file train.jsonl --validation_file test.jsonl \\
        --source_column question --target_column answer
    python examples/seq2seq.py --do_train --do_eval --learning_rate 3e-4 \\
        --model_name_or_path google-t5/t5-small --dataset_name knkarthick/dialogsum \\
        --source_column dialogue --target_column summary --max_source_length 512 --metric rouge
"""

from __future__ import annotations

import calendar
import datetime
import random
from dataclasses import dataclass, field

import datasets
import evaluate
import numpy as np
from common import (
    HERE,
    FileArguments,
    ModelArguments,
    first_rows,
    parse_arguments,
    pretrained,
    train_and_evaluate,
)
from shakespeare import byte_tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_precond import PrecondSeq2SeqTrainer

FORMATS = ("{month} {d}, {y}", "{d} {short} {y}", "{d:02}/{m:02}/{y}", "{short} {d} {y}")


@dataclass
class PairArguments(FileArguments):
    """Which pairs of texts it is trained on."""

    source_column: str = field(default="source", metadata={"help": "Column of what is read."})
    target_column: str = field(default="target", metadata={"help": "Column of what is written."})
    max_source_length: int = field(default=64, metadata={"help": "Longer sources are cut."})
    max_target_length: int = field(default=64, metadata={"help": "Longer targets are cut."})
    metric: str = field(
        default=str(HERE / "metrics" / "exact_match"),
        metadata={"help": "evaluate metric of texts: a folder or a name on the Hub."},
    )


def dates(count: int, seed: int) -> datasets.Dataset:
    """Days of 1900 to 2049, as people write them and as ISO 8601 does."""
    draw = random.Random(seed)
    first, last = (datetime.date(year, 1, 1).toordinal() for year in (1900, 2050))
    rows = []
    for _ in range(count):
        day = datetime.date.fromordinal(draw.randrange(first, last))
        month = calendar.month_name[day.month]
        fields = {"d": day.day, "m": day.month, "y": day.year, "month": month, "short": month[:3]}
        source = draw.choice(FORMATS).format(**fields)
        rows.append({"source": source, "target": day.isoformat()})
    return datasets.Dataset.from_list(rows)


def small_t5() -> tuple:
    """A tokenizer of bytes, and a T5 of 0.2 M parameters with random weights."""
    tokenizer = byte_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, T5ForConditionalGeneration(config)


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(
        ModelArguments, PairArguments, Seq2SeqTrainingArguments
    )
    arguments.predict_with_generate = True
    set_seed(arguments.seed)

    if data.train_file or data.dataset_name:
        splits = data.load()
    else:
        splits = datasets.DatasetDict(train=dates(20_000, 0), validation=dates(500, 1))
    if name := model_arguments.model_name_or_path:
        remote = {"trust_remote_code": model_arguments.trust_remote_code}
        tokenizer, model = pretrained(name, AutoTokenizer, AutoModelForSeq2SeqLM, **remote)
    else:
        tokenizer, model = small_t5()
    model.generation_config.max_new_tokens = data.max_target_length

    def encode(rows):
        encoded = tokenizer(
            rows[data.source_column], max_length=data.max_source_length, truncation=True
        )
        target = {"text_target": rows[data.target_column], "max_length": data.max_target_length}
        return encoded | {"labels": tokenizer(**target, truncation=True)["input_ids"]}

    encoded = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    metric = evaluate.load(data.metric)

    def compute_metrics(found) -> dict[str, float]:
        pair = (found.predictions, found.label_ids)
        pair = (np.where(ids < 0, tokenizer.pad_token_id, ids) for ids in pair)
        texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in pair]
        return metric.compute(predictions=texts[0], references=texts[1])

    seed = arguments.data_seed
    trainer = PrecondSeq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=first_rows(encoded["train"], data.max_train_samples, seed),
        eval_dataset=first_rows(encoded["validation"], data.max_eval_samples, seed),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    return train_and_evaluate(trainer, arguments, "text2text-generation")


if __name__ == "__main__":
    main()
