"""What a training step costs under AFOpt, against fused AdamW, in time and in state.

    python examples/benchmarks/afopt_cost.py --scopes attention all_linear --pairs 20

A BERT of MiniLM's shapes (6 layers, width 384, 12 heads, MLP 1,536) or BERT-base's
(``--model bert-base``) on 32 x 128 tokens, random weights. Whole steps (forward,
backward, clipping, step) of AdamW and AFOpt alternate on two copies of the
model; ``--pairs`` of them are timed after AFOpt's first 20 steps, a whole
number of refresh intervals. On a CPU, with one thread, times are processor
seconds of this process, which other processes disturb less than the clock; on
a GPU (``--device cuda``, ``--bf16`` for autocast) seconds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import hf_precond

WARM = 20


SHAPES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "bert-base": {},
}


def bert(name: str, device: torch.device) -> nn.Module:
    """A classifier of 77 classes of the shapes asked for."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=77, **SHAPES[name])).to(device)


def now(device: torch.device) -> float:
    """Seconds: the processor's, or on a GPU the clock's once it has nothing left to do."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def whole_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], bf16: bool
) -> tuple[float, float]:
    """Seconds of a whole step, and of ``optimizer.step()`` in it."""
    device = batch["labels"].device
    start = now(device)
    optimizer.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    middle = now(device)
    optimizer.step()
    end = now(device)
    return end - start, end - middle


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    held = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def compare(
    scope: str,
    make: Callable[[], nn.Module],
    draw: Callable[[], dict[str, Tensor]],
    pairs: int,
    bf16: bool,
) -> None:
    """Print the ratios of one scope."""
    peer_model, model = make(), make()
    model.load_state_dict(copy.deepcopy(peer_model.state_dict()))
    peer = torch.optim.AdamW(peer_model.parameters(), lr=1e-4, fused=True)
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-4, scope=scope)
    small = {name: value[:1] for name, value in draw().items()}
    for _ in range(WARM):
        whole_step(model, optimizer, small, bf16)
    whole_step(peer_model, peer, small, bf16)
    times: dict[str, list[tuple[float, float]]] = {"adamw": [], "afopt": []}
    for _ in range(pairs):
        drawn = draw()
        times["adamw"].append(whole_step(peer_model, peer, drawn, bf16))
        times["afopt"].append(whole_step(model, optimizer, drawn, bf16))
    total = {name: sum(t for t, _ in found) / pairs for name, found in times.items()}
    own = {name: sum(t for _, t in found) / pairs for name, found in times.items()}
    middle = {name: statistics.median(t for t, _ in found) for name, found in times.items()}
    print(
        f"{scope}: whole step {total['adamw']:.4f} s under AdamW, {total['afopt']:.4f} s under "
        f"AFOpt, ratio {total['afopt'] / total['adamw']:.3f} (of medians "
        f"{middle['afopt'] / middle['adamw']:.3f}); step() alone {own['adamw']:.4f} and "
        f"{own['afopt']:.4f} s; state {state_size(optimizer) / state_size(peer):.3f}",
        flush=True,
    )
    optimizer.close()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scopes", nargs="+", default=["attention", "all_linear"])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--model", choices=SHAPES, default="minilm")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    if options.device.type == "cpu":
        torch.set_num_threads(1)

    def make() -> nn.Module:
        return bert(options.model, options.device)

    def draw() -> dict[str, Tensor]:
        shape = (options.sequences, 128)
        batch = {
            "input_ids": torch.randint(30000, shape),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "labels": torch.randint(77, shape[:1]),
        }
        return {name: value.to(options.device) for name, value in batch.items()}

    for scope in options.scopes:
        compare(scope, make, draw, options.pairs, options.bf16)


if __name__ == "__main__":
    main()
