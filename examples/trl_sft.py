"""Fine-tune a language model on prompts and completions with TRL's SFTTrainer and any ``--optim``.

    pip install trl

Offline, a small Llama that the script first trains on Shakespeare's plays; the next character's
answer is the completion (TRL's default is bfloat16, which is slow on most CPUs):

    python examples/trl_sft.py --do_train --do_eval --optim afopt --learning_rate 1e-3 \\
        --max_steps 100 --bf16 false

A pretrained model, on json lines with the columns prompt and completion, or messages, or data of
the Hub, by LoRA:

    python examples/trl_sft.py --do_train --do_eval --optim afopt \\
        --model_name_or_path FOLDER_OR_ID --train_file train.jsonl --validation_file test.jsonl
    python examples/trl_sft.py --do_train --do_eval --optim afopt --learning_rate 2e-4 \\
        --use_peft --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara \\
        --validation_split test

TRL's own program takes the same names: python -m hf_precond trl sft --optim afopt ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import datasets
from common import (
    FileArguments,
    first_rows,
    parse_arguments,
    pretrained,
    refuse,
    train_and_evaluate,
)
from peft import LoraConfig
from shakespeare import make_base, read
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_precond  # noqa: F401  TRL's trainers then take --optim afopt, muon, adamr, ...

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    refuse("TRL is missing; pip install trl.")


@dataclass
class TunedArguments:
    """Which model is fine-tuned, and how; ``trust_remote_code`` is among TRL's arguments."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id; default: a small Llama, trained first."}
    )
    base_steps: int = field(
        default=200, metadata={"help": "AdamW's steps on the model that stands for a pretrained."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter alone."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter's matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale, in units of the rank."})


def answers(split: int) -> datasets.Dataset:
    """Neighbouring speeches of the plays: what is said, and what the next character answers."""
    speeches = [speech for speech in read(split).split("\n\n") if ":\n" in speech]
    pairs = []
    for said, answer in pairwise(speeches):
        name, _, words = answer.partition(":\n")
        pairs.append({"prompt": f"{said[-160:]}\n\n{name}:\n", "completion": words[:160]})
    return datasets.Dataset.from_list(pairs)


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(TunedArguments, FileArguments, SFTConfig)
    set_seed(arguments.seed)

    if data.train_file or data.dataset_name:
        splits = data.load()
    else:
        splits = datasets.DatasetDict(train=answers(0), validation=answers(1))
    name = model_arguments.model_name_or_path
    if not name:
        folder = Path(arguments.output_dir, "base").resolve()
        name = make_base(folder, model_arguments.base_steps, use_cpu=arguments.use_cpu)
    remote = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer, model = pretrained(name, AutoTokenizer, AutoModelForCausalLM, **remote)

    adapter = LoraConfig(
        r=model_arguments.lora_r,
        lora_alpha=model_arguments.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    seed = arguments.data_seed
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=first_rows(splits["train"], data.max_train_samples, seed),
        eval_dataset=first_rows(splits["validation"], data.max_eval_samples, seed),
        processing_class=tokenizer,
        peft_config=adapter if model_arguments.use_peft else None,
    )
    return train_and_evaluate(trainer, arguments)


if __name__ == "__main__":
    main()
