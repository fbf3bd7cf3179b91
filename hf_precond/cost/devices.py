"""What is assumed of a device: its peak rates, and how much of them is reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from hf_precond.cost import kernels
from hf_precond.cost.counting import Counts, Kernel, OperationCounter

PRODUCTS = 0.6
"""Share of the peak that products reach."""
SINGLE = 0.4
"""Share of the peak that products in float32 reach, which do without tensor cores."""
FACTORIZATIONS = 0.05
"""Share of the peak that Cholesky factors, triangular solves and eigenvectors reach."""
BANDWIDTH = 0.85
"""Share of the memory's bandwidth that an elementwise kernel over whole tensors reaches."""
RELATIVE = {
    kernels.JOINED: 0.97, kernels.LISTS: 0.83, kernels.STRIDED: 0.6, kernels.REDUCED: 0.57,
    kernels.WIDENED: 0.5, kernels.CONVERTED: 0.32, kernels.PICKED: 0.26, kernels.COLUMNS: 0.18,
}  # fmt: skip
"""What other kernels of a CUDA device reach of that; see ``kernels.py`` for the kinds."""
START = 1.3
"""Microseconds that a kernel, copy or memset takes on a GPU beyond arithmetic and traffic."""
ROW = {"linalg_cholesky_ex": 0.63, "linalg_solve_triangular": 0.29, "triangular_solve": 0.29}
"""Microseconds a row that factorisations take at least, their arithmetic being done row by row."""
LAUNCH = 4.0
"""Microseconds that a fast host takes for a launch; 26 were measured on a slow one."""
PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True)
class Device:
    """Peak rates of a device.

    Args:
        name: for people.
        peak: TFLOP/s by precision, dense; a precision that is missing runs as float32.
        bandwidth: GB/s of the memory.
        capability: of a CUDA device.
        kind: ``cuda``, or ``cpu``, whose host and device are one.
        launch: microseconds that the host takes for a launch, or for a call on a CPU.
        start: microseconds that a launch takes on a GPU beyond arithmetic and traffic.
        shares: reached of the peak by products and by factorisations, and of the bandwidth.
        rates: measured of single operations on a CPU, by name: TFLOP/s of factorisations, GB/s of
            all others; under ``new`` of those that write new memory.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    capability: tuple[int, int] = (9, 0)
    kind: str = "cuda"
    launch: float = LAUNCH
    start: float = START
    shares: tuple[float, float, float] = field(default=(PRODUCTS, FACTORIZATIONS, BANDWIDTH))
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def autocast(self) -> torch.dtype | None:
        """What the passes are computed in: bfloat16, float16 on GPUs without it."""
        if self.kind == "cpu":
            return None
        return torch.bfloat16 if "bfloat16" in self.peak else torch.float16

    def seconds(self, kernel: Kernel) -> float:
        """What an operation takes: the longer of arithmetic and traffic; on a CPU the sum.

        On a GPU its launches and what is copied before it come on top.

        Args:
            kernel: the operation.
        """
        if self.kind == "cpu":
            return self._seconds_of_cpu(kernel)
        product, factorization, bandwidth = self.shares
        rate = self.bandwidth * bandwidth * 1e9
        precision = kernel.precision if kernel.precision in self.peak else "float32"
        share = factorization if kernel.factorization else product
        if precision == "float32" and not kernel.factorization:
            share *= SINGLE / PRODUCTS
        computing = kernel.flops / (self.peak[precision] * share * 1e12)
        moving = kernel.bytes / (rate * RELATIVE.get(kernel.kind, 1.0))
        waiting = kernel.rows * ROW.get(kernel.name, 0.0) * 1e-6
        longest = max(computing, moving, waiting)
        return longest + kernel.copied / rate + kernel.launches * self.start * 1e-6

    def _seconds_of_cpu(self, kernel: Kernel) -> float:
        product, factorization, bandwidth = self.shares
        rate = self.bandwidth * bandwidth
        peak = self.peak.get(kernel.precision, self.peak["float32"])
        peak *= factorization if kernel.factorization else product
        measured = self.rates.get(SAME_RATE.get(kernel.name, kernel.name))
        if kernel.factorization:
            peak = measured or peak
        elif measured or not kernel.name.endswith("_"):
            rate = measured or self.rates.get("new", rate)
        return kernel.flops / (peak * 1e12) + kernel.bytes / (rate * 1e9)

    def milliseconds(self, kernels: Iterable[Kernel]) -> float:
        """The time of operations one after the other.

        On a GPU the longer of the device's own time and the host's for their launches; on a CPU,
        which does both, the sum.

        Args:
            kernels: the operations.
        """
        kernels = list(kernels)
        own = self.busy(kernels)
        if self.kind == "cpu":
            return own + len(kernels) * self.launch * 1e-3
        return max(own, sum(kernel.launches for kernel in kernels) * self.launch * 1e-3)

    def busy(self, kernels: Iterable[Kernel]) -> float:
        """Milliseconds that the device itself takes, whatever the host does.

        Args:
            kernels: the operations.
        """
        return sum(map(self.seconds, kernels)) * 1e3

    def average(self, counts: Counts) -> float:
        """Milliseconds a step of what is counted over several.

        Args:
            counts: the kernels and the steps they are of.
        """
        return self.milliseconds(counts.kernels) / counts.steps


HOPPER = {"float64": 34, "float32": 67, "tf32": 495, "bfloat16": 989, "float16": 989}
DEVICES = {
    "h200": Device("NVIDIA H200 SXM", HOPPER, 4800),
    "h100": Device("NVIDIA H100 SXM", HOPPER, 3350),
    "a100": Device(
        "NVIDIA A100 SXM, 80 GB",
        {"float64": 9.7, "float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312}, 2039,
        (8, 0),
    ),
    "l4": Device(
        "NVIDIA L4",
        {"float64": 0.5, "float32": 30.3, "tf32": 60, "bfloat16": 121, "float16": 121}, 300,
        (8, 9),
    ),
    "t4": Device("NVIDIA T4", {"float64": 0.25, "float32": 8.1, "float16": 65}, 320, (7, 5)),
}  # fmt: skip
"""By the name that a command takes: peaks of the vendor's data sheets, without sparsity."""


