"""What a training step with SGD-PH costs, beside its base (AdamW or SGD) and the authors' way.

    python examples/benchmarks/sgdph_cost.py --base adamw --rounds 5
    python examples/benchmarks/sgdph_cost.py --base sgd --rounds 5

MiniLM's shapes (6 layers, width 384, 12 heads, MLP 1536, 77 classes), random
weights, 32 x 128 = 4,096 tokens a step, dropout 0.1, one thread. Each round
runs, one after another, a whole step (forward, backward, optimizer) of: torch's
fused AdamW (SGD); SGD-PH on a step without a probe; SGD-PH on a step with one;
the authors' way, which keeps the graph of the whole backward pass at every
step (``backward(create_graph=True)``), differentiates the gradient of one
one-dimensional tensor, here the middle one, by it and all later parameters, and
needs attention by the MATH kernel at every step. Order rotates from round to round.

Time is the processor time of the process, which other processes disturb less
than the clock; the clock is printed too. The figure for an interval of 20 is
(19 plain + 1 probed) / 20 of SGD-PH over the base, medians over rounds of
the ratios inside a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification

from hf_precond import SGDPHConfig, create_optimizer
from hf_precond.architectures.groups import parameter_groups

Step = Callable[[], None]


def model_of(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536,
        num_labels=77,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def plain_optimizer(model: nn.Module, base: str) -> torch.optim.Optimizer:
    groups = parameter_groups(model, SGDPHConfig(lr=1e-5, weight_decay=0.01))
    if base == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, momentum=0.9, fused=True)


def base_step(model: nn.Module, batch: dict[str, torch.Tensor], base: str) -> Step:
    optimizer = plain_optimizer(model, base)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(model: nn.Module, batch: dict[str, torch.Tensor], base: str) -> Step:
    """Steps with and without a probe in turn, the first with one."""
    optimizer = create_optimizer(
        model, "sgdph", base=base, lr=1e-5, weight_decay=0.01, probe_interval=2
    )

    def step() -> None:
        with optimizer.curvature_context():
            loss = model(**batch).loss
            optimizer.probe(loss)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def authors_step(model: nn.Module, batch: dict[str, torch.Tensor], base: str) -> Step:
    optimizer = plain_optimizer(model, base)
    parameters = list(model.parameters())
    vectors = [number for number, p in enumerate(parameters) if p.dim() == 1]
    later = parameters[vectors[len(vectors) // 2] :]

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            model(**batch).loss.backward(create_graph=True)
            torch.autograd.grad(
                [p.grad for p in later],
                later,
                grad_outputs=[torch.ones_like(later[0])] + [torch.zeros_like(p) for p in later[1:]],
                retain_graph=True,
            )
        for parameter in model.parameters():
            parameter.grad = parameter.grad.detach()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", choices=("adamw", "sgd"), default="adamw")
    add("--rounds", type=int, default=5)
    add("--rows", type=int, default=32)
    add("--length", type=int, default=128)
    add("--layers", type=int, default=6)
    add("--interval", type=int, default=20)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.length)
    batch = {
        "input_ids": torch.randint(30000, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(77, (options.rows,), generator=generator),
    }
    ours = our_step(model_of(options.layers), batch, options.base)
    arms: list[tuple[str, list[str], Step]] = [
        ("base", ["base"], base_step(model_of(options.layers), batch, options.base)),
        ("ours", ["probed", "plain"], ours),
        ("authors", ["authors"], authors_step(model_of(options.layers), batch, options.base)),
    ]
    times: dict[str, list[float]] = {"base": [], "plain": [], "probed": [], "authors": []}
    clocks: dict[str, list[float]] = {name: [] for name in times}
    for number in range(options.rounds + 1):
        for place in range(len(arms)):
            _, names, step = arms[(place + number) % len(arms)]
            for name in names:
                clock, used = time.perf_counter(), time.process_time()
                step()
                if number > 0:  # the first round allocates
                    times[name].append(time.process_time() - used)
                    clocks[name].append(time.perf_counter() - clock)
        print(f"round {number}", {k: round(v[-1], 2) for k, v in times.items() if v}, flush=True)
    for name, values in times.items():
        print(
            f"{name:<8} processor {statistics.median(values):8.3f} s   "
            f"clock {statistics.median(clocks[name]):8.3f} s"
        )
    for label, held in (("processor", times), ("clock", clocks)):
        average = [
            ((options.interval - 1) * plain + probed) / options.interval
            for plain, probed in zip(held["plain"], held["probed"], strict=True)
        ]
        over_base = [a / b for a, b in zip(average, held["base"], strict=True)]
        over_authors = [a / b for a, b in zip(average, held["authors"], strict=True)]
        probed = [a / b for a, b in zip(held["probed"], held["base"], strict=True)]
        plain = [a / b for a, b in zip(held["plain"], held["base"], strict=True)]
        print(
            f"by {label} time, interval {options.interval}: over the base "
            f"{statistics.median(over_base):.3f} (without a probe {statistics.median(plain):.3f}, "
            f"with one {statistics.median(probed):.2f}); over the authors' way "
            f"{statistics.median(over_authors):.2f}"
        )


if __name__ == "__main__":
    main()
