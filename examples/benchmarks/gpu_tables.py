"""What is counted and predicted for a GPU, none being needed: launches, times and memory.

    python examples/benchmarks/gpu_tables.py                     # gpu.md's tables, some minutes
    python examples/benchmarks/gpu_tables.py --only predictions --device a100
    python examples/benchmarks/gpu_tables.py --only memory --models bert-base

Every optimizer's own code runs on a device that torch only pretends to have (``hf_precond.cost``).
The limits are those that the package aims at.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from hf_precond.bench import optimizers
from hf_precond.cost.devices import find_device
from hf_precond.cost.memory import MemoryCounter
from hf_precond.cost.prediction import Prediction, predict
from hf_precond.cost.trace import on_device, pretended_device, trace_training
from hf_precond.registry import create_optimizer

HALF = ("tf32", "bfloat16", "float16")
TOKENS = (4096, 16384, 65536)
LIMITS: dict[str, tuple[float | None, ...]] = {
    "afopt": (1.45, 1.12, 1.03),
    "afopt scope=attention": (1.15, 1.05, 1.02),
    "adamr": (1.60, 1.20, 1.05),
    "nkfac": (1.35, 1.10, 1.03),
    "sgdph": (1.10, None, None),
}
"""Largest ratios of a whole step to fused AdamW's on an H100."""
LAUNCHES: dict[str, tuple[float | None, float | None]] = {
    "afopt": (250, 350),
    "afopt scope=attention": (150, None),
    "adamr": (300, 600),
    "nkfac": (120, None),
    "sgdph": (60, None),
    "muon": (120, None),
}
"""Largest numbers of launches of a plain ``step()`` and of an average one; SGD-PH's over AdamW."""
ARMS = ["adamw", "torch_muon", "muon", "afopt", "afopt scope=attention", "adamr", "nkfac", "sgdph"]


def bert_base() -> nn.Module:
    """BERT-base with a classifier, 110 million weights."""
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=5))


def llama(width: int, layers: int, mlp: int, vocabulary: int = 32000) -> Callable[[], nn.Module]:
    """A Llama with heads of 64.

    Args:
        width: of its layers.
        layers: their number.
        mlp: width inside.
        vocabulary: its size.
    """

    def make() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
            intermediate_size=mlp, num_attention_heads=width // 64, max_position_embeddings=1024,
            num_key_value_heads=width // 64, tie_word_embeddings=width < 1024,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert-base": bert_base,
    "llama-124m": llama(768, 12, 2048),
    "llama-1b": llama(2048, 20, 5504),
    "tiny": llama(64, 1, 128, 64),
}


def made(arm: str) -> Callable[[nn.Module], Any]:
    """Makes an optimizer: a name of ``--optim`` or of the bench, and fields behind it.

    Args:
        arm: ``afopt scope=attention``, say.
    """
    name, *pairs = arm.split()
    fields: dict[str, Any] = {"lr": 1e-3, **dict(map(_field, pairs))}

    def make(model: nn.Module) -> Any:
        if name == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        if name in optimizers.CONTROLS:
            return optimizers.build(model, name, fields, 0)
        return create_optimizer(model, name, **fields)

    return make


def _field(pair: str) -> tuple[str, Any]:
    name, value = pair.split("=")
    if value.isdigit():
        return name, int(value)
    return name, float(value) if value.replace(".", "").isdigit() else value


