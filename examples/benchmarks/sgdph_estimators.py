"""What each probe of SGD-PH is worth: its error against the exact Hessian diagonal.

    python examples/benchmarks/sgdph_estimators.py

Three networks in float64, at their initial weights and after 100 steps of
training: BatchNorm (the residual network of ``tasks.py`` at width 4, on
images), LayerNorm (a ViT of 2 layers, width 16, on images), RMSNorm (a Llama
of 2 layers, width 16, on the characters of BANKING77). One batch of 32. All
norm parameters are probed together, as in training; the full Hessian in them
comes from one product a channel.

Columns, over all scales or shifts of a network: ``off/diag``, Frobenius norm
of each tensor's own block off its diagonal over that of the diagonal; relative
error ``|estimate - diagonal| / |diagonal|`` of ``ones`` (one tensor at a time,
as the authors', and all together), of ``rademacher`` (rms over 64 single
probes; and of their running average with decay 0.9, rms over the last 32), of
``exact``; ``sign``, the share of entries whose sign the estimate has right
(ones one at a time, running average).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tasks import ResNet
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from hf_precond.architectures.modules import find_norms
from hf_precond.bench.tasks import fashion_mnist
from hf_precond.statistics.hessian_probe import DoubleBackward
from hf_precond.statistics.hessian_products import GraphProduct, diagonal_estimates, probe_vectors

DATA = Path(__file__).resolve().parents[1] / "data"
Loss = Callable[[Tensor], Tensor]
PROBES, DECAY = 64, 0.9


def batch_norm() -> tuple[nn.Module, Loss, int]:
    model, data = ResNet(width=4).double(), fashion_mnist(str(DATA))[0]
    pixels = data["pixel_values"].double()

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(pixels[rows]), data["labels"][rows])

    return model, loss, len(pixels)


def layer_norm() -> tuple[nn.Module, Loss, int]:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=28, patch_size=7, num_channels=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=10,
    )  # fmt: skip
    model, data = ViTForImageClassification(config).double(), fashion_mnist(str(DATA))[0]
    pixels = data["pixel_values"].double()

    def loss(rows: Tensor) -> Tensor:
        return model(pixel_values=pixels[rows], labels=data["labels"][rows]).loss

    return model, loss, len(pixels)


def rms_norm() -> tuple[nn.Module, Loss, int]:
    text = (DATA / "banking77" / "train.jsonl").read_text()
    characters = sorted(set(text))
    tokens = torch.tensor([characters.index(c) for c in text])
    tokens = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    config = LlamaConfig(
        vocab_size=len(characters), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=44, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    return model, lambda rows: model(input_ids=tokens[rows], labels=tokens[rows]).loss, len(tokens)


NETWORKS = {"BatchNorm": batch_norm, "LayerNorm": layer_norm, "RMSNorm": rms_norm}


def train(model: nn.Module, loss: Loss, rows: int, steps: int) -> None:
    """Plain training: SGD for BatchNorm, AdamW for the transformers."""
    convolutional = any(isinstance(m, nn.Conv2d) for m in model.modules())
    is_vit = isinstance(model, ViTForImageClassification)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if convolutional and not is_vit
        else torch.optim.AdamW(model.parameters(), lr=3e-3)
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(rows, (64,), generator=generator)).backward()
        optimizer.step()


def full_hessian(product: GraphProduct, parameters: Sequence[Tensor]) -> Tensor:
    """All rows, one product each."""
    sizes = [p.numel() for p in parameters]
    rows = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        vectors = [v.view(p.shape) for v, p in zip(unit.split(sizes), parameters, strict=True)]
        rows.append(torch.cat([hv.reshape(-1) for hv in product(vectors)]))
    return torch.stack(rows)


def estimates(product: GraphProduct, parameters: Sequence[Tensor], probe: str, step: int) -> Tensor:
    vectors = probe_vectors(parameters, probe, step)
    found = diagonal_estimates(product, probe, vectors)
    return torch.cat([estimate.reshape(-1) for estimate in found])


def measure(model: nn.Module, loss: Loss) -> list[tuple[str, list[float]]]:
    """A row of the table for the scales and one for the shifts."""
    norms = find_norms(model)
    parameters = [norm.parameter for norm in norms]
    switches = DoubleBackward(model)
    switches.acquire()
    product = GraphProduct(loss(torch.arange(32)), parameters)
    hessian = full_hessian(product, parameters)
    singles = [estimates(product, parameters, "rademacher", step) for step in range(PROBES)]
    together = estimates(product, parameters, "ones", 0)
    exact = estimates(product, parameters, "exact", 0)
    switches.release()
    averages, average = [], torch.zeros_like(exact)
    for count, single in enumerate(singles, 1):
        average = DECAY * average + (1 - DECAY) * single
        averages.append(average / (1 - DECAY**count))
    owner = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(parameters)])
    blocks = hessian * (owner[:, None] == owner)
    alone, diagonal = blocks.sum(1), hessian.diagonal()
    rows = []
    for kind in ("scale", "shift"):
        mine = torch.tensor([("bias" in n.attribute) == (kind == "shift") for n in norms])[owner]
        if not mine.any():
            continue
        scale = diagonal[mine].norm()

        def error(estimate: Tensor, mine: Tensor = mine, scale: Tensor = scale) -> float:
            return ((estimate - diagonal)[mine].norm() / scale).item()

        def rms(many: Sequence[Tensor], error: Callable[[Tensor], float] = error) -> float:
            return (sum(error(one) ** 2 for one in many) / len(many)) ** 0.5

        off = (blocks - torch.diag(diagonal))[mine].norm() / scale
        right = [
            (estimate.sign() == diagonal.sign())[mine].double().mean().item()
            for estimate in (alone, averages[-1])
        ]
        rows.append(
            (kind, [off.item(), error(alone), error(together), rms(singles),
                    rms(averages[PROBES // 2 :]), error(exact), *right])
        )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps between the rows")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(
        "| network | weights | tensors | off/diag | ones, alone | ones, together | rademacher, one "
        "| rademacher, averaged | exact | sign, ones | sign, averaged |"
    )
    print("|---" * 11 + "|")
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        model, loss, rows = build()
        for weights, steps in (("initial", 0), ("trained", options.steps)):
            train(model, loss, rows, steps)
            for kind, values in measure(model, loss):
                cells = [f"{value:.2g}" for value in values]
                print(f"| {name} | {weights} | {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
