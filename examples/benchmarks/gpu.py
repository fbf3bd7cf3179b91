"""The suite for whoever has a GPU: correctness, cost and convergence, within a time limit.

    python examples/benchmarks/gpu.py --out outputs/gpu --limit 900
    python examples/benchmarks/gpu.py --out outputs/gpu --limit 900     # goes on where it stopped
    python examples/benchmarks/gpu.py --only cost --models bert-base --tokens 4096,32768
    python examples/benchmarks/gpu.py --only predictions --out outputs/gpu     # on CPUs too
    python examples/benchmarks/gpu.py --device cpu --tiny --out outputs/try     # without a GPU

``results.json`` has the card, the versions and what was measured; it is rewritten after every
part, so a run that is cut off loses one part at most.

- correctness: ``pytest -m gpu tests/gpu``, the failures by name.
- cost: every arm trains the same model on the same batches (bfloat16 autocast on a GPU). Arms take
  turns in blocks of steps, timed between two synchronisations, so that a drift of the clock falls
  on all. ``ratio`` is the median of an arm's blocks over fused AdamW's. Apart from that, the passes
  and ``step()`` one by one: milliseconds until the device is done, and until the host is (``host``:
  where the two are equal, the host is the limit). Kernels of both by torch's profiler: ``plain`` is
  the median of the profiled steps, as those with refreshes have several times as many.
- convergence: ``hf-precond bench gpu.toml``, which goes on by itself too; curves in ``loss.png``.
- predictions: what ``hf-precond explain --device`` says of each ratio, where it knows the card:
  with a fast host, then with one that takes as long for a launch as this one in AdamW's passes.
  Without a GPU this takes torch's build for CPUs.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_precond
from hf_precond.cost.batches import make_batch
from hf_precond.cost.devices import DEVICES
from hf_precond.cost.memory import MemoryCounter
from hf_precond.cost.prediction import predict

sys.path.insert(0, str(Path(__file__).parent))
import gpu_tables

HERE = Path(__file__).parent
PARTS = ("correctness", "cost", "convergence", "predictions")
ARMS = (
    "adamw", "torch_muon", "muon", "afopt", "afopt scope=attention", "afopt precision=highest",
    "adamr", "nkfac", "sgdph",
)  # fmt: skip
WARM, SPAN, BLOCKS = 22, 20, 3
"""Steps before an arm is timed, AFOpt's first refreshes among them; steps of a block: whole refresh
intervals; blocks of an arm."""
LARGEST = 15
"""Kernels of an arm that are listed by name."""
STEP = "the optimizer's step"
LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace: calls that launch something, and what the device did."""