def launches(model: str) -> None:
    """Print launches and the share of low precision, and the limits beside them.

    Args:
        model: a key of :data:`MODELS`.
    """
    print(f"Launches of step() on {model}, and the share of its operations in TF32, bfloat16 or")
    print(
        "float16; average: over statistics and refreshes at the default intervals. On the device:"
    )
    print("with copies, memsets and operations that take several kernels; plain, then average.\n")
    print("| optimizer | plain | limit | low precision | average | limit | on the device |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    fused = 0.0
    for arm in ARMS:
        with pretended_device(), torch.device("meta"):
            built = MODELS[model]()
        with pretended_device():
            on_device(built, torch.device("cuda", 0))
            training = trace_training(built, made(arm)(built), None)
        plain, average = training.plain, training.average
        fused = plain.launches if arm == "adamw" else fused
        limits = LAUNCHES.get(arm, (None, None))
        first = limits[0] if arm != "sgdph" or limits[0] is None else limits[0] + fused
        low = f"{plain.share(*HALF):.0%}" if plain.flops else "-"
        print(
            f"| {arm} | {plain.launches:.0f} | {_shown(first)} | {low} | {average.launches:.0f} | "
            f"{_shown(limits[1])} | {plain.started:.0f}, {average.started:.0f} |",
            flush=True,
        )


def predictions(model: str, device: str, tokens: list[int]) -> None:
    """Print the ratio of a whole training step to fused AdamW's, and the limits.

    Args:
        model: a key of :data:`MODELS`.
        device: as ``hf-precond explain --device`` takes it.
        tokens: a step.
    """
    found = find_device(device)
    print(f"Predicted, not measured: a whole training step over fused AdamW's, {model} on")
    print(f"{found.name}; in brackets the limit; then the tokens from which it is below 1.05.\n")
    head = " | ".join(f"{count:,} tokens" for count in tokens)
    print(f"| optimizer | {head} | below 1.05 from |")
    print("|---|" + "---:|" * (len(tokens) + 1))
    for arm in ARMS[1:]:
        prediction: Prediction = predict(MODELS[model], made(arm), found, tokens[0])
        limits = dict(zip(TOKENS, LIMITS.get(arm, ()), strict=False))
        cells = [_with_limit(prediction.ratio(count), limits.get(count)) for count in tokens]
        even = prediction.break_even()
        cells.append("never" if even is None else f"{even:,}")
        print(f"| {arm} | {' | '.join(cells)} |", flush=True)


def memory(names: list[str]) -> None:
    """Print the memory of the state, and the peak of ``step()`` above it.

    Args:
        names: keys of :data:`MODELS`.
    """
    print("State, its ratio to AdamW's, and the peak of step() above parameters, gradients and")
    print("state, in MiB; counted at the steps of a period.\n")
    print("| model | optimizer | state | over AdamW's | peak above it |")
    print("|---|---|---:|---:|---:|")
    for name in names:
        for arm in ARMS[2:]:
            with pretended_device(), torch.device("meta"):
                built = MODELS[name]()
            with pretended_device():
                on_device(built, torch.device("cuda", 0))
                counter = MemoryCounter("cuda")
                optimizer = made(arm)(built)
                trace_training(built, optimizer, None, counter=counter)
                state = counter.state_of(optimizer)
            adamw = 8 * sum(p.numel() for p in built.parameters())
            print(
                f"| {name} | {arm} | {state / 2**20:,.0f} | {state / adamw:.2f} | "
                f"{counter.peak / 2**20:,.0f} |",
                flush=True,
            )


def _shown(limit: float | None) -> str:
    return "" if limit is None else f"{limit:g}"


def _with_limit(ratio: float, limit: float | None) -> str:
    return f"{ratio:.2f}" if limit is None else f"{ratio:.2f} ({limit:.2f})"


def main(argv: list[str] | None = None) -> None:
    """Print the tables.

    Args:
        argv: arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--only", choices=["launches", "predictions", "memory"])
    parser.add_argument("--models", default="", help="of the tables, separated by commas")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    arguments = parser.parse_args(argv)
    names = arguments.models.split(",") if arguments.models else []
    tokens = [int(count) for count in arguments.tokens.split(",")]
    if arguments.only in (None, "launches"):
        launches(names[0] if names else "bert-base")
        print()
    if arguments.only in (None, "predictions"):
        predictions(names[0] if names else "bert-base", arguments.device, tokens)
        print()
    if arguments.only in (None, "memory"):
        memory(names or ["bert-base", "llama-124m", "llama-1b"])


if __name__ == "__main__":
    main()
