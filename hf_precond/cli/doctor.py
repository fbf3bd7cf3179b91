"""``hf-precond doctor``: what is installed, and what works here with each optimizer."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from hf_precond.cli.text import table, terminal_width, without_logs, wrapped
from hf_precond.config.hub import version

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "wrapt")
EXAMPLES = """examples:
  hf-precond doctor
  hf-precond doctor --optim afopt

Every `yes` was tried just now, on a tiny model: one or two steps each, and
twenty that must lower the loss. Without a GPU, compile is tried with the
backend aot_eager. The exit code is 0 if the twenty steps of every optimizer
lowered the loss, 1 if not."""
STEPS = 20


class Unavailable(Exception):
    """Something that this machine or installation does not have."""


def add_command(commands: Any) -> None:
    """Add the command to the parser of ``hf-precond``.

    Args:
        commands: the parser's subparsers.
    """
    parser = commands.add_parser(
        "doctor",
        help="versions, devices, and what works here with each optimizer",
        description=wrapped(
            "Show versions and devices, and try each optimizer: bf16, fp16, compile, "
            "flash attention, FSDP2, and a training of twenty steps."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--optim", metavar="NAME", help="one optimizer, not all")
    parser.set_defaults(act=doctor_command)


def doctor_command(arguments: argparse.Namespace) -> int:
    """Print versions and devices, and what was tried.

    Args:
        arguments: ``optim``.

    Returns:
        0; 1 when a training fails or does not lower the loss; 2 for an unknown name, or a
        transformers that does not take the names.
    """
    from hf_precond.integrations.registration import register
    from hf_precond.registry import get_info, list_optimizers

    names = [arguments.optim] if arguments.optim else list_optimizers()
    try:
        for name in names:
            get_info(name)
        register()
    except (ValueError, RuntimeError) as error:
        print(f"hf_precond: {error}", file=sys.stderr)
        return 2
    for line in (*versions(), *devices()):
        print(line)
    print(flush=True)
    rows: list[list[str]] = [["", *TRIALS]]
    notes: dict[str, str] = {}
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        for name in names:
            cells = [_tried(trial, name, folder, notes) for trial in TRIALS.values()]
            rows.append([name, *cells])
    print(table(rows, terminal_width()))
    if notes:
        print()
    for note, mark in notes.items():
        print(textwrap.fill(f"[{mark}] {note}", terminal_width(), subsequent_indent="    "))
    failed = [row[0] for row in rows[1:] if not row[-1].startswith("yes")]
    print("\nAll is well." if not failed else f"\nDo not train with {', '.join(failed)} here.")
    return 1 if failed else 0


def versions() -> list[str]:
    """The versions of Python, this package, and what it needs; one a line."""
    lines = [f"{'python':<14}{platform.python_version()}", f"{'hf_precond':<14}{version()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name:<14}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name:<14}not installed")
    return lines


def devices() -> list[str]:
    """The processor and every GPU; one a line."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"{'cpu':<14}{cores} cores, threads of torch: {torch.get_num_threads()}"]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        lines.append(f"{f'cuda:{index}':<14}{found.name}, {found.total_memory / 2**30:.0f} GiB")
    return lines if len(lines) > 1 else [*lines, f"{'gpu':<14}none that torch can use"]


# Trials ------------------------------------------------------------------------------------------


def _tried(trial: Callable[[str, str], str], name: str, folder: str, notes: dict[str, str]) -> str:
    """``yes``, ``no`` or ``-`` (not available here), with the number of a note."""
    try:
        return f"yes{trial(name, folder)}"
    except Unavailable as reason:
        word, text = "-", str(reason)
    except Exception as error:  # whatever fails is the answer
        text = " ".join(str(error).split()) or type(error).__name__
        word, text = "no", text if len(text) <= 240 else f"{text[:240]}…"
    mark = notes.setdefault(text, str(len(notes) + 1))
    return f"{word} [{mark}]"


def _bf16(name: str, folder: str) -> str:
    import torch

    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise Unavailable("bf16: this GPU computes no bfloat16.")
    _train(name, folder, steps=2, bf16=True)
    return ""


def _fp16(name: str, folder: str) -> str:
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("fp16: the Trainer's fp16 needs a GPU.")
    _train(name, folder, steps=2, fp16=True)
    return ""


def _compile(name: str, folder: str) -> str:
    # Without a GPU no code is generated: that may need a compiler, and takes a minute.
    import torch

    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    _train(name, folder, steps=2, torch_compile=True, torch_compile_backend=backend)
    torch._dynamo.reset()
    return ""


def _flash(name: str, folder: str) -> str:
    import torch
    from transformers.utils import is_flash_attn_2_available

    if not torch.cuda.is_available():
        raise Unavailable("flash attention: it needs a GPU.")
    if not is_flash_attn_2_available():
        raise Unavailable("flash attention: the package flash_attn is not installed.")
    _train(name, folder, steps=2, bf16=True, attention="flash_attention_2")
    return ""


def _fsdp2(name: str, folder: str) -> str:
    import torch
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    from hf_precond.registry import create_optimizer

    if distributed.is_initialized():
        raise Unavailable("FSDP2: a process group is open already.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = os.path.join(folder, f"store-{name}")
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    try:
        mesh = distributed.init_device_mesh(device, (1,))
        model = _model().to(device)
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = create_optimizer(model, name)
        batch = {key: value.to(device) for key, value in _batch().items()}
        for _ in range(2):
            optimizer.zero_grad()
            with getattr(optimizer, "curvature_context", contextlib.nullcontext)():
                loss = model(**batch).loss
                getattr(optimizer, "probe", lambda loss: None)(loss)
                loss.backward()
            optimizer.step()
        _require_finite([float(loss)])
        optimizer.close()
    finally:
        distributed.destroy_process_group()
    return ""


def _smoke(name: str, folder: str) -> str:
    losses = _train(name, folder, steps=STEPS, learning_rate=1e-2)
    if not sum(losses[-5:]) < sum(losses[:5]):
        raise RuntimeError(
            f"{STEPS} steps: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}; please report "
            "this output."
        )
    return f" {losses[0]:.2f} > {losses[-1]:.2f}"


TRIALS: dict[str, Callable[[str, str], str]] = {
    "bf16": _bf16,
    "fp16": _fp16,
    "compile": _compile,
    "flash": _flash,
    "FSDP2": _fsdp2,
    f"{STEPS} steps": _smoke,
}


def _model(attention: str | None = None) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32, id2label=dict(enumerate("abcd")),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    if attention is not None:
        config._attn_implementation = attention
    return BertForSequenceClassification(config)


def _batch(size: int = 16) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (size, 16), generator=generator)
    return {"input_ids": tokens, "labels": tokens[:, 0] % 4}


def _train(
    name: str, folder: str, steps: int, attention: str | None = None, **fields: Any
) -> list[float]:
    """The losses of a short training with the stock Trainer, every one finite."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    batch = _batch(64)
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    own: dict[str, Any] = {"learning_rate": 1e-3, "use_cpu": not torch.cuda.is_available()}
    args = TrainingArguments(
        folder, optim=name, max_steps=steps, per_device_train_batch_size=16, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        **own | fields,
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # the first GPU alone
    model = _model(attention)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    _require_finite(losses)
    after = list(model.parameters())
    if all(torch.equal(a.cpu(), b.detach().cpu()) for a, b in zip(before, after, strict=True)):
        raise RuntimeError("no weight moved.")
    return losses


def _require_finite(losses: list[float]) -> None:
    if not losses or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"the loss is not finite: {losses}.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of other packages about a model of two layers."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), without_logs():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
