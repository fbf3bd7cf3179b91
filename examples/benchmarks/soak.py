"""Training that is disturbed: non-finite batches, killed processes, resumed runs, on two ranks.

    python examples/benchmarks/soak.py --folder out/soak
    python examples/benchmarks/soak.py --folder out/soak --optim nkfac --steps 200 --seeds 0 1

Two processes (``soak_rank.py``; gloo, CPU) train a small BERT with ``PrecondTrainer``. For each
optimizer there is one undisturbed run a seed, and one disturbed run with the first seed. In the
disturbed run

- samples that hold NaN or infinities are spread over the data, so that about 1 % of the steps
  (``--bad-share``) meet one. ``skip_nonfinite=true`` leaves those steps out;
- every ``--kill-every`` steps (plus up to 99, and once while a checkpoint is being written) rank
  0, rank 1 or both are killed with SIGKILL. What is left of the job is ended, and a new one
  resumes from the newest whole checkpoint (``resume_from_checkpoint=True``).

All runs see the same samples in the same order for the same seed. Recorded per run: the loss
curve, the loss on samples of the same task that were not trained on, each rank's resident memory
every 50 steps, the skipped steps, and a digest of every rank's final weights.

``FOLDER/soak.json`` holds everything, ``FOLDER/soak.png`` the curves; a table is printed. Runs
that are already in ``soak.json`` are not repeated. The exit code is 1 where a disturbed run ends
outside the undisturbed ones' noise (three standard deviations of their final loss between seeds,
at least 0.02), where ranks differ, or where memory grows by more than a tenth between step 200 of
a process and its last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAMES = ["afopt", "adamr", "muon", "nkfac", "sgdph"]
RANKS = 2
SAVE_EVERY = 100
WARM = 200
"""Steps of a process before its memory counts."""


@dataclass
class Run:
    """One run, through all its restarts.

    Args:
        optim: name of the optimizer.
        seed: of the initial weights and of the order of the samples.
        disturbed: with bad samples and kills.
        losses: ``[step, training loss]``, means over 20 steps.
        final_loss: mean training loss of the last tenth.
        test_loss: on other samples, after training.
        skipped: steps left out, counted by the optimizer.
        kills: steps at which processes were killed.
        memory: per process ``[rank, first step, MiB at its WARM-th step, MiB at its last]``.
        equal: whether both ranks ended with the same weights.
        seconds: wall time of all processes.
    """

    optim: str
    seed: int
    disturbed: bool
    losses: list[tuple[int, float]] = field(default_factory=list)
    final_loss: float = 0.0
    test_loss: float = 0.0
    skipped: float = 0.0
    kills: list[int] = field(default_factory=list)
    memory: list[tuple[int, int, float, float]] = field(default_factory=list)
    equal: bool = False
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """The run's name."""
        return f"{self.optim}-{self.seed}-{'disturbed' if self.disturbed else 'undisturbed'}"

    @property
    def growth(self) -> float:
        """Largest relative growth of a process's memory after warm-up."""
        return max((last / warm - 1 for _, _, warm, last in self.memory), default=0.0)


def start(run: Run, folder: Path, steps: int, bad: int) -> list[subprocess.Popen]:
    """The ranks of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("soak_rank.py")
    command = [sys.executable, str(script), "--folder", str(folder), "--optim", run.optim]
    command += ["--steps", str(steps), "--seed", str(run.seed), "--save-every", str(SAVE_EVERY)]
    command += ["--bad", str(bad)]
    processes = []
    for rank in range(RANKS):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with (folder / f"log{rank}.txt").open("ab") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


def number_in(path: Path) -> int:
    """The step that a rank has told, 0 before."""
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return 0


def end(processes: list[subprocess.Popen], patience: float) -> None:
    """Wait until the ranks have ended; kill those that have not within ``patience`` seconds."""
    until = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def targets(steps: int, every: int, seed: int) -> list[tuple[int, bool, tuple[int, ...]]]:
    """Step, whether to wait for a checkpoint's first file, and the ranks to kill."""
    chance = random.Random(seed)
    victims = ((1,), (0,), (0, 1))
    marks = range(every, steps, every)
    found = []
    for number, mark in enumerate(marks):
        if number == 1:
            found.append((mark - mark % SAVE_EVERY, True, (0, 1)))
        else:
            step = min(mark + chance.randrange(100), steps - 1)
            found.append((step, False, victims[number % 3]))
    return found


