"""SGD-PH against AdamW and SGD on three small tasks.

    python examples/benchmarks/sgdph_tasks.py --task vit --seeds 0 1 2 \
        --run adamw:lr=1e-3 --run sgdph:lr=1e-3 --run sgdph:lr=1e-3,gamma=0.1
    python examples/benchmarks/sgdph_tasks.py --task resnet --run sgd:lr=0.1 \
        --run sgdph:lr=0.1,base=sgd,tau=1e-3
    python examples/benchmarks/sgdph_tasks.py --task minilm --minilm FOLDER_OR_HUB_ID \
        --run adamw:lr=5e-4 --run sgdph:lr=5e-4

One line of JSON a run is printed, and appended to ``--output``. Initial
weights and batches are fixed by the seed and equal for all optimizers.

Tasks: ``vit``, the quickstart's ViT (4 layers, width 128) on the Fashion-MNIST
subset of ``examples/data``, batch 64; ``resnet``, a residual network with
BatchNorm on the same images, batch 64; ``minilm``, MiniLM-L6
(``sentence-transformers/all-MiniLM-L6-v2``) on the BANKING77 subset, 77
classes, batch 32, at most 32 tokens. Warm-up over a tenth of the steps, then
cosine; weight decay 0.01 by the Trainer's rule (``resnet``: 5e-4); gradients
clipped at norm 1 (``resnet``: not clipped).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from hf_precond import create_optimizer
from hf_precond.architectures.parameters import parameter_groups

DATA = Path(__file__).resolve().parents[1] / "data"
Batch = dict[str, Tensor]


@dataclass
class Task:
    """A model, its data and how it is trained.

    Args:
        model: gives logits for a batch without its labels.
        train, test: the data, as one batch each.
        size: rows of a mini-batch.
        weight_decay: of the groups that decay.
        clip: largest norm of the gradient, or ``None``.
    """

    model: nn.Module
    train: Batch
    test: Batch
    size: int
    weight_decay: float
    clip: float | None

    def logits(self, batch: Batch) -> Tensor:
        """Of a batch without its labels."""
        output = self.model(**{key: value for key, value in batch.items() if key != "labels"})
        return output if isinstance(output, Tensor) else output.logits

    def draw(self, generator: torch.Generator) -> Batch:
        """A mini-batch at random."""
        rows = torch.randint(len(self.train["labels"]), (self.size,), generator=generator)
        return {key: value[rows] for key, value in self.train.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the test set."""
        self.model.eval()
        count = len(self.test["labels"])
        logits = torch.cat(
            [
                self.logits({key: value[rows] for key, value in self.test.items()})
                for rows in torch.arange(count).split(128)
            ]
        )
        self.model.train()
        labels = self.test["labels"]
        return {
            "test_loss": nn.functional.cross_entropy(logits, labels).item(),
            "test_accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        }


def images(split: str) -> Batch:
    """The Fashion-MNIST subset, normalized."""
    path = DATA / "fashion_mnist" / f"{split}-00000-of-00001.parquet"
    table = datasets.Dataset.from_parquet(str(path))
    table = table.cast_column("image", datasets.Image(decode=False))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(i["bytes"]))) for i in table["image"]])
    scaled = (torch.from_numpy(pixels).float()[:, None] / 255 - 0.286) / 0.353
    return {"pixel_values": scaled, "labels": torch.tensor(table["label"])}


def vit(options: argparse.Namespace) -> Task:
    """The quickstart's ViT."""
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        image_size=28, patch_size=7, num_channels=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    return Task(model, images("train"), images("test"), 64, 0.01, 1.0)


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
        self.skip = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.skip(x) + self.body(x))


