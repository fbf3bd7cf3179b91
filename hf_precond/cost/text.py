"""A prediction as people read it."""

from __future__ import annotations

from hf_precond.cost.counting import Counts
from hf_precond.cost.devices import BANDWIDTH, PRECISIONS, PRODUCTS, Device
from hf_precond.cost.prediction import Prediction


def prediction_text(prediction: Prediction, name: str) -> str:
    """The cost of a step by its parts, and its ratio to fused AdamW.

    Args:
        prediction: the prediction.
        name: of the optimizer.

    Returns:
        Lines of at most 80 columns.
    """
    device, tokens = prediction.device, prediction.tokens[0]
    parts = prediction.parts(tokens)
    precisions = [p for p in PRECISIONS if any(p in part.flops for part in parts.values())]
    columns = [*precisions, "GB", "launches", "ms"]
    lines = [
        f"predicted, not measured: {device.name}",
        f"    {tokens:,} tokens a step in sequences of {prediction.length:,}; {_passes(device)}",
        *_assumed(device),
        "",
    ]
    rows = [("an average step, GFLOP in", columns)]
    for title, part in parts.items():
        flops = part.flops
        cells = [f"{flops[p] / 1e9:,.1f}" if p in flops else "-" for p in precisions]
        cells += [f"{part.bytes / 1e9:,.2f}", f"{_launches(device, part):,.0f}"]
        rows.append((f"  {title}", [*cells, f"{device.average(part):,.2f}"]))
    own, adamw = prediction.step_ms(tokens), prediction.adamw_ms(tokens)
    lines += [
        *_table(rows),
        "",
        f"a whole training step: {own:,.2f} ms with {name}, {adamw:,.2f} ms with fused AdamW,",
        f"    {own / adamw:.2f} times as long; {_break_even(prediction)}",
    ]
    return "\n".join(lines)


def _launches(device: Device, part: Counts) -> float:
    return part.launches if device.kind == "cpu" else part.started


def _passes(device: Device) -> str:
    kind = "float32" if device.autocast is None else str(device.autocast).removeprefix("torch.")
    return f"passes in {kind}"


def _assumed(device: Device) -> list[str]:
    if device.kind == "cpu":
        rate = device.peak["float32"] * 1e3
        return [
            f"    measured just now: {rate:,.0f} GFLOP/s, {device.bandwidth:,.0f} GB/s, "
            f"{device.launch:.1f} µs a call"
        ]
    host = f"{device.launch:g} µs of the host a launch"
    return [
        f"    assumed: products at {100 * PRODUCTS:.0f} % of the peak, memory at most at "
        f"{100 * BANDWIDTH:.0f} % of its",
        f"    bandwidth; a step takes that, or {host} if it is more",
        "    shares as on an H200; examples/benchmarks/gpu.py measures your device",
    ]


def _break_even(prediction: Prediction) -> str:
    tokens = prediction.break_even()
    if tokens is None:
        return "at no number of tokens is the overhead below 5 %"
    if tokens <= prediction.length:
        return "the overhead is below 5 % at any number of tokens"
    return f"below 5 % from {tokens:,} tokens a step"


def _table(rows: list[tuple[str, list[str]]]) -> list[str]:
    """Titles and cells, these as far apart as 80 columns have room for."""
    columns = zip(*(cells for _, cells in rows), strict=True)
    widths = [max(map(len, column)) for column in columns]
    title = max(len(title) for title, _ in rows)
    gap = max(1, min(3, (80 - title - sum(widths)) // len(widths)))
    return [
        f"{name:<{title}}"
        + "".join(f"{cell:>{gap + width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