def train(run: Run, folder: Path, steps: int, every: int, bad: int) -> Run:
    """Start, kill and resume one run until it is done."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    waiting, began = targets(steps, every, run.seed) if run.disturbed else [], time.monotonic()
    while True:
        processes = start(run, folder, steps, bad)
        while all(process.poll() is None for process in processes):
            if waiting and is_time(folder, *waiting[0][:2]):
                _, _, victims = waiting.pop(0)
                run.kills.append(number_in(folder / "step"))
                for rank in victims:
                    os.kill(processes[rank].pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        else:
            end(processes, 120.0)
            if all(process.returncode == 0 for process in processes):
                break
            raise RuntimeError(f"{run.key} failed; see {folder}/log0.txt and log1.txt")
        # The rank that is left notices that its peer is gone, as under torchrun.
        end(processes, 20.0)
    run.seconds = time.monotonic() - began
    results = [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(RANKS)]
    run.losses, run.test_loss = results[0]["losses"], results[0]["test_loss"]
    run.skipped = results[0]["skipped"]
    run.equal = results[0]["digest"] == results[1]["digest"]
    tail = [loss for step, loss in run.losses if step > 0.9 * steps]
    run.final_loss = statistics.fmean(tail)
    run.memory = read_memory(folder)
    return run


def is_time(folder: Path, step: int, saving: bool) -> bool:
    """Whether the step is reached; with ``saving`` when its checkpoint has been begun."""
    if number_in(folder / "step") < step:
        return False
    return not saving or (folder / "run" / f"checkpoint-{step}" / "optimizer.pt").exists()


def read_memory(folder: Path) -> list[tuple[int, int, float, float]]:
    """Memory of every process that lived longer than ``WARM`` steps, as in :class:`Run`."""
    found = []
    for rank in range(RANKS):
        lives: dict[int, list[tuple[int, float]]] = {}
        for line in (folder / f"memory{rank}.jsonl").read_text().splitlines():
            _, first, step, size = json.loads(line)
            lives.setdefault(first, []).append((step - first, size))
        for first, sizes in lives.items():
            late = [size for age, size in sizes if age >= WARM]
            if len(late) > 1:
                found.append((rank, first, round(late[0], 1), round(late[-1], 1)))
    return found


# What is reported --------------------------------------------------------------------


def verdicts(runs: list[Run]) -> list[str]:
    """What is wrong with the runs, in one line each."""
    wrong = []
    for run in runs:
        if not run.equal:
            wrong.append(f"{run.key}: the ranks' weights differ")
        if run.growth > 0.1:
            wrong.append(f"{run.key}: memory grows by {100 * run.growth:.0f} %")
        calm = [r for r in runs if r.optim == run.optim and not r.disturbed]
        twin = next((r for r in calm if r.seed == run.seed), None)
        if not run.disturbed or twin is None:
            continue
        for what in ("final_loss", "test_loss"):
            values = [getattr(r, what) for r in calm]
            noise = 3 * statistics.stdev(values) if len(values) > 1 else 0.0
            change = getattr(run, what) - getattr(twin, what)
            if not abs(change) <= max(noise, 0.02):
                wrong.append(f"{run.key}: {what} differs by {change:+.3f} (noise {noise:.3f})")
    return wrong


def table(runs: list[Run]) -> str:
    """A line a run."""
    head = "| run | final loss | test loss | skipped | killed at steps | MiB at 200 / last | s |"
    lines = [head, "|---" * 7 + "|"]
    for run in runs:
        longest = max(run.memory, key=lambda m: m[3], default=(0, 0, 0.0, 0.0))
        lines.append(
            f"| {run.key} | {run.final_loss:.4f} | {run.test_loss:.4f} | {run.skipped:.0f} | "
            f"{', '.join(map(str, run.kills)) or '-'} | {longest[2]:.0f} / {longest[3]:.0f} | "
            f"{run.seconds:.0f} |"
        )
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Loss curves: undisturbed runs grey, disturbed ones in colour, kills marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(run.optim for run in runs))
    rows = (len(names) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(10, 3.6 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for run in sorted((r for r in runs if r.optim == name), key=lambda r: r.disturbed):
            style = {"color": "tab:red", "lw": 1} if run.disturbed else {"color": "0.6", "lw": 2}
            label = "bad batches and kills" if run.disturbed else f"undisturbed, seed {run.seed}"
            axis.plot(*zip(*run.losses, strict=True), label=label, **style)
            for step in run.kills:
                axis.axvline(step, color="k", lw=0.8, ls=":")
        axis.set(title=f"{name} (dotted: a job was killed)", xlabel="step", ylabel="training loss")
        axis.legend(fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--optim", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kill-every", type=int, default=300)
    parser.add_argument("--bad-share", type=float, default=0.01)
    parser.add_argument("--folder", type=Path, default=Path("out/soak"))
    options = parser.parse_args()
    record = options.folder / "soak.json"
    done = json.loads(record.read_text()) if record.exists() else []
    known = {run.key: run for run in (Run(**values) for values in done)}
    wanted = [
        Run(name, seed, disturbed)
        for name in options.optim
        for seed, disturbed in [(options.seeds[0], True), *((s, False) for s in options.seeds)]
    ]
    for run in wanted:
        if run.key not in known:
            folder = options.folder / run.key
            bad = round(options.bad_share * options.steps) if run.disturbed else 0
            known[run.key] = train(run, folder, options.steps, options.kill_every, bad)
            draft = record.with_suffix(".draft")
            draft.write_text(json.dumps([asdict(r) for r in known.values()]))
            os.replace(draft, record)
            print(table([known[run.key]]).splitlines()[-1], flush=True)
    runs = [known[run.key] for run in wanted]
    print(table(runs))
    plot(runs, options.folder / "soak.png")
    wrong = verdicts(runs)
    print("\n".join(wrong) or "as it should be")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