class ResNet(nn.Module):
    """Stem, four residual blocks, linear head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.structure = nn.Sequential(
            Residual(width, width),
            Residual(width, 2 * width),
            Residual(2 * width, 2 * width),
            Residual(2 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.structure(self.stem(pixel_values)).mean((2, 3)))


def resnet(options: argparse.Namespace) -> Task:
    """A residual network with BatchNorm."""
    return Task(ResNet(), images("train"), images("test"), 64, 5e-4, None)


def minilm(options: argparse.Namespace) -> Task:
    """MiniLM with a fresh head."""
    tokenizer = AutoTokenizer.from_pretrained(options.minilm)
    files = {split: str(DATA / "banking77" / f"{split}.jsonl") for split in ("train", "test")}
    table = datasets.load_dataset("json", data_files=files)
    names = sorted(set(table["train"]["label"]))

    def rows(split: str) -> Batch:
        texts, labels = list(table[split]["text"]), table[split]["label"]
        batch = tokenizer(
            texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
        )
        return dict(batch) | {"labels": torch.tensor([names.index(label) for label in labels])}

    model = AutoModelForSequenceClassification.from_pretrained(
        options.minilm, num_labels=len(names)
    )
    return Task(model, rows("train"), rows("test"), 32, 0.01, 1.0)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "vit": vit,
    "resnet": resnet,
    "minilm": minilm,
}


def make_optimizer(task: Task, run: str) -> torch.optim.Optimizer:
    """From ``name:field=value,…``; ``adamw`` and ``sgd`` are torch's own."""
    name, _, text = run.partition(":")
    fields = dict(pair.split("=") for pair in text.split(",") if pair)
    if name in ("adamw", "sgd"):
        groups, _ = parameter_groups(task.model, float(fields["lr"]), task.weight_decay)
        if name == "adamw":
            return torch.optim.AdamW(groups, fused=True)
        return torch.optim.SGD(groups, momentum=0.9)
    from hf_precond.registry import get_info

    config = get_info(name).config_cls.from_strings(
        {"weight_decay": str(task.weight_decay)} | fields
    )
    return create_optimizer(task.model, config)


def train(task: Task, run: str, steps: int, seed: int, trace_every: int) -> dict[str, Any]:
    """Train and evaluate; what the norm parameters' steps were, for SGD-PH."""
    optimizer = make_optimizer(task, run)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            min(1.0, (s + 1) / warm)
            * 0.5
            * (1 + math.cos(math.pi * max(0, s - warm) / max(1, steps - warm)))
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(1000 + seed)
    task.model.train()
    losses: list[float] = []
    trace: list[dict[str, float]] = []
    start = time.perf_counter()
    for step in range(steps):
        batch = task.draw(generator)
        if hasattr(optimizer, "probe"):
            with optimizer.curvature_context():
                loss = nn.functional.cross_entropy(task.logits(batch), batch["labels"])
                optimizer.probe(loss)
                loss.backward()
        else:
            loss = nn.functional.cross_entropy(task.logits(batch), batch["labels"])
            loss.backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
        optimizer.step()
        if hasattr(optimizer, "diagnostics") and step % trace_every == trace_every - 1:
            trace.append(optimizer.diagnostics())
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    seconds = (time.perf_counter() - start) / steps
    if hasattr(optimizer, "close"):
        optimizer.close()
    found = {
        "train_loss": statistics.fmean(losses[-max(1, steps // 10) :]),
        "seconds_per_step": seconds,
    }
    return found | task.evaluate() | summary(trace)


def summary(trace: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Lowest, median and highest of what the diagnostics showed during training."""
    names = ("norm_update_over_adamw", "norm_clipped", "norm_multiplier", "norm_capped")
    found = {}
    for name in names:
        values = sorted(entry[name] for entry in trace if name in entry)
        if values:
            found[name] = [values[0], statistics.median(values), values[-1]]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--run", action="append", required=True, help="name:field=value,…")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, default=200)
    add("--trace_every", type=int, default=10, help="steps between two looks at the norm steps")
    add("--minilm", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or Hub id")
    add("--threads", type=int, default=1, help="of torch")
    add("--output", type=Path, help="file that gets a line of JSON a run")
    options = parser.parse_args(argv)
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for run in options.run:
            torch.manual_seed(seed)
            task = TASKS[options.task](options)
            found = {"task": options.task, "run": run, "seed": seed, "steps": options.steps}
            found |= train(task, run, options.steps, seed, options.trace_every)
            line = json.dumps(found)
            print(line, flush=True)
            if options.output is not None:
                with options.output.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
