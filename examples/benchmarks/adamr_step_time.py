"""Cost of AdamR's step: the optimizer alone, and a whole training step against fused AdamW.

    python examples/benchmarks/adamr_step_time.py step
    python examples/benchmarks/adamr_step_time.py training --tokens 1024 2048 4096

``step`` times the optimizers alone, on matrices of the shapes of a BERT-base and a ViT-S layer
(``--copies 12``: of all layers) and random gradients, of each step the least of ``--repeats`` equal
runs, which leaves out what else the machine did; ``training`` forward, backward and step of a
BERT with the shapes of MiniLM-L6 (hidden size 384, 6 layers, 30,522 tokens); both optimizers step
their own copy of the model with the same gradients, so the two ratios share their forward and
backward passes. Times are CPU time of the process where ``--clock cpu`` (other work on the machine
does not count), or wall time.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import hf_precond

SHAPES = {
    "vit-s": [(384, 384)] * 4 + [(1536, 384), (384, 1536)],
    "bert-base": [(768, 768)] * 4 + [(3072, 768), (768, 3072)],
}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def summary(times):
    """Mean, median and 95th percentile, in milliseconds."""
    ordered = sorted(times)
    late = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return statistics.mean(times) * 1e3, statistics.median(times) * 1e3, late * 1e3


def time_step(shapes, steps, clock, device, **fields):
    """Seconds of each optimizer step, after the first refreshes."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes).to(device)
    optimizer = hf_precond.create_optimizer(model, "adamr", **fields)
    warm = optimizer.config.basis_interval + 2
    times = []
    for step in range(warm + steps):
        for layer in model:
            layer.weight.grad = torch.randn_like(layer.weight)
        before = now(clock, device)
        optimizer.step()
        if step >= warm:
            times.append(now(clock, device) - before)
    return times


def now(clock, device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return CLOCKS[clock]()


def bert(hidden, layers, vocabulary=30522):
    """A masked language model's encoder with the shapes asked for, and no dropout."""
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, intermediate_size=4 * hidden,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def time_training(tokens, steps, clock, device, hidden, layers, length, **fields):
    """Seconds of the passes, of AdamR's steps and of fused AdamW's, a list each."""
    torch.manual_seed(0)
    model = bert(hidden, layers).to(device)
    twin = copy.deepcopy(model)
    ours = hf_precond.create_optimizer(model, "adamr", **fields)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-3, fused=True)
    warm = ours.config.basis_interval + 2
    passes, rotated, plain = [], [], []
    for step in range(warm + steps):
        # The steps up to the first regular refresh only warm up: a short batch does for them.
        count = length if step < warm else tokens
        inputs = torch.randint(1000, 30000, (max(1, count // length), length), device=device)
        start = now(clock, device)
        model.zero_grad()
        model(input_ids=inputs).last_hidden_state.square().mean().backward()
        done = now(clock, device)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            b.grad = None if a.grad is None else a.grad.clone()
        middle = now(clock, device)
        ours.step()
        stepped = now(clock, device)
        theirs.step()
        end = now(clock, device)
        if step >= warm:
            passes.append(done - start)
            rotated.append(stepped - middle)
            plain.append(end - stepped)
    return passes, rotated, plain


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["step", "training"])
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--copies", type=int, default=1, help="layers that `step` steps")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1, help="equal runs of `step`")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optim-args", default="", help="fields of AdamR: key=value,…")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs = dict(pair.split("=") for pair in args.optim_args.split(",") if pair)
    fields = hf_precond.AdamRConfig.parse(pairs)
    if args.what == "step":
        for name in args.shapes:
            shapes = SHAPES[name] * args.copies
            runs = [
                time_step(shapes, args.steps, args.clock, args.device, **fields)
                for _ in range(args.repeats)
            ]
            mean, median, late = summary([min(times) for times in zip(*runs, strict=True)])
            print(
                f"{name:<10} mean {mean:8.1f} ms  median {median:8.1f} ms  "
                f"p95 / median {late / median:.2f}"
            )
        return
    for tokens in args.tokens:
        passes, rotated, plain = (
            statistics.mean(times)
            for times in time_training(
                tokens, args.steps, args.clock, args.device, args.hidden, args.layers,
                args.length, **fields,
            )
        )  # fmt: skip
        ratio = (passes + rotated) / (passes + plain)
        print(
            f"{tokens:>6} tokens  passes {passes * 1e3:8.0f} ms  adamr {rotated * 1e3:7.0f} ms  "
            f"fused adamw {plain * 1e3:6.0f} ms  whole step {ratio:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
