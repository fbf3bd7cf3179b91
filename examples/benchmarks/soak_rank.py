"""One rank of ``soak.py``: trains, and resumes from what a killed process left.

Environment: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, as torchrun sets them.
Into its folder it writes ``step`` (of rank 0), ``memoryR.jsonl`` (rank, first step of the process,
step, MiB) and at the end ``resultR.json``; the checkpoints are in ``run``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
from pathlib import Path

import torch
from transformers import BertConfig, TrainerCallback, TrainingArguments
from transformers import BertForSequenceClassification as Model

from hf_precond import PrecondTrainer
from hf_precond.integrations.trainer import last_checkpoint

CLASSES = 8
LENGTH, WIDTH = 8, 32
BATCH = 8
ARMS = {
    "afopt": ("scope=all_linear", 2e-3),
    "adamr": ("", 4e-3),
    "nkfac": ("inverse_interval=20", 2e-3),
    "muon": ("variant=normuon", 2e-3),
    "sgdph": ("", 2e-3),
}
"""Fields and learning rate of each optimizer; all others are the defaults."""


def samples(count: int, seed: int, bad: int = 0):
    """Sequences of vectors, one of 8 patterns in noise, and labels; ``bad`` of them not finite."""
    patterns = torch.randn(CLASSES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    vectors = torch.randn(count, LENGTH, WIDTH, generator=generator) + 0.2 * patterns[labels]
    kinds = (float("nan"), float("inf"), float("-inf"))
    for number, index in enumerate(torch.randperm(count, generator=generator)[:bad].tolist()):
        vectors[index, number % LENGTH, number % WIDTH] = kinds[number % 3]
    return [
        {"inputs_embeds": x, "labels": y} for x, y in zip(vectors, labels.tolist(), strict=True)
    ]


def memory() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def skipped(history: list[dict]) -> float:
    """Steps left out, over all processes: each counts from 0, and the history is saved."""
    logs = [entry for entry in history if "loss" in entry]
    counts = [0.0, *(entry.get("optim_skipped_steps", 0.0) for entry in logs)]
    return sum(new - old if new >= old else new for old, new in itertools.pairwise(counts))


def train(options: argparse.Namespace) -> None:
    """Train as one rank, resuming where there is something to resume from."""
    folder, rank = Path(options.folder), int(os.environ["RANK"])

    class Watch(TrainerCallback):
        """Tells the parent the step, and notes the memory."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.first = state.global_step

        def on_step_end(self, args, state, control, **kwargs):
            step = state.global_step
            if rank == 0:
                (folder / "step").write_text(str(step))
            if (step - self.first) % 50 == 0 or step == options.steps:
                line = json.dumps([rank, self.first, step, memory()])
                with (folder / f"memory{rank}.jsonl").open("a") as file:
                    file.write(line + "\n")

    torch.set_num_threads(1)
    optim_args, lr = ARMS[options.optim]
    arguments = TrainingArguments(
        str(folder / "run"),
        optim=options.optim,
        optim_args=",".join(filter(None, (optim_args, "skip_nonfinite=true"))),
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=250,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        logging_steps=20,
        use_cpu=True,
        ddp_backend="gloo",
        average_tokens_across_devices=False,
        disable_tqdm=True,
        report_to=[],
        seed=options.seed,
    )
    torch.manual_seed(options.seed)
    config = BertConfig(
        vocab_size=4, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=LENGTH, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    count = options.steps * BATCH * int(os.environ["WORLD_SIZE"])
    data = samples(count, 1, options.bad)
    trainer = PrecondTrainer(Model(config), arguments, train_dataset=data)
    trainer.add_callback(Watch())
    trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir) is not None)
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    test = trainer.evaluate(samples(2000, 2))
    result = {
        "losses": [[e["step"], e["loss"]] for e in trainer.state.log_history if "loss" in e],
        "test_loss": test["eval_loss"],
        "skipped": skipped(trainer.state.log_history),
        "digest": digest.hexdigest(),
    }
    (folder / f"result{rank}.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--optim", choices=list(ARMS), required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--bad", type=int, default=0, help="samples that are not finite")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