class Suite:
    """What is done, and where it is kept.

    Args:
        arguments: of the command.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.end = time.monotonic() + arguments.limit
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "results.json"
        only_predictions = arguments.only == "predictions"
        self.results: dict[str, Any] = {} if only_predictions else {"about": self.about()}
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if not only_predictions and before["about"] != self.results["about"]:
                raise SystemExit(
                    f"gpu.py: {self.path} is of another card or other versions; give another --out."
                )
            self.results = before

    def about(self) -> dict[str, Any]:
        """The card and the versions."""
        on_gpu = self.device.type == "cuda"
        return {
            "card": torch.cuda.get_device_name(self.device) if on_gpu else platform.processor(),
            "capability": list(torch.cuda.get_device_capability(self.device)) if on_gpu else None,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_precond": hf_precond.__version__,
            "python": platform.python_version(),
            "tiny": self.arguments.tiny,
        }

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.end - time.monotonic()

    def save(self, *keys: str, value: Any) -> None:
        """Put a result into the file.

        Args:
            *keys: where.
            value: what.
        """
        place = self.results
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(partial, self.path)

    def run(self) -> bool:
        """Do what is missing; whether all of it is there at the end."""
        done = True
        for part in self.arguments.only.split(","):
            if self.left < 10:
                print(f"{part}: no time is left; the same command goes on from here", flush=True)
                return False
            done &= getattr(self, part)()
        return done

    # Parts ------------------------------------------------------------------------

    def correctness(self) -> bool:
        """The tests that need a GPU."""
        if "correctness" in self.results:
            return True
        root = HERE.parents[1]
        words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        words += ["-rfE", "--maxfail", "30", "tests/gpu"]
        words += ["--collect-only"] * self.arguments.tiny
        try:
            found = subprocess.run(
                words, cwd=root, capture_output=True, text=True, timeout=max(10, self.left)
            )
        except subprocess.TimeoutExpired:
            print("correctness: the tests did not end within the limit", flush=True)
            return False
        (self.out / "correctness.log").write_text(found.stdout + found.stderr)
        lines = found.stdout.strip().splitlines() or [""]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        # 5: nothing was selected, as without a GPU.
        good = found.returncode in (0, 5)
        self.save("correctness", value={"passed": good, "summary": lines[-1], "failed": failed})
        print(f"correctness: {lines[-1]}", flush=True)
        return True

    def cost(self) -> bool:
        """Milliseconds, memory and launches of whole training steps."""
        models = ["tiny"] if self.arguments.tiny else self.arguments.models.split(",")
        counts = [64] if self.arguments.tiny else map(int, self.arguments.tokens.split(","))
        pairs = [(model, tokens) for tokens in counts for model in models]
        for model, tokens in pairs:
            key = f"{model} {tokens}"
            if key in self.results.get("cost", {}):
                continue
            if self.left < 30:
                print("cost: no time is left; the same command goes on from here", flush=True)
                return False
            rows = self.measure(model, tokens)
            self.save("cost", key, value=rows)
            for arm, row in rows.items():
                print(f"{key:18} {arm:24} {_row(row)}", flush=True)
        return True

    def convergence(self) -> bool:
        """Losses by steps and by seconds, by the package's bench."""
        output = self.out / "convergence"
        file = _tiny_bench(self.out) if self.arguments.tiny else HERE / "gpu.toml"
        words = [sys.executable, "-m", "hf_precond", "bench", str(file), "--output", str(output)]
        # The picture is no reason to fail; the bench draws it later too.
        words += ["--no-plot"] * (importlib.util.find_spec("matplotlib") is None)
        with (self.out / "convergence.log").open("a") as log:
            try:
                code = subprocess.run(
                    words, stdout=log, stderr=subprocess.STDOUT, timeout=max(10, self.left)
                ).returncode
            except subprocess.TimeoutExpired:
                code = 130
        done = code == 0
        self.save("convergence", value={"complete": done, "code": code, "folder": output.name})
        print(f"convergence: {'complete' if done else f'code {code}'}, see {output}", flush=True)
        return done

    def predictions(self) -> bool:
        """What the cost model says of the ratios that were measured."""
        card = _known_card(self.results.get("about", {}).get("card", ""))
        for key, rows in self.results.get("cost", {}).items() if card is not None else ():
            model, tokens = key.rsplit(" ", 1)
            for arm, row in rows.items():
                if arm != "adamw" and "ratio" in row:
                    make, optimizer = gpu_tables.MODELS[model], gpu_tables.made(arm)
                    found = predict(make, optimizer, DEVICES[card], int(tokens))
                    row["predicted"] = round(found.ratio(found.tokens[0]), 3)
                    if host := _microseconds_a_launch(rows["adamw"]):
                        found.device = dataclasses.replace(found.device, launch=host)
                        row["predicted_on_this_host"] = round(found.ratio(found.tokens[0]), 3)
                    self.save("cost", key, value=rows)
                    print(f"{key:18} {arm:24} {_row(row)}", flush=True)
        return True

    # Cost ---------------------------------------------------------------------------

    def measure(self, model: str, tokens: int) -> dict[str, Any]:
        """All arms on one model.

        Args:
            model: a key of ``gpu_tables.MODELS``.
            tokens: a step.
        """
        rows: dict[str, Any] = {}
        held: dict[str, Training] = {}
        for arm in self.arguments.arms.split(","):
            try:
                held[arm] = Training(arm, model, tokens, self.device)
                rows[arm] = held[arm].warm(2 if self.arguments.tiny else WARM)
            except Exception as error:  # an arm that fails is a result
                held.pop(arm, None)
                rows[arm] = {"error": f"{type(error).__name__}: {error}"[:400]}
            print(f"{model} {tokens} {arm}: first steps {rows[arm]}", flush=True)
        span, blocks = (2, 1) if self.arguments.tiny else (SPAN, self.arguments.blocks)
        times: dict[str, list[float]] = {arm: [] for arm in held}
        for _ in range(blocks):
            for arm, training in held.items():
                if self.left > 0 or not times[arm]:
                    times[arm].append(training.time(span))
        base = statistics.median(times["adamw"]) if times.get("adamw") else float("nan")
        for arm, blocks_ms in times.items():
            median = statistics.median(blocks_ms)
            rows[arm] |= {
                "ms": round(median, 3), "ratio": round(median / base, 3),
                "blocks_ms": [round(t, 3) for t in blocks_ms],
            }  # fmt: skip
        for arm, training in held.items():
            if self.left > 0:
                rows[arm] |= training.parts(span)
                rows[arm] |= training.kernels(min(span, self.arguments.profiled))
            training.close()
        return rows


