"""Failures in a row: how many are borne, and what is said when there were too many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_precond.linalg import factorization

MAX_DROPPED = 10
"""Statistics of one layer, gradients or steps in a row at which training stops."""

ADVICE = {
    "factor": factorization.UNDECOMPOSED,
    "solver": (
        "the solver library failed at its refresh {limit} times in a row. Raise `damping` (or "
        "`eps`), lower the learning rate, or set max_dim below the layer's width."
    ),
    "out_of_memory": (
        "memory ran out at its refresh {limit} times in a row, also with this matrix alone. Lower "
        "the batch size or `max_dim`, or keep the factors in state_dtype='bfloat16'."
    ),
    "statistic": (
        "its statistics were not finite {limit} times in a row, so its activations or gradients "
        "hold infinities or NaN. If the loss is NaN too, the weights are lost: go back to a "
        "checkpoint, lower the learning rate or warm up longer, and set skip_nonfinite=True so "
        "that no bad batch reaches the weights; otherwise train in float32 or bfloat16."
    ),
    "gradient": (
        "{limit} updates of the factors in a row met a gradient that is not finite, or too large "
        "to square. If the loss is NaN, the weights are lost: go back to a checkpoint, lower the "
        "learning rate or warm up longer, and set skip_nonfinite=True so that no bad batch "
        "reaches the weights; otherwise clip gradients."
    ),
    "step": (
        "{limit} steps in a row had gradients that are not finite and were skipped "
        "(skip_nonfinite=True). Every batch gives them, so the weights or the data are at fault: "
        "look at the data, go back to a checkpoint, lower the learning rate or clip gradients."
    ),
}
"""What is said after the name, by what failed."""

LIMITS = {"statistic": MAX_DROPPED, "gradient": MAX_DROPPED, "step": MAX_DROPPED}
"""Failures in a row after which training stops; ``factorization.MAX_FAILURES`` for what is not here."""


class FailureRecord:
    """Counts failures in a row by name, and stops training where there were too many.

    What the host knows is judged at once (:meth:`note`). What only the device
    knows (:meth:`watch`) is counted there and copied to the host without
    waiting: on a GPU a failure is noticed at the first :meth:`check` that
    finds the copy done, on a CPU at the next. A copy of an optimizer starts
    counting anew.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], int] = {}
        self._streaks: dict[tuple[str, str], Tensor] = {}
        self._attempts: list[tuple[list[tuple[str, str]], Tensor]] = []
        self._changed = False
        self._copies: list[tuple[list[tuple[str, str]], Tensor, torch.cuda.Event]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": {}, "_streaks": {}, "_attempts": [], "_changed": False, "_copies": []}

    def note(self, kind: str, name: str, failed: bool) -> None:
        """One more attempt, whose outcome the host knows.

        Args:
            kind: a key of :data:`ADVICE`.
            name: the matrix, for the message.
            failed: whether it failed.

        Raises:
            RuntimeError: at the last failure that is borne, with advice.
        """
        if not failed:
            self._rows.pop((kind, name), None)
            return
        self._rows[kind, name] = self._rows.get((kind, name), 0) + 1
        self._judge(kind, name, self._rows[kind, name])

    def watch(self, kind: str, names: Sequence[str], failed: Tensor) -> None:
        """One more attempt of each name, whose outcome is on the device. No synchronisation.

        It enters the count at the next :meth:`check`, together with all others.

        Args:
            kind: a key of :data:`ADVICE`.
            names: the matrices.
            failed: ``[len(names)]``, not zero where it failed.
        """
        if names:
            self._attempts.append(([(kind, name) for name in names], failed.detach()))

    def _count(self) -> None:
        """Put the attempts since the last call into the streaks.

        Those of one device and dtype together, as far as no name comes twice.
        """
        attempts, self._attempts = self._attempts, []
        self._changed = self._changed or bool(attempts)
        while attempts:
            device, dtype = attempts[0][1].device, attempts[0][1].dtype
            taken: dict[tuple[str, str], None] = {}
            flags: list[Tensor] = []
            left: list[tuple[list[tuple[str, str]], Tensor]] = []
            for keys, failed in attempts:
                alike = (failed.device, failed.dtype) == (device, dtype)
                if left or not alike or not taken.keys().isdisjoint(keys):
                    left.append((keys, failed))
                    continue
                taken |= dict.fromkeys(keys)
                flags.append(failed)
            self._extend(list(taken), torch.cat(flags).ne(0).to(torch.int64))
            attempts = left

    def _extend(self, keys: Sequence[tuple[str, str]], flags: Tensor) -> None:
        """``streak ← (streak + 1) · flag``."""
        new = [
            key
            for key in keys
            if key not in self._streaks or self._streaks[key].device != flags.device
        ]
        if new:
            self._streaks |= zip(new, flags.new_zeros(len(new)).unbind(), strict=True)
        held = [self._streaks[key] for key in keys]
        torch._foreach_add_(held, 1)
        torch._foreach_mul_(held, list(flags.unbind()))

    def check(self) -> None:
        """Judge what has reached the host, and send what has changed since.

        Raises:
            RuntimeError: see :meth:`note`.
        """
        waiting = []
        for keys, values, done in self._copies:
            if done.query():
                self._judge_all(keys, values)
            else:
                waiting.append((keys, values, done))
        self._copies = waiting
        self._count()
        if not self._changed or waiting:
            return
        self._changed = False
        devices: dict[torch.device, list[tuple[str, str]]] = {}
        for key, streak in self._streaks.items():
            devices.setdefault(streak.device, []).append(key)
        for device, keys in devices.items():
            stack = torch.stack([self._streaks[key] for key in keys])
            if device.type != "cuda":
                self._judge_all(keys, stack)
                continue
            values = torch.empty(stack.shape, dtype=stack.dtype, pin_memory=True)
            values.copy_(stack, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))
            self._copies.append((keys, values, done))

    def _judge_all(self, keys: Sequence[tuple[str, str]], values: Tensor) -> None:
        for (kind, name), value in zip(keys, values.tolist(), strict=True):
            self._judge(kind, name, value)

    def _judge(self, kind: str, name: str, failures: int) -> None:
        limit = LIMITS.get(kind, factorization.MAX_FAILURES)
        if failures >= limit:
            raise RuntimeError(f"{name}: {ADVICE[kind].format(limit=limit)}")
