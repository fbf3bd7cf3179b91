"""A training script as people have them: it knows transformers, and no optimizer package."""

import json
from dataclasses import dataclass

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


@dataclass
class ScriptArguments:
    family: str = "bert"
    rows: int = 512


def build(family):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    free = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZES, **free, num_labels=3))


def data(family, rows):
    tokens = torch.randint(3, 60, (rows, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens if family == "llama" else tokens[:, 0] % 3
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def main():
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    script, args = parser.parse_args_into_dataclasses()
    trainer = Trainer(build(script.family), args, train_dataset=data(script.family, script.rows))
    trainer.train()
    if trainer.is_world_process_zero():
        with open(f"{args.output_dir}/log_history.json", "w") as file:
            json.dump(trainer.state.log_history, file)


if __name__ == "__main__":
    main()
