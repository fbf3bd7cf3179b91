"""A task that fine-tunes a pretrained causal language model on answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_precond.bench.finetuning import IGNORED, epochs, padded, splits, with_adapters
from hf_precond.bench.forgetting import Rows, text_loss
from hf_precond.bench.tasks import Batch, Task, folder_of, on

PROMPT = "Text: {}\nLabel:"


def label_generation(
    seed: int,
    model: str,
    dataset: str = "banking77",
    data: str | None = None,
    train_rows: int = 2000,
    eval_rows: int = 200,
    batch_size: int = 16,
    length: int = 64,
    lora_rank: int = 16,
    lora_scale: float = 2.0,
    other_text: str | None = None,
) -> Task:
    """A pretrained causal language model that writes the name of a text's label.

    Trained on the tokens of the name and the end. Evaluated on the validation
    split, else the test split: ``loss`` of these tokens, ``exact`` (how often
    greedy generation gives the name and ends), and ``other_loss`` of a text
    that has nothing to do with it.

    Args:
        seed: of the adapters, of dropout and of the order of the rows.
        model: folder or Hub id.
        dataset: a folder below ``data`` with ``train.json`` and
            ``validation.json`` or ``test.json``, JSON lines with ``text`` or
            ``sentence`` and ``label``; a label that is a number is named by
            ``categories.txt``, a JSON list.
        data: the data folder.
        train_rows: rows trained on, at most, the same for all seeds.
        eval_rows: rows evaluated on, at most.
        batch_size: rows of a batch, padded to the longest of them.
        length: tokens of a text, at most; what is longer is cut.
        lora_rank: of adapters on all linear layers of the model, which is then
            frozen; 0 for none.
        lora_scale: of their products: ``lora_alpha`` over the rank.
        other_text: a folder below ``data`` with ``validation.txt``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of(data, dataset)
    train, held = splits(folder, train_rows, eval_rows)
    tokenizer = AutoTokenizer.from_pretrained(model)
    encode = functools.partial(_encoded, tokenizer, _label_names(folder), length)
    torch.manual_seed(seed)
    net: nn.Module = AutoModelForCausalLM.from_pretrained(model)
    net = with_adapters(net, "CAUSAL_LM", lora_rank, lora_scale).train()
    batch = functools.partial(padded, pad=tokenizer.eos_token_id)
    rows = [batch(held_rows) for held_rows in _cut(encode(held), batch_size)]
    other = None if other_text is None else folder_of(data, other_text) / "validation.txt"

    def evaluate(model: nn.Module) -> dict[str, float]:
        found = answers(model, rows)
        return (
            found if other is None else found | {"other_loss": text_loss(model, tokenizer, other)}
        )

    return Task(net, epochs(encode(train), batch_size, seed, batch), evaluate)


def _label_names(folder: Path) -> list[str] | None:
    """The names of labels that are numbers."""
    path = folder / "categories.txt"
    return json.loads(path.read_text()) if path.exists() else None


def _encoded(tokenizer: Any, names: list[str] | None, length: int, rows: Rows) -> list[Batch]:
    """Texts with the names of their labels; the names and an end have labels."""
    found = []
    for row in rows:
        name = row["label"] if names is None else names[row["label"]]
        words = row["text" if "text" in row else "sentence"]
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        words = words if len(ids) <= length else tokenizer.decode(ids[:length])
        text = tokenizer(PROMPT.format(words))["input_ids"]
        answer = tokenizer(f" {str(name).replace('_', ' ')}", add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        labels = [IGNORED] * len(text) + answer
        found.append({"input_ids": torch.tensor(text + answer), "labels": torch.tensor(labels)})
    return found


def _cut(rows: list[Batch], size: int) -> Sequence[Sequence[Batch]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def answers(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """The loss of the labelled tokens, and how often all of a row are the likeliest.

    Greedy generation gives an answer if and only if each of its tokens is the
    likeliest after those before it, so nothing has to be generated.

    Args:
        model: a causal language model.
        batches: with ``labels``.

    Returns:
        ``loss``, the mean over tokens, and ``exact``.
    """
    was_training = model.training
    model.eval()
    loss = tokens = right = rows = 0.0
    for batch in batches:
        here = on(model, batch)
        logits = model(input_ids=here["input_ids"], attention_mask=here["attention_mask"]).logits
        logits, labels = logits[:, :-1].float(), here["labels"][:, 1:]
        asked = labels != IGNORED
        loss += F.cross_entropy(logits[asked], labels[asked], reduction="sum").item()
        tokens += asked.sum().item()
        right += ((logits.argmax(-1) == labels) | ~asked).all(1).sum().item()
        rows += len(labels)
    model.train(was_training)
    return {"loss": loss / tokens, "exact": right / rows}