def find_device(name: str) -> Device:
    """A device by its name, or as a file describes it; ``cpu`` is measured.

    Args:
        name: one of :data:`DEVICES`, ``cpu``, or the path of a TOML file::

            name = "NVIDIA H20"
            bandwidth = 4000          # GB/s
            capability = [9, 0]       # of CUDA
            launch = 4                # microseconds that the host takes for a launch
            [peak]                    # TFLOP/s, dense
            float32 = 44
            tf32 = 74
            bfloat16 = 148

    Raises:
        ValueError: there is no such device, or the file is not usable.
    """
    if name == "cpu":
        return measured_cpu()
    if name in DEVICES:
        return DEVICES[name]
    path = Path(name)
    if not path.is_file():
        known = ", ".join([*DEVICES, "cpu"])
        raise ValueError(
            f"--device {name}: there is no such device and no such file; it is one of {known}, "
            "or a TOML file of peak rates."
        )
    import tomllib

    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--device {name}: this file is no TOML: {error}.") from error
    return _from_file(name, values)


def _from_file(path: str, values: Mapping[str, Any]) -> Device:
    known = {"name", "bandwidth", "capability", "launch", "peak"}
    unknown = sorted(set(values) - known)
    peak = values.get("peak")
    if unknown:
        raise ValueError(
            f"--device {path}: {unknown[0]} is no key; they are {', '.join(sorted(known))}."
        )
    rates = peak if isinstance(peak, Mapping) else {}
    numbers = {**{f"peak.{key}": value for key, value in rates.items()}}
    numbers["bandwidth"] = values.get("bandwidth")
    numbers["launch"] = values.get("launch", LAUNCH)
    numbers.setdefault("peak.float32", None)
    for key, value in numbers.items():
        if key.startswith("peak.") and key[5:] not in PRECISIONS:
            raise ValueError(
                f"--device {path}: {key} is no precision; they are {', '.join(PRECISIONS)}."
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            unit = {"bandwidth": "GB/s", "launch": "microseconds"}.get(key, "TFLOP/s")
            raise ValueError(f"--device {path}: {key} must be a number above 0, in {unit}.")
    capability = values.get("capability", [9, 0] if "tf32" in rates else [7, 5])
    if not isinstance(capability, list) or [type(part) for part in capability] != [int, int]:
        raise ValueError(f"--device {path}: capability must be two integers, [9, 0] say.")
    name = str(values.get("name", Path(path).stem))
    launch = float(numbers["launch"])
    return Device(name, dict(rates), float(numbers["bandwidth"]), tuple(capability), launch=launch)


# The machine at hand -----------------------------------------------------------------------------


def measured_cpu(seconds: float = 2.0) -> Device:
    """This machine's processor, with the threads that torch uses now.

    The rates of products of 768 rows and columns, the bandwidth of an addition in place of 32 MiB,
    the time of a call on a tensor of 16 numbers, and the rates of operations that are slower than
    their traffic, or write new memory (6 MiB, as activations of 1,024 tokens); the best of several
    each.

    Args:
        seconds: that the measurement takes, about.
    """
    large, other = torch.randn(2**23), torch.randn(2**23)
    small = torch.randn(4, 4)
    probes = _probes()
    each = seconds / (len(probes) + 5)

    def calls() -> None:
        for _ in range(200):
            small.add(1.0)

    peak = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a = torch.randn(768, 768).to(dtype)
        product = _best(lambda a=a: torch.mm(a, a), each)  # type: ignore[misc]
        peak[str(dtype).removeprefix("torch.")] = 2 * 768**3 / product / 1e12
    addition = _best(lambda: large.add_(other), each)
    call = _best(calls, each) / 200
    rates = dict(_rate(name, work, each) for name, work in probes.items())
    return Device(
        f"this processor, {torch.get_num_threads()} threads",
        peak, 3 * 4 * 2**23 / addition / 1e9, kind="cpu", launch=call * 1e6,
        shares=(1.0, 0.25, 1.0), rates=rates,
    )  # fmt: skip


def _rate(name: str, work: Callable[[], Any], seconds: float) -> tuple[str, float]:
    """The rate of an operation, of what is counted of it: TFLOP/s, or GB/s."""
    with OperationCounter("cpu") as counter:
        work()
    kernels = [k for k in counter.records if name in (k.name, "new")]
    amount = sum(k.flops or k.bytes for k in kernels)
    return name, amount / _best(work, seconds) / (1e12 if kernels[0].flops else 1e9)


SAME_RATE = {
    **dict.fromkeys(("normal_", "uniform_", "native_dropout", "bernoulli"), "bernoulli_"),
    **dict.fromkeys(("erf", "sigmoid", "exp", "atan2", "pow"), "tanh"),
    **dict.fromkeys(("silu", "mish"), "gelu"),
    **dict.fromkeys(("silu_backward", "tanh_backward", "erf_backward"), "gelu_backward"),
    "_log_softmax": "_softmax", "_log_softmax_backward_data": "_softmax_backward_data",
    "triu": "tril", "triu_": "tril", "tril_": "tril", "triangular_solve": "linalg_solve_triangular",
    "cholesky_solve": "cholesky_inverse", "_linalg_svd": "_linalg_eigh",
}  # fmt: skip
"""Operations that are taken to be as fast as one that is measured."""


def _probes() -> dict[str, Callable[[], Any]]:
    """Operations whose rates are measured, by the name that they are counted under."""
    aten = torch.ops.aten
    x, y, positive = torch.randn(1024, 1536), torch.randn(1024, 1536), torch.rand(1024, 1536)
    scores, mask = torch.randn(12288, 128), x > 0
    shares, scale = torch.softmax(scores, -1), torch.ones(1536)
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    index = torch.arange(1024)
    matrix = torch.eye(384) + 0.01 * (x[:384, :384] + x[:384, :384].mT)
    lower = torch.linalg.cholesky(matrix)
    parts = [1536], mean, deviation, scale, scale, [True, True, True]
    return {
        "new": lambda: torch.mul(x, y),
        "bernoulli_": lambda: torch.empty_like(x).bernoulli_(0.9),
        "gelu": lambda: functional.gelu(x),
        "gelu_backward": lambda: aten.gelu_backward(x, y),
        "tanh": lambda: torch.tanh(x),
        "sqrt": lambda: torch.sqrt(positive),
        "where": lambda: torch.where(mask, x, y),
        "tril": lambda: torch.tril(x),
        "cat": lambda: torch.cat([x, y]),
        "sum": lambda: torch.sum(x, 0),
        "clone": lambda: x.view(8, 128, 12, 128).transpose(1, 2).contiguous(),
        "_to_copy": lambda: x.bfloat16(),
        "_softmax": lambda: torch.softmax(scores, -1),
        "_safe_softmax": lambda: aten._safe_softmax(scores, -1),
        "_softmax_backward_data": lambda: aten._softmax_backward_data(
            scores, shares, -1, torch.float32
        ),
        "native_layer_norm": lambda: functional.layer_norm(x, (1536,), scale, scale),
        "native_layer_norm_backward": lambda: aten.native_layer_norm_backward(x, y, *parts),
        "embedding_dense_backward": lambda: aten.embedding_dense_backward(
            x, index, 8192, -1, False
        ),
        "linalg_cholesky_ex": lambda: torch.linalg.cholesky_ex(matrix),
        "cholesky_inverse": lambda: torch.cholesky_inverse(lower),
        "linalg_solve_triangular": lambda: torch.linalg.solve_triangular(
            lower, matrix, upper=False
        ),
        "_linalg_eigh": lambda: torch.linalg.eigh(matrix),
    }


def _best(work: Callable[[], Any], seconds: float) -> float:
    """The shortest of several runs; processor time where one thread works, as others may too."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        before = clock()
        work()
        times.append(clock() - before)
    return min(times)