class Training:
    """A model in training.

    Args:
        arm: its optimizer.
        model: a key of ``gpu_tables.MODELS``.
        tokens: a step.
        device: where.
    """

    def __init__(self, arm: str, model: str, tokens: int, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.others = torch.cuda.memory_allocated(device) if on_gpu else 0  # of the arms before
        torch.manual_seed(0)
        with device:
            self.model = gpu_tables.MODELS[model]().train()
        config: Any = self.model.config
        self.batch = make_batch(self.model, tokens, device)
        words = torch.Generator().manual_seed(1)
        for name, tensor in self.batch.items():
            classes = config.num_labels if name == "labels" and tensor.dim() == 1 else None
            high = classes or config.vocab_size
            tensor.copy_(torch.randint(high, tensor.shape, generator=words))
        if self.batch["labels"].dim() == 2:
            self.batch["labels"] = self.batch["input_ids"]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.optimizer = gpu_tables.made(arm)(self.model)

    def step(self) -> None:
        """Forward, backward and the optimizer's step."""
        self.passes()
        with torch.profiler.record_function(STEP):
            self.optimizer.step()

    def passes(self) -> None:
        """Forward and backward."""
        self.optimizer.zero_grad()
        on_gpu = self.device.type == "cuda"
        cast = torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()
        with getattr(self.optimizer, "curvature_context", contextlib.nullcontext)():
            with cast:
                loss = self.model(**self.batch).loss
            if hasattr(self.optimizer, "probe"):
                self.optimizer.probe(loss)
            loss.backward()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def warm(self, steps: int) -> dict[str, Any]:
        """The first steps; their time, and the memory.

        Args:
            steps: their number.
        """
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        row: dict[str, Any] = {"first_steps_s": round(time.perf_counter() - start, 2)}
        row["state_mib"] = round(MemoryCounter.state_of(self.optimizer) / 2**20, 1)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - self.others
            row["peak_mib"] = round(peak / 2**20)
        return row

    def time(self, span: int) -> float:
        """Milliseconds a step of a block.

        Args:
            span: steps of the block.
        """
        self.wait()
        start = time.perf_counter()
        for _ in range(span):
            self.step()
        self.wait()
        return (time.perf_counter() - start) / span * 1e3

    def parts(self, span: int) -> dict[str, Any]:
        """Milliseconds of the passes and of ``step()``, each begun on an idle device.

        Args:
            span: steps that are timed one by one.
        """
        found: dict[str, list[float]] = {}
        for _ in range(span):
            for name, part in (("passes", self.passes), ("step", self.optimizer.step)):
                self.wait()
                start = time.perf_counter()
                part()
                found.setdefault(f"{name}_host_ms", []).append(time.perf_counter() - start)
                self.wait()
                found.setdefault(f"{name}_ms", []).append(time.perf_counter() - start)
        medians = {key: round(statistics.median(each) * 1e3, 3) for key, each in found.items()}
        return medians | {"step_longest_ms": round(max(found["step_ms"]) * 1e3, 3)}

    def kernels(self, span: int) -> dict[str, Any]:
        """What :func:`kernel_figures` says of some steps; nothing where there is no GPU.

        Args:
            span: steps that are profiled.
        """
        if self.device.type != "cuda":
            return {}
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as seen:
            for _ in range(span):
                self.step()
            self.wait()
        with tempfile.TemporaryDirectory() as folder:  # far faster than the profiler's own events
            path = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        return kernel_figures(events)

    def close(self) -> None:
        """Remove the hooks."""
        if hasattr(self.optimizer, "close"):
            self.optimizer.close()


Kernels = list[tuple[str, float]]


def kernels_by_part(events: Sequence[Mapping[str, Any]]) -> tuple[Kernels, list[Kernels]]:
    """What the device ran, by the part of a training step that launched it.

    The device runs a kernel when it gets to it; only the launch says what it was for. A kernel
    whose launch is not in the trace is in neither part.

    Args:
        events: ``traceEvents`` of torch's profiler.

    Returns:
        Names and microseconds of kernels, copies and memsets: of all the passes, and of every
        ``step()``.
    """
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] == STEP
    )
    starts = [start for start, _ in spans]
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", ())
    }
    passes: Kernels = []
    steps: list[Kernels] = [[] for _ in spans]
    for event in events:
        if event.get("cat") in ON_DEVICE and event["args"]["correlation"] in launched:
            moment = launched[event["args"]["correlation"]]
            place = bisect.bisect_right(starts, moment) - 1
            inside = place >= 0 and moment <= spans[place][1]
            (steps[place] if inside else passes).append((event["name"], event["dur"]))
    return passes, steps


