"""The results of runs on disk: one file of JSON each, whole or not there at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_precond.bench.spec import Run
from hf_precond.config.hub import version

PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "schedulefree")


def perform(run: Run, path: Path, progress: Callable[[int], None]) -> None:
    """Train a run and write its result.

    Args:
        run: the run.
        path: of the result.
        progress: told the number of steps done.
    """
    from hf_precond.bench.training import train

    found = {"run": dataclasses.asdict(run), **train(run, progress), **machine(run)}
    write(path, found)


def write(path: Path, values: Any) -> None:
    """Write JSON so that the file is whole whenever it is there.

    Args:
        path: the file; its folder is made.
        values: plain values; numbers that are not finite become ``null``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    with draft.open("w") as file:
        json.dump(_plain(values), file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> dict[str, Any] | None:
    """A result, or ``None`` where there is none that can be read.

    Args:
        path: the file.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "final" in found else None


def machine(run: Run) -> dict[str, Any]:
    """Hardware and versions.

    Args:
        run: whose device is described.

    Returns:
        ``hardware`` and ``versions``.
    """
    hardware: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "threads": run.task.training.threads,
        "device": run.task.training.device,
    }
    if run.task.training.device.startswith("cuda"):
        import torch

        hardware["gpu"] = torch.cuda.get_device_name(run.task.training.device)
        hardware["cuda"] = torch.version.cuda
    versions = {"hf_precond": version(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"hardware": hardware, "versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
