"""Adapt a causal language model by LoRA with any ``--optim``.

Offline, a small Llama that the script first trains on Shakespeare's plays in small letters; its
adapter learns the capitals:

    python examples/causal_lm_lora.py --do_train --do_eval --optim afopt \\
        --learning_rate 3e-3 --max_steps 200 --per_device_train_batch_size 16

A pretrained model, on text files of your own or data of the Hub:

    python examples/causal_lm_lora.py --do_train --do_eval --model_name_or_path FOLDER_OR_ID \\
        --train_file train.txt --validation_file test.txt
    python examples/causal_lm_lora.py --do_train --do_eval --learning_rate 2e-4 \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --block_size 512
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import datasets
import evaluate
from common import (
    FileArguments,
    ModelArguments,
    first_rows,
    parse_arguments,
    pretrained,
    refuse,
    train_and_evaluate,
)
from peft import LoraConfig, TaskType, get_peft_model
from shakespeare import PLAYS, make_base
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_precond import PrecondTrainer


@dataclass
class AdapterArguments(ModelArguments):
    """Which model is adapted, and how."""

    base_steps: int = field(
        default=200, metadata={"help": "AdamW's steps on the model that stands for a pretrained."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale, in units of the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "Layers that are adapted: q_proj,v_proj or so."}
    )

    def __post_init__(self) -> None:
        if self.lora_r < 1 or self.base_steps < 0:
            raise ValueError("--lora_r takes an integer in [1, infinity), --base_steps in [0, …).")


@dataclass
class LanguageArguments(FileArguments):
    """Which text it is adapted to."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    block_size: int = field(default=128, metadata={"help": "Tokens of a row."})


def encode(splits: datasets.DatasetDict, tokenizer, data: LanguageArguments):
    """All texts one after the other, cut into rows of ``block_size`` tokens."""

    def encode_rows(rows):
        texts = [text + "\n" for text in rows[data.text_column]]
        tokens = list(chain(*tokenizer(texts, add_special_tokens=False)["input_ids"]))
        size = data.block_size
        blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    return splits.map(encode_rows, batched=True, remove_columns=splits["train"].column_names)


def next_token_scores(metric):
    """The two functions by which the Trainer counts right next tokens, without keeping logits."""

    def compute(found):
        predictions, labels = found.predictions[:, :-1].ravel(), found.label_ids[:, 1:].ravel()
        return metric.compute(predictions=predictions, references=labels)

    return {
        "compute_metrics": compute,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(
        AdapterArguments, LanguageArguments, TrainingArguments
    )
    set_seed(arguments.seed)

    splits = data.load(*PLAYS)
    name, steps = model_arguments.model_name_or_path, model_arguments.base_steps
    if not name:
        folder = Path(arguments.output_dir, "base").resolve()
        name = make_base(folder, steps, lower=True, use_cpu=arguments.use_cpu)
    remote = {"trust_remote_code": model_arguments.trust_remote_code}
    tokenizer, model = pretrained(name, AutoTokenizer, AutoModelForCausalLM, **remote)
    encoded = encode(splits, tokenizer, data)

    names = model_arguments.lora_target_modules
    config = LoraConfig(
        r=model_arguments.lora_r,
        lora_alpha=model_arguments.lora_alpha,
        lora_dropout=model_arguments.lora_dropout,
        target_modules=names if names == "all-linear" else names.split(","),
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        refuse(f"--lora_target_modules {names}: {error}")
    model.print_trainable_parameters()

    seed = arguments.data_seed
    trainer = PrecondTrainer(
        model=model,
        args=arguments,
        train_dataset=first_rows(encoded["train"], data.max_train_samples, seed),
        eval_dataset=first_rows(encoded["validation"], data.max_eval_samples, seed),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        **next_token_scores(evaluate.load(data.metric)),
    )
    asked = arguments.do_train and arguments.do_eval
    before = f"{math.exp(trainer.evaluate()['eval_loss']):.3f} before, " if asked else ""
    scores = train_and_evaluate(trainer, arguments, "text-generation")
    if "eval_loss" in scores:
        print(f"Perplexity of the held-out text: {before}{math.exp(scores['eval_loss']):.3f}")
    return scores


if __name__ == "__main__":
    main()
