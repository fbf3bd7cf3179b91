"""What an optimizer says of itself: counters, and diagnostics that must be computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_precond.compat import devices
from hf_precond.optimizers.base.coverage import StatisticsCoverage
from hf_precond.optimizers.base.fallback import FallbackOptimizer
from hf_precond.optimizers.base.refresh import Counters, FailureRecord

REPORT_INTERVAL = 100
"""Steps between two reports in the logs under ``diagnostics="auto"``."""


class Reporting:
    """The part of an optimizer that logs are made of.

    A subclass computes what it has to show in :meth:`report`.
    """

    config: Any
    counters: Counters
    coverage: StatisticsCoverage
    failures: FailureRecord
    fallback: FallbackOptimizer
    observing = False
    """Whether the next step keeps what :meth:`report` needs."""
    _reported_at: int | None = None

    @property
    def steps(self) -> int:
        """The number of steps taken so far.

        Raises:
            NotImplementedError: in a class that does not count them.
        """
        raise NotImplementedError

    def count(self, name: str, by: int | Tensor = 1) -> None:
        """Add to a counter that :meth:`diagnostics` shows.

        Args:
            name: the counter's name.
            by: a number, or a tensor that is added on its device.
        """
        self.counters.add(name, by)

    def count_dropped(self, counter: str, dropped: Mapping[str, Tensor]) -> None:
        """Count statistics that were not finite; too many in a row stop training.

        Args:
            counter: name of the counter.
            dropped: by layer 1 where its statistic was dropped, else 0: 0-d tensors.
        """
        if dropped:
            device = next(iter(dropped.values())).device
            flags = torch.stack([flag.to(device) for flag in dropped.values()])
            self.count(counter, flags.sum())
            self.failures.watch("statistic", list(dropped), flags)

    def diagnostics(self) -> dict[str, float]:
        """The counters and :meth:`report`, as plain numbers; the counters alone if ``off``.

        Reads from the device, and may cost about as much as a step: call it when logging.
        """
        reported = {} if self.config.diagnostics == "off" else self.report()
        return self.counted() | reported

    def counted(self) -> dict[str, float]:
        """The counters and what else is at hand, as plain numbers; one read from the device."""
        values = {name: float(value) for name, value in self.counters.items()}
        known = self.counters.on_device
        if known:
            device = next(iter(known.values())).device
            dtype = devices.widest(device)
            numbers = torch.stack([value.to(device, dtype) for value in known.values()])
            for name, value in zip(known, numbers.tolist(), strict=True):
                values[name] = values.get(name, 0.0) + value
        if self.coverage.unobserved:
            values["unobserved_matrices"] = float(len(self.coverage.unobserved))
        return values | self.fallback.diagnostics()

    def report(self) -> dict[str, float]:
        """The diagnostics that must be computed, as plain numbers."""
        return {}

    def expect_log(self) -> None:
        """Say that the next step will be logged: it keeps what :meth:`report` needs."""
        self.observing = self._report_is_due(self.steps + 1)

    def logged(self) -> dict[str, float]:
        """The diagnostics for a log, as the field ``diagnostics`` asks; see the config."""
        if self.config.diagnostics == "off":
            return {}
        if not self._report_is_due(self.steps):
            return self.counted()
        self._reported_at = self.steps
        return self.counted() | self.report()

    def _report_is_due(self, step: int) -> bool:
        if self.config.diagnostics != "auto" or self._reported_at is None:
            return self.config.diagnostics != "off"
        return not 0 <= step - self._reported_at < REPORT_INTERVAL
