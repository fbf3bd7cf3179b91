"""Private names of accelerate, read in 1.7 to 1.15."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def accelerator_state() -> Mapping[str, Any]:
    """The state that every ``Accelerator`` of this process shares.

    Returns:
        ``AcceleratorState._shared_state``; empty where no Trainer or Accelerator has made one.
        accelerate is not imported for it.
    """
    state = sys.modules.get("accelerate.state")
    return {} if state is None else state.AcceleratorState._shared_state