def kernel_figures(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Kernels and their milliseconds a training step.

    Args:
        events: ``traceEvents`` of torch's profiler.

    Returns:
        Of the passes and of ``step()`` the mean; under ``plain`` the median of ``step()``, as
        steps with refreshes are few and much longer; the largest kernels of ``step()`` by name.
    """
    passes, steps = kernels_by_part(events)
    span = max(1, len(steps))
    times = [sum(duration for _, duration in step) / 1e3 for step in steps] or [0.0]
    counts = [len(step) for step in steps] or [0]
    top: dict[str, tuple[float, int]] = {}
    for name, duration in itertools.chain(*steps):
        time_, count = top.get(name[:100], (0.0, 0))
        top[name[:100]] = time_ + duration / 1e3, count + 1
    largest = sorted(top.items(), key=lambda item: -item[1][0])[:LARGEST]
    return {
        "passes_kernels": round(len(passes) / span),
        "passes_kernels_ms": round(sum(duration for _, duration in passes) / span / 1e3, 3),
        "step_kernels": round(statistics.mean(counts)),
        "step_kernels_plain": round(statistics.median(counts)),
        "step_kernels_ms": round(statistics.mean(times), 3),
        "step_kernels_plain_ms": round(statistics.median(times), 3),
        "largest": {n: [round(t / span, 4), round(c / span, 1)] for n, (t, c) in largest},
    }


def _tiny_bench(folder: Path) -> Path:
    """``gpu.toml`` for two steps of a small model on the CPU, two optimizers, one setting each."""
    spec = tomllib.loads((HERE / "gpu.toml").read_text())
    spec |= {"steps": 2, "trials": 1, "seeds": [1], "device": "cpu", "precision": "float32"}
    spec |= {"tasks": {"recall": {"function": str(HERE / "tasks.py:recall")}}}
    spec["reference"] = ["adamw"]
    few = {name: spec["optimizers"][name] for name in ("adamw", "afopt")}
    for entry in few.values():
        entry["fields"]["lr"] = entry.pop("grid")["lr"][0]
    path = folder / "convergence.json"
    path.write_text(json.dumps(spec | {"optimizers": few}, indent=1))
    return path


def _known_card(name: str) -> str | None:
    """The card as ``--device`` names it."""
    return next((key for key in DEVICES if key.upper() in name.upper().split()), None)


def _microseconds_a_launch(row: Mapping[str, Any]) -> float | None:
    """What this host takes for a launch of the model's passes, where they were measured."""
    if not row.get("passes_kernels") or "passes_host_ms" not in row:
        return None
    return 1e3 * float(row["passes_host_ms"]) / float(row["passes_kernels"])


def _row(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    parts = [f"{row['ms']:9.2f} ms", f"{row['ratio']:.3f}"]
    if "predicted" in row:
        both = [row[k] for k in ("predicted", "predicted_on_this_host") if k in row]
        parts[-1] += f" (model {', '.join(f'{ratio:.2f}' for ratio in both)})"
    if "step_ms" in row:
        parts.append(f"step {row['step_ms']:.1f}, host {row['step_host_ms']:.1f} ms")
    if "step_kernels" in row:
        counts = f"{row['step_kernels_plain']} (mean {row['step_kernels']})"
        parts.append(f"kernels {counts} {row['step_kernels_ms']:.2f} ms")
    if "peak_mib" in row:
        parts.append(f"{row['peak_mib']} MiB")
    return "  ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Run the suite.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        0 where everything is there, 3 where time ran out.
    """
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", default="outputs/gpu")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds")
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--models", default="bert-base,llama-124m")
    parser.add_argument("--tokens", default="4096,16384,65536")
    parser.add_argument("--arms", default=",".join(ARMS), help="adamw among them")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of 20 steps, an arm")
    parser.add_argument("--profiled", type=int, default=SPAN, help="steps, an arm; 20 at most")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the suite")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.only.split(",")) - set(PARTS))
    if unknown:
        parser.error(f"--only {unknown[0]}: it is of {', '.join(PARTS)}.")
    needs_gpu = arguments.device.startswith("cuda") and arguments.only != "predictions"
    if needs_gpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu --tiny tries the suite.")
    return 0 if Suite(arguments).run() else 3


if __name__ == "__main__":
    raise SystemExit(main())
