"""What a training step costs under AFOpt, against fused AdamW, in time and in state.

    python examples/benchmarks/afopt_cost.py --scopes attention all_linear --pairs 20

A BERT of MiniLM's shapes (6 layers, width 384, 12 heads, MLP 1,536) on 32 x 128
tokens, one thread, random weights. Whole steps (forward, backward, clipping,
step) of AdamW and AFOpt alternate on two copies of the model; ``--pairs`` of
them are timed after AFOpt's first 20 steps, a whole number of refresh
intervals. Times are processor seconds of this process, which other processes
disturb less than the clock.
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


def minilm() -> nn.Module:
    """MiniLM-L6's shapes with 77 classes."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            num_labels=77,
        )
    )


def whole_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> tuple[float, float]:
    """Processor seconds of a whole step, and of ``optimizer.step()`` in it."""
    start = time.process_time()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    middle = time.process_time()
    optimizer.step()
    end = time.process_time()
    return end - start, end - middle


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    held = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def compare(scope: str, pairs: int, batch: Callable[[], dict[str, Tensor]]) -> None:
    """Print the ratios of one scope."""
    peer_model, model = minilm(), minilm()
    model.load_state_dict(copy.deepcopy(peer_model.state_dict()))
    peer = torch.optim.AdamW(peer_model.parameters(), lr=1e-4, fused=True)
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-4, scope=scope)
    small = {name: value[:1] for name, value in batch().items()}
    for _ in range(WARM):
        whole_step(model, optimizer, small)
    whole_step(peer_model, peer, small)
    times: dict[str, list[tuple[float, float]]] = {"adamw": [], "afopt": []}
    for _ in range(pairs):
        drawn = batch()
        times["adamw"].append(whole_step(peer_model, peer, drawn))
        times["afopt"].append(whole_step(model, optimizer, drawn))
    total = {name: sum(t for t, _ in found) / pairs for name, found in times.items()}
    own = {name: sum(t for _, t in found) / pairs for name, found in times.items()}
    middle = {name: statistics.median(t for t, _ in found) for name, found in times.items()}
    print(
        f"{scope}: whole step {total['adamw']:.3f} s under AdamW, {total['afopt']:.3f} s under "
        f"AFOpt, ratio {total['afopt'] / total['adamw']:.3f} (of medians "
        f"{middle['afopt'] / middle['adamw']:.3f}); step() alone {own['adamw']:.3f} and "
        f"{own['afopt']:.3f} s; state {state_size(optimizer) / state_size(peer):.3f}",
        flush=True,
    )
    optimizer.close()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scopes", nargs="+", default=["attention", "all_linear"])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def batch() -> dict[str, Tensor]:
        shape = (options.sequences, 128)
        return {
            "input_ids": torch.randint(30000, shape),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "labels": torch.randint(77, shape[:1]),
        }

    for scope in options.scopes:
        compare(scope, options.pairs, batch)


if __name__ == "__main__":
    main()
