"""What the language examples share: a tokenizer of bytes, a small Llama that has read the plays.

A pretrained language model does not come as a Python package; this one takes its place offline.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from common import HERE
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

PLAYS = ("tinyshakespeare/train.txt", "tinyshakespeare/validation.txt")
LENGTH = 128  # tokens, here bytes, of a row of the base model's training


def read(split: int) -> str:
    """The training part (0) of the plays, or what was held out of it (1)."""
    return (HERE / "data" / PLAYS[split]).read_text()


def byte_tokenizer() -> ByT5Tokenizer:
    """A token for each byte, and `<pad>`, `</s>` and `<unk>`."""
    return ByT5Tokenizer(extra_ids=0)


def make_base(folder: Path, steps: int, *, lower: bool = False, use_cpu: bool = False) -> str:
    """Train a small Llama on the plays with AdamW; its folder, as a pretrained model's.

    Args:
        folder: where it is saved.
        steps: of 32 rows; 0 leaves its random weights.
        lower: it reads the plays in small letters.
        use_cpu: leave a GPU alone.
    """
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=384,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    if steps:
        print(f"The base model, a small Llama, is trained on the plays for {steps} steps.")
        text = read(0).lower() if lower else read(0)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        starts = random.Random(0).choices(range(len(ids) - LENGTH), k=32 * steps)
        rows = [{"input_ids": r, "labels": r} for r in (ids[s : s + LENGTH] for s in starts)]
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=use_cpu,
        )
        Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
