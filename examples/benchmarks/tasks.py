"""Tasks of one's own for ``hf-precond bench``: functions of a seed.

A file names them as ``function = "tasks.py:recall"``. Each returns a model, its
batches and its evaluation; initial weights and batches follow the seed, equal
for all optimizers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_precond.bench import tasks
from hf_precond.bench.tasks import Batch, Task

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


@torch.no_grad()
def next_tokens(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Mean loss, and accuracy over the tokens that have labels."""
    model.eval()
    losses, right, seen = [], 0, 0
    for batch in batches:
        output = model(**tasks.on(model, batch))
        losses.append(output.loss.item())
        found, labels = output.logits.argmax(-1)[:, :-1].cpu(), batch["labels"][:, 1:]
        right += (found == labels).sum().item()
        seen += (labels >= 0).sum().item()
    model.train()
    return {"loss": sum(losses) / len(losses), "accuracy": right / seen}


def recall(seed: int) -> Task:
    """Associative recall under a Llama of two layers and width 64, 64 sequences a batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(
        vocab_size=KEYS + VALUES, max_position_embeddings=4 * PAIRS, **sizes, **heads
    )
    held = torch.Generator().manual_seed(0)
    held_out = [recall_batch(256, held) for _ in range(2)]
    return Task(
        LlamaForCausalLM(config),
        lambda step: recall_batch(64, generator),
        functools.partial(next_tokens, batches=held_out),
    )


class Residual(nn.Module):
    """``x + BN(conv(relu(BN(conv(x)))))``, strided where it widens."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        stride = 1 if inside == outside else 2
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.skip: nn.Module = nn.Identity()
        if stride == 2:
            narrow = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.skip = nn.Sequential(narrow, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.skip(x) + self.body(x))


class ResNet(nn.Module):
    """Stem, four residual blocks, linear head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.body = nn.Sequential(
            Residual(width, width),
            Residual(width, 2 * width),
            Residual(2 * width, 2 * width),
            Residual(2 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(self.stem(pixel_values)).mean((2, 3)))


@torch.no_grad()
def classes(model: nn.Module, rows: Batch) -> dict[str, float]:
    """Loss and accuracy of a model that returns logits."""
    model.eval()
    device = next(model.parameters()).device
    parts = [model(part.to(device)).cpu() for part in rows["pixel_values"].split(250)]
    model.train()
    logits, labels = torch.cat(parts), rows["labels"]
    loss = nn.functional.cross_entropy(logits, labels).item()
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).double().mean().item()}


def resnet(seed: int, data: str | None = None) -> Task:
    """A small residual network with BatchNorm on Fashion-MNIST, 64 images a batch."""
    train, test = tasks.fashion_mnist(data)
    generator = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)
    return Task(
        ResNet(),
        tasks.random_rows(train, 64, generator),
        functools.partial(classes, rows=test),
        lambda model, batch: nn.functional.cross_entropy(
            model(batch["pixel_values"]), batch["labels"]
        ),
    )
