"""What NKFAC costs: statistics, refreshes, its step, and a whole training step beside AdamW's.

    python examples/benchmarks/nkfac_step_time.py --network minilm --rounds 3
    python examples/benchmarks/nkfac_step_time.py --solvers

Networks: ``conv``, the 3 x 3 convolutions of a ResNet-18 for 32 x 32 images in
a row, 16 images; ``mlp``, the MLP blocks (512, 2,048) of a 6-layer transformer,
2,048 tokens; ``minilm``, a BERT of MiniLM-L6's shapes (width 384, MLP 1,536),
32 x 128 tokens. All optimizers train copies of one model and take turns.

A round is four steps, one with statistics and a refresh, one with statistics,
two with neither; the differences of their medians are what statistics and a
refresh cost. The refreshes are those of the Newton phase (after the first
three, which are exact). ``amortised`` charges statistics and refresh at the
default intervals.

On a CPU times are processor seconds of this process on one thread, which other
processes disturb less than the clock; on a GPU (``--device cuda``) seconds
between synchronisations.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import hf_precond
from hf_precond.optimizers.nkfac.factors import invert

PERIOD = 4
WARM = 3 * PERIOD
Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(eq=False)
class Network:
    """A model and its loss on a batch of fixed size; ``small`` is for warming up."""

    model: nn.Module
    loss: Callable[[nn.Module, bool], Tensor]


def conv(device: torch.device) -> Network:
    """The 3 x 3 convolutions of a ResNet-18, without its shortcuts."""
    torch.manual_seed(0)
    widths = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
    layers: list[nn.Module] = []
    before = 3
    for index, width in enumerate(widths):
        stride = 2 if index in (5, 9, 13) else 1
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()]
        before = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100)]
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(100, (16,))
    images, labels = images.to(device), labels.to(device)

    def loss(model: nn.Module, small: bool) -> Tensor:
        size = 4 if small else 16
        return nn.functional.cross_entropy(model(images[:size]), labels[:size])

    return Network(nn.Sequential(*layers).to(device), loss)


def mlp(device: torch.device) -> Network:
    """The MLP blocks of a 6-layer transformer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)]
    tokens, targets = torch.randn(2, 16, 128, 512).to(device)

    def loss(model: nn.Module, small: bool) -> Tensor:
        size = 2 if small else 16
        return nn.functional.mse_loss(model(tokens[:size]), targets[:size])

    return Network(nn.Sequential(*layers).to(device), loss)


def minilm(device: torch.device) -> Network:
    """MiniLM-L6's shapes with 77 classes."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=77,
    )
    batch = {
        "input_ids": torch.randint(1000, 30000, (32, 128)).to(device),
        "labels": torch.randint(77, (32,)).to(device),
    }

    def loss(model: nn.Module, small: bool) -> Tensor:
        size = 4 if small else 32
        return model(**{name: value[:size] for name, value in batch.items()}).loss

    return Network(BertForSequenceClassification(config).to(device), loss)


NETWORKS = {"conv": conv, "mlp": mlp, "minilm": minilm}


@dataclass
class Times:
    """Seconds of forward and backward, and of ``step()``, by kind of step."""

    passes: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, passes: float, step: float) -> None:
        """One more step."""
        self.passes.setdefault(kind, []).append(passes)
        self.steps.setdefault(kind, []).append(step)

    def medians(self) -> dict[str, float]:
        """What a step, its statistics and its refresh cost."""
        passes = {kind: statistics.median(seconds) for kind, seconds in self.passes.items()}
        steps = {kind: statistics.median(seconds) for kind, seconds in self.steps.items()}
        collected = passes["statistics"] - passes["plain"] + steps["statistics"] - steps["plain"]
        return {
            "passes": passes["plain"],
            "step": steps["plain"],
            "statistics": collected,
            "refresh": steps["refresh"] - steps["statistics"],
        }


def now(device: torch.device) -> float:
    """Processor seconds; on a GPU seconds, with nothing left to be done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def kind_of(step: int) -> str:
    """What falls on a step, with statistics every second and a refresh every fourth."""
    if step % PERIOD == 0:
        return "refresh"
    return "statistics" if step % 2 == 0 else "plain"


def measure(
    network: Network, make: Mapping[str, Make], rounds: int, device: torch.device
) -> dict[str, Times]:
    """Times of several optimizers that take turns, each on a copy of the model."""
    models = {name: copy.deepcopy(network.model) for name in make}
    optimizers = {name: build(models[name]) for name, build in make.items()}
    times = {name: Times() for name in make}
    for step in range(WARM + rounds * PERIOD):
        warming = step < WARM
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            start = now(device)
            network.loss(models[name], warming).backward()
            middle = now(device)
            optimizer.step()
            end = now(device)
            if not warming:
                times[name].add(kind_of(step), middle - start, end - middle)
    return times


def optimizers(fields: Mapping[str, str]) -> dict[str, Make]:
    """NKFAC, with SGD and with AdamW under it, and AdamW."""

    def nkfac(base: str) -> Make:
        config = hf_precond.NKFACConfig.from_strings({"base": base} | dict(fields)).replace(
            stat_interval=2, inverse_interval=PERIOD
        )
        return lambda model: hf_precond.create_optimizer(model, config)

    return {
        "nkfac, sgd": nkfac("sgd"),
        "nkfac, adamw": nkfac("adamw"),
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    }


def report(times: Mapping[str, Times]) -> None:
    """A line for each optimizer."""
    names = ("passes", "step", "statistics", "refresh", "amortised")
    print(f"{'milliseconds':<14}" + "".join(f"{name:>12}" for name in names))
    default = hf_precond.NKFACConfig()
    for optimizer, found in times.items():
        values = found.medians()
        values["amortised"] = (
            values["passes"]
            + values["step"]
            + values["statistics"] / default.stat_interval
            + values["refresh"] / default.inverse_interval
        )
        print(f"{optimizer:<14}" + "".join(f"{1e3 * values[name]:12.1f}" for name in names))


def solvers(device: torch.device) -> None:
    """A factor's refresh by Newton's step and exactly, per size and batch."""
    print(f"{'size':>6}{'batch':>6}{'newton ms':>12}{'exact ms':>12}")
    for size in (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096):
        for count in (1, 12):
            if count * size**2 > 2**26 or (device.type == "cpu" and count * size**2 > 2**24):
                continue
            rows = torch.randn(count, size, 2 * size, device=device)
            matrices = rows @ rows.mT / size + 0.1 * torch.eye(size, device=device)
            previous = torch.linalg.inv(matrices)
            seconds = []
            for newton_steps in (1, 0):
                found = []
                for _ in range(4):
                    start = now(device)
                    invert(matrices, previous, newton_steps, 0.01, lambda name, by: None)
                    found.append(now(device) - start)
                seconds.append(min(found))
            print(f"{size:>6}{count:>6}" + "".join(f"{1e3 * s:12.2f}" for s in seconds))


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="minilm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--solvers", action="store_true", help="time the solvers instead")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of NKFAC")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    if options.solvers:
        solvers(device)
        return
    fields = dict(text.split("=", 1) for text in options.set)
    network = NETWORKS[options.network](device)
    report(measure(network, optimizers(fields), options.rounds, device))


if __name__ == "__main__":
    main()
