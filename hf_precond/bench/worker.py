"""A process that trains what it is told, one run after another.

It reads lines of JSON, a run and the file of its result each, and answers with
lines: ``{"step": 10}``, then ``{"done": true}`` or ``{"error": "…"}``. What runs
print goes to stderr. It ends with its parent.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and closes stdin
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    waiting: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(waiting,), daemon=True).start()

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    from hf_precond.bench.results import perform
    from hf_precond.bench.spec import Run

    while True:
        order = json.loads(waiting.get())
        try:
            perform(Run.from_json(order["run"]), Path(order["path"]), lambda s: answer(step=s))
            answer(done=True)
        except Exception as error:
            traceback.print_exc()  # into the log
            answer(error=f"{type(error).__name__}: {error}")


def _read(waiting: queue.Queue[str]) -> None:
    """Hand lines on; when the parent is gone, end at once, and with it a script that runs."""
    for line in sys.stdin:
        waiting.put(line)
    from hf_precond.bench.trainer_script import running

    for process in running:
        process.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
