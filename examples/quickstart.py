"""Train a small ViT on Fashion-MNIST with AdamW and with the five optimizers, and compare.

    python examples/quickstart.py                      # one seed, all optimizers
    python examples/quickstart.py --seeds 3            # mean of three seeds
    python examples/quickstart.py --optim adamw afopt --learning_rate 5e-4 1e-3 2e-3

Everything is local: the images are in examples/data, the metric in examples/metrics, and the
model starts from random weights. Each run is the stock ``Trainer`` with
``TrainingArguments(optim=...)``; within one seed all optimizers see the same initial weights and
the same batches. Prints one table, and writes loss_curves.png and results.json to ``--output``.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import evaluate
import matplotlib
import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import hf_precond  # noqa: F401  importing it puts the names under TrainingArguments(optim=...)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
PIXEL_MEAN, PIXEL_STD = 0.286, 0.353
BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the table: what goes into TrainingArguments."""

    optim: str
    optim_args: str
    learning_rate: float


# Learning rates: examples/benchmarks/quickstart.md has the grids that they come from.
ARMS = {
    "adamw": Arm("adamw_torch_fused", "", 1e-3),
    "afopt": Arm("afopt", "", 1e-3),
    "afopt_attention": Arm("afopt", "scope=attention", 4e-3),
    "muon": Arm("muon", "lr_scale=4", 1e-3),
    "adamr": Arm("adamr", "", 4e-3),
    "nkfac": Arm("nkfac", "base=adamw", 1e-3),
    "sgdph": Arm("sgdph", "base=adamw", 1e-3),
}


@dataclasses.dataclass
class Run:
    """What one training run gave."""

    arm: str
    optim: str
    optim_args: str
    learning_rate: float
    seed: int
    losses: list[float]
    train_loss: float
    test_loss: float
    test_accuracy: float
    seconds_per_step: float


class Images(torch.utils.data.Dataset):
    """Normalised images and labels, decoded once and kept as two tensors."""

    def __init__(self, split: str) -> None:
        path = HERE / "data" / "fashion_mnist" / f"{split}-00000-of-00001.parquet"
        table = datasets.Dataset.from_parquet(str(path))
        table = table.cast_column("image", datasets.Image(decode=False))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(i["bytes"]))) for i in table["image"]])
        self.pixels = (torch.from_numpy(pixels).float()[:, None] / 255 - PIXEL_MEAN) / PIXEL_STD
        self.labels = torch.tensor(table["label"])
        self.names = table.features["label"].names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class Progress(TrainerCallback):
    """Collects the loss of every step and moves the bar that all runs share."""

    def __init__(self, bar: tqdm, name: str) -> None:
        self.bar, self.name, self.losses = bar, name, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.bar.set_description_str(f"{self.name}: loss {self.losses[-1]:.3f}", refresh=False)
            self.bar.update()


