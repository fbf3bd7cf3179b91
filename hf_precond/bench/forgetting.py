"""What a fine-tuned model still knows of other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_precond.bench.tasks import mean_loss, on

Rows = list[dict[str, Any]]
NEIGHBOURS = 10


@torch.no_grad()
def neighbours_accuracy(
    model: nn.Module, tokenizer: Any, known: Rows, asked: Rows, length: int = 64
) -> float:
    """How often the labels of the ten nearest texts tell the label of a text.

    Texts are compared by the cosine of the mean of the body's last hidden
    states over their tokens; a neighbour's vote is its cosine.

    Args:
        model: a model of transformers with a head, or within PEFT's wrappers.
        tokenizer: its tokenizer.
        known: rows with ``label`` and ``text`` or ``sentence``.
        asked: rows whose labels are to be told.
        length: tokens of a text, at most.

    Returns:
        The share of the rows asked for that is right.
    """
    names = sorted({row["label"] for row in known})
    labels = torch.tensor([names.index(row["label"]) for row in known])
    cosines = (
        _features(model, tokenizer, asked, length) @ _features(model, tokenizer, known, length).mT
    )
    nearest = cosines.topk(min(NEIGHBOURS, len(known)))
    votes = torch.zeros(len(asked), len(names)).scatter_add_(
        1, labels[nearest.indices], nearest.values
    )
    found = [names[index] for index in votes.argmax(1).tolist()]
    return sum(a == row["label"] for a, row in zip(found, asked, strict=True)) / len(asked)


def _features(model: nn.Module, tokenizer: Any, rows: Rows, length: int) -> Tensor:
    """Unit vectors of texts, ``[n, hidden]``."""
    whole: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    body, was_training = whole.base_model, model.training
    model.eval()
    found = []
    for start in range(0, len(rows), 100):
        texts = [row["text" if "text" in row else "sentence"] for row in rows[start : start + 100]]
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        batch = on(model, batch)
        hidden, mask = body(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).float().cpu())
    model.train(was_training)
    return torch.cat(found)


def text_loss(
    model: nn.Module, tokenizer: Any, path: Path, blocks: int = 16, length: int = 128
) -> float:
    """The loss of a language model on the beginning of a text.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        path: the text's file.
        blocks: of tokens that are read, each by itself.
        length: tokens of a block.
    """
    text = path.read_text(encoding="utf-8")[: 16 * blocks * length]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: blocks * length])
    rows: Sequence[Tensor] = ids[: len(ids) // length * length].view(-1, length).split(4)
    return mean_loss(model, [{"input_ids": row, "labels": row} for row in rows])["loss"]
