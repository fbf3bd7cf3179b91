"""What two ranks save of a refresh: each computes its share and sends it to the other.

    python examples/benchmarks/ranks.py --shapes bert-base --rounds 5

Starts two processes of one thread each that talk over gloo. Both hold the same
BERT (``minilm``: width 384, 6 layers; ``bert-base``: width 768, ``--layers`` of
them), the same optimizer and the same second moments, and refresh all of its
preconditioners again and again, by turns sharing the work and each on its own
as if there were one rank. Both ways are timed in the same processes, so other
work on the machine slows both alike.

``cpu`` is the processor time of the refresh, sending and receiving included, of
the rank that takes longer; ``wall`` the time until it has all results. Medians
over the rounds; the ratio is that of two ranks to one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import BertConfig, BertForSequenceClassification

import hf_precond
from hf_precond.distributed import collectives
from hf_precond.linalg.matrix_functions import pack

SHAPES = {"minilm": (384, 6), "bert-base": (768, 12)}
NAMES = ("adamr", "afopt", "nkfac")


def bert(hidden: int, layers: int) -> torch.nn.Module:
    """A BERT of a small vocabulary: its embeddings have no preconditioner worth a refresh."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, intermediate_size=4 * hidden, max_position_embeddings=64,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def covariance(size: int) -> torch.Tensor:
    """A second moment with eigenvalues that fall as 1/i."""
    rows = torch.randn(2 * size, size) * torch.arange(1, size + 1).pow(-0.5)
    return rows.mT @ rows / len(rows)


class Timer:
    """Adds up the seconds spent in a function, of this process and on the clock."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def around(self, work: Callable) -> Callable:
        def timed(*args):
            cpu, wall = time.process_time(), time.perf_counter()
            result = work(*args)
            self.cpu += time.process_time() - cpu
            self.wall += time.perf_counter() - wall
            return result

        return timed


def adamr(model: torch.nn.Module, timer: Timer) -> Callable[[], None]:
    """Steps with every basis due; only their refreshes are timed."""
    fields = {"basis_interval": 1, "basis_tolerance": 0.0}
    optimizer = hf_precond.create_optimizer(model, "adamr", lr=1e-3, **fields)
    bases = optimizer.fallback.bases
    bases.refresh = timer.around(bases.refresh)

    def once() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    for _ in range(3):  # statistics only, the first bases, a regular refresh
        once()
    return once


def nkfac(model: torch.nn.Module, timer: Timer) -> Callable[[], None]:
    """A refresh of every inverse."""
    optimizer = hf_precond.create_optimizer(model, "nkfac", lr=1e-3)
    for bound in optimizer.bound:
        optimizer.allocate(bound)
        for factor in optimizer.factors(bound):
            state = optimizer.state[bound.weight]
            state[factor.name("factor")].copy_(covariance(factor.size))
            state[factor.name("updates")].fill_(1)
    return timer.around(optimizer.refresh)


def afopt(model: torch.nn.Module, timer: Timer) -> Callable[[], None]:
    """A refresh of every factor, in the scope of all linear layers."""
    optimizer = hf_precond.create_optimizer(model, "afopt", lr=1e-3, scope="all_linear")
    for bound in optimizer.bound:
        optimizer.allocate(bound)
    for moment in optimizer.plan.moments:
        held = moment.stored(optimizer.state)
        full = moment.read(optimizer.state)
        size = full.shape[-1]
        blocks = torch.stack([covariance(size) for _ in range(full.numel() // size**2)])
        held.copy_(pack(blocks.view_as(full)))
        moment.updates(optimizer.state).fill_(1)
    return timer.around(optimizer.refresh)


@contextmanager
def one_rank() -> Iterator[None]:
    """Inside, this process takes itself for the only one."""
    plain = collectives.world_size
    collectives.world_size = lambda: 1
    try:
        yield
    finally:
        collectives.world_size = plain


def compare(name: str, hidden: int, layers: int, rounds: int) -> list[tuple[float, ...]]:
    """Seconds of each round: processor and clock, alone and shared."""
    timer = Timer()
    once = globals()[name](bert(hidden, layers), timer)
    once()
    found = []
    for _ in range(rounds):
        times = []
        for shared in (False, True):
            dist.barrier()
            timer.cpu = timer.wall = 0.0
            if shared:
                once()
            else:
                with one_rank():
                    once()
            times += [timer.cpu, timer.wall]
        slowest = torch.tensor(times)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(tuple(slowest.tolist()))
    return found


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    """One rank."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for shapes in options.shapes:
        hidden, layers = SHAPES[shapes]
        for name in options.names:
            found = compare(name, hidden, options.layers or layers, options.rounds)
            if rank:
                continue
            columns = zip(*found, strict=True)
            one, one_wall, two, two_wall = (1e3 * statistics.median(column) for column in columns)
            ratios = sorted(round_[2] / round_[0] for round_ in found)
            print(
                f"{shapes:<10}{name:<7} cpu: one {one:8.1f} ms  two {two:8.1f} ms  "
                f"ratio {two / one:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})   "
                f"wall: {one_wall:8.1f} ms {two_wall:8.1f} ms {two_wall / one_wall:.2f}",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    """Read the command line and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--names", choices=NAMES, nargs="+", default=list(NAMES))
    parser.add_argument("--layers", type=int, default=0, help="0 for the model's own number")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, options), nprocs=2)


if __name__ == "__main__":
    main()