def make_model(names: Sequence[str], seed: int) -> ViTForImageClassification:
    """A four-layer ViT with random weights: 16 patches of 7x7 pixels, 0.8 M parameters."""
    set_seed(seed)
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def train(
    name: str, arm: Arm, seed: int, steps: int, train_set: Images, test_set: Images,
    output: Path, bar: tqdm,
) -> Run:  # fmt: skip
    """Train and evaluate one model."""
    metric = evaluate.load(str(HERE / "metrics" / "accuracy"))
    progress = Progress(bar, name)
    trainer = Trainer(
        model=make_model(train_set.names, seed),
        args=TrainingArguments(
            output_dir=str(output / "trainer"),
            optim=arm.optim,
            optim_args=arm.optim_args or None,
            learning_rate=arm.learning_rate,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=250,
            seed=seed,
            logging_steps=1,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train_set,
        eval_dataset=test_set,
        compute_metrics=lambda p: metric.compute(
            predictions=p.predictions.argmax(-1), references=p.label_ids
        ),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    runtime = trainer.train().metrics["train_runtime"]
    scores = trainer.evaluate()
    optimizer = trainer.optimizer.optimizer  # inside accelerate's wrapper
    if hasattr(optimizer, "close"):  # the next run starts without this one's hooks
        optimizer.close()
    return Run(
        arm=name,
        optim=arm.optim,
        optim_args=arm.optim_args,
        learning_rate=arm.learning_rate,
        seed=seed,
        losses=progress.losses,
        train_loss=statistics.fmean(progress.losses[-max(1, steps // 10) :]),
        test_loss=scores["eval_loss"],
        test_accuracy=scores["eval_accuracy"],
        seconds_per_step=runtime / steps,
    )


def group(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    """Runs that differ in their seed alone."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.arm, run.learning_rate), []).append(run)
    return groups


def table(runs: Sequence[Run]) -> str:
    """One line per optimizer and learning rate, at most 80 columns."""
    head = ("optimizer", "lr", "train loss", "test loss", "test acc %", "s/step")
    lines = ["{:<18}{:>9}{:>12}{:>11}{:>16}{:>9}".format(*head), "-" * 75]
    for (name, rate), members in group(runs).items():
        accuracies = [100 * run.test_accuracy for run in members]
        accuracy = f"{statistics.fmean(accuracies):.1f}"
        if len(members) > 1:
            accuracy += f" ± {statistics.stdev(accuracies):.1f}"
        means = [
            statistics.fmean(getattr(run, key) for run in members)
            for key in ("train_loss", "test_loss", "seconds_per_step")
        ]
        lines.append(
            f"{name:<18}{rate:>9.1e}{means[0]:>12.3f}{means[1]:>11.3f}{accuracy:>16}{means[2]:>9.3f}"
        )
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path, window: int = 10) -> None:
    """Running mean of the training loss over the steps, averaged over the seeds.

    AdamW's curve is drawn broad, so that one which lies on it (SGD-PH's) is seen.
    """
    figure, axes = plt.subplots(figsize=(8, 5))
    groups = group(runs)
    rates_vary = len({name for name, _ in groups}) < len(groups)
    for (name, rate), members in groups.items():
        losses = np.mean([run.losses for run in members], axis=0)
        width = min(window, len(losses))
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        label = f"{name}, lr {rate:g}" if rates_vary else name
        wide = {"lw": 4, "alpha": 0.5} if name == "adamw" else {}
        axes.plot(np.arange(width, len(losses) + 1), smooth, label=label, **wide)
    seeds = len({run.seed for run in runs})
    title = "Small ViT on Fashion-MNIST, from random weights"
    axes.set(title=title if seeds == 1 else f"{title} (mean of {seeds} seeds)")
    axes.set(xlabel="step", ylabel=f"training loss (mean of {window} steps)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=200, help="training steps of a run (default: %(default)s)")
    add("--seeds", type=int, default=1, help="runs per optimizer (default: %(default)s)")
    add("--first_seed", type=int, default=0, help="seed of the first run (default: %(default)s)")
    add("--optim", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME",
        help="which of " + ", ".join(ARMS) + " to run (default: all)")  # fmt: skip
    add("--learning_rate", type=float, nargs="+", metavar="LR",
        help="run every optimizer at each of these instead of its recommended one")  # fmt: skip
    add("--optim_args", help="key=value,… in place of the recommended ones")
    add("--output", type=Path, default=Path("outputs/quickstart"), help="folder of the results")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.seeds < 1:
        parser.error("--steps and --seeds take an integer of at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> list[Run]:
    options = parse(argv)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    options.output.mkdir(parents=True, exist_ok=True)
    train_set, test_set = Images("train"), Images("test")

    arms: list[tuple[str, Arm]] = []
    for name in options.optim:
        for rate in options.learning_rate or [ARMS[name].learning_rate]:
            arm = dataclasses.replace(ARMS[name], learning_rate=rate)
            if options.optim_args is not None:
                arm = dataclasses.replace(arm, optim_args=options.optim_args)
            arms.append((name, arm))

    runs: list[Run] = []
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    steps = len(arms) * len(seeds) * options.steps
    # A log file gets a line every ten seconds, a terminal a moving bar.
    with tqdm(total=steps, unit="step", mininterval=0.1 if sys.stderr.isatty() else 10) as bar:
        for seed in seeds:
            for name, arm in arms:
                runs.append(
                    train(name, arm, seed, options.steps, train_set, test_set, options.output, bar)
                )
    print("\n" + table(runs))
    if options.seeds > 1:
        print(f"Means over {options.seeds} seeds, ± the standard deviation between them.")
    print("Train loss: mean of the last tenth of the steps.\n")

    plot(runs, options.output / "loss_curves.png")
    results = [dataclasses.asdict(run) for run in runs]
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"Wrote {options.output / 'loss_curves.png'} and {options.output / 'results.json'}")
    return runs


if __name__ == "__main__":
    main()
