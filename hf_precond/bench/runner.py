"""Runs a comparison: searches side by side, on several processes, resumed from what is done."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_precond.bench import results
from hf_precond.bench.search import Search, Settings, key, search
from hf_precond.bench.spec import Entry, Run, Spec, runs_of

WORKER = "import sys, json; sys.path[:] = json.loads({path!r}); " \
    "from hf_precond.bench.worker import main; main()"  # fmt: skip


class Comparison:
    """What has been run of a comparison, and what is to be run next.

    Args:
        spec: the comparison.
        output: folder of the results.
    """

    def __init__(self, spec: Spec, output: Path) -> None:
        self.spec, self.output = spec, output
        self.known: dict[Path, dict[str, Any]] = {}
        self.failed: dict[Path, str] = {}

    def result(self, run: Run) -> dict[str, Any] | None:
        """The result of a run, from disk or memory; ``None`` where it was not run yet.

        Args:
            run: the run.
        """
        path = run.path(self.output)
        if path not in self.known:
            found = results.read(path)
            if found is None:
                return None
            self.known[path] = found
        return self.known[path]

    def search(self, task: str, entry: Entry) -> Search:
        """Where the tuning of an optimizer on a task stands.

        Args:
            task: the task's name.
            entry: the optimizer.
        """
        if not entry.grid:
            return Search(best=dict(entry.start))
        losses: dict[str, float] = {}
        while True:
            found = search(entry.grid, entry.start, self.spec.trials, losses)
            done = {key(s): self.loss(self.trial(task, entry, s)) for s in found.wanted}
            new = {k: loss for k, loss in done.items() if loss is not None}
            if len(new) < len(done) or not done:
                return found
            losses |= new

    def trial(self, task: str, entry: Entry, settings: Settings) -> list[Run]:
        """The runs of one trial, one a tuning seed.

        Args:
            task: the task's name.
            entry: the optimizer.
            settings: of the tuned fields.
        """
        return runs_of(self.spec, entry, task, settings, self.spec.tuning_seeds, False)

    def reported(self, task: str, entry: Entry, best: Settings) -> list[Run]:
        """The runs of the reported seeds.

        Args:
            task: the task's name.
            entry: the optimizer.
            best: the settings that were chosen.
        """
        return runs_of(self.spec, entry, task, best, self.spec.seeds, True)

    def loss(self, runs: list[Run]) -> float | None:
        """The mean final loss of runs; infinite where one diverged, ``None`` where one is missing.

        Args:
            runs: of one setting.
        """
        found = [self.result(run) for run in runs]
        if any(result is None for result in found):
            return None
        return sum(final_loss(result) for result in found if result) / len(runs)

    def pairs(self) -> Iterator[tuple[str, Entry]]:
        """Every optimizer on every task."""
        for task, entries in self.spec.entries.items():
            for entry in entries.values():
                yield task, entry

    def wanted(self) -> list[Run]:
        """The runs that can be started now, those that have failed left out."""
        chosen: dict[Path, Run] = {}
        for task, entry in self.pairs():
            found = self.search(task, entry)
            runs = [run for settings in found.wanted for run in self.trial(task, entry, settings)]
            if not found.wanted:
                runs = self.reported(task, entry, found.best)
            for run in runs:
                path = run.path(self.output)
                if path not in self.failed and self.result(run) is None:
                    chosen.setdefault(path, run)
        return list(chosen.values())

    def steps(self) -> tuple[int, int]:
        """Steps done, and in all (as many as the budgets say)."""
        done, total, spec = 0, 0, self.spec
        for task, entry in self.pairs():
            steps, found = spec.tasks[task].training.steps, self.search(task, entry)
            trials = spec.trials * len(spec.tuning_seeds) if entry.grid else 0
            total += steps * (trials + len(spec.seeds))
            runs = [r for s, _ in found.tried for r in self.trial(task, entry, s)]
            if not found.wanted:
                runs += self.reported(task, entry, found.best)
            done += steps * sum(self.result(run) is not None for run in runs)
        return done, total


def final_loss(result: dict[str, Any]) -> float:
    """The last evaluation's loss; infinite for a run that diverged.

    Args:
        result: of a run.
    """
    return math.inf if result["diverged"] else float(result["final"]["loss"])


def execute(comparison: Comparison, jobs: int, quiet: bool = False) -> None:
    """Run all that is missing.

    Args:
        comparison: what to run; it gets the results, and what failed.
        jobs: processes; with 1 everything runs in this one.
        quiet: show no progress.
    """
    done, total = comparison.steps()
    slow = 0.1 if sys.stderr.isatty() else 60.0  # a log needs no hundred lines
    with tqdm(total=total, initial=done, unit="step", disable=quiet, mininterval=slow) as bar:
        pool = _Pool(jobs, comparison.output) if jobs > 1 else None
        try:
            _Execution(comparison, bar, pool).run(max(1, jobs))
        finally:
            if pool is not None:
                pool.close()


class _Execution:
    def __init__(self, comparison: Comparison, bar: Any, pool: _Pool | None) -> None:
        self.comparison, self.bar, self.pool = comparison, bar, pool
        self.lock = threading.Lock()

    def run(self, jobs: int) -> None:
        if self.pool is None:
            while wanted := self.comparison.wanted():
                self._one(wanted[0], _here)
            return
        ended: queue.Queue[Path] = queue.Queue()
        running: set[Path] = set()
        while True:
            wanted = [r for r in self.comparison.wanted() if self._path(r) not in running]
            for run in wanted[: jobs - len(running)]:
                running.add(self._path(run))
                threading.Thread(target=self._start, args=(run, ended), daemon=True).start()
            if not running:
                return
            running.discard(ended.get())

    def _path(self, run: Run) -> Path:
        return run.path(self.comparison.output)

    def _start(self, run: Run, ended: queue.Queue[Path]) -> None:
        assert self.pool is not None
        try:
            self._one(run, self.pool.perform)
        finally:
            ended.put(self._path(run))

    def _one(self, run: Run, perform: Callable[..., None]) -> None:
        shown = 0

        def progress(step: int) -> None:
            nonlocal shown
            with self.lock:
                self.bar.set_description(f"{run.task.name} {run.label}", refresh=False)
                self.bar.update(step - shown)
            shown = step

        path = self._path(run)
        try:
            perform(run, path, progress)
        except Exception as error:
            self.comparison.failed[path] = f"{run.title}: {error}"
            self._note(run)
            line = f"{run.title}: failed"
        else:
            result = self.comparison.result(run)
            assert result is not None
            line = (
                f"{run.title}: loss {final_loss(result):.4f}, "
                f"{result['wall_seconds']:.0f} s ({result['processor_seconds']:.0f} of processor)"
            )
        with self.lock:
            self.bar.update(run.task.training.steps - shown)
            if not self.bar.disable:
                self.bar.write(line, file=sys.stderr)

    def _note(self, run: Run) -> None:
        """Where a run failed, for those who want to mend it."""
        path = self.comparison.output / "logs" / "failed.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock, path.open("a") as file:
            file.write(f"{run.title}\n{traceback.format_exc()}\n")


def _here(run: Run, path: Path, progress: Callable[[int], None]) -> None:
    results.perform(run, path, progress)


class _Pool:
    """Worker processes, each of which does one run at a time.

    Args:
        jobs: their number.
        output: folder of the results; what workers print goes to ``logs`` there.
    """

    def __init__(self, jobs: int, output: Path) -> None:
        self.free: queue.Queue[int] = queue.Queue()
        self.workers: dict[int, subprocess.Popen[str]] = {}
        self.logs = output / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        for number in range(jobs):
            self.free.put(number)

    def _worker(self, number: int) -> subprocess.Popen[str]:
        worker = self.workers.get(number)
        if worker is None or worker.poll() is not None:
            code = WORKER.format(path=json.dumps([entry for entry in sys.path if entry]))
            with (self.logs / f"worker-{number}.log").open("a") as log:
                worker = self.workers[number] = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                )  # fmt: skip
        return worker

    def perform(self, run: Run, path: Path, progress: Callable[[int], None]) -> None:
        """Have a free worker do a run.

        Args:
            run: the run.
            path: of its result.
            progress: told the number of steps done.

        Raises:
            RuntimeError: the run failed, or its process died.
        """
        number = self.free.get()
        try:
            worker = self._worker(number)
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(json.dumps({"run": run.to_json(), "path": str(path)}) + "\n")
            worker.stdin.flush()
            for line in worker.stdout:
                answer = json.loads(line)
                if "step" in answer:
                    progress(answer["step"])
                elif "error" in answer:
                    raise RuntimeError(answer["error"])
                else:
                    return
            code = worker.wait()
            raise RuntimeError(
                f"its process ended with code {code}; see {self.logs / f'worker-{number}.log'}"
            )
        finally:
            self.free.put(number)

    def close(self) -> None:
        """End the workers, and with them what they are at."""
        for worker in self.workers.values():
            if worker.stdin is not None:
                worker.stdin.close()
        for worker in self.workers.values():
            try:
                worker.wait(5)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
