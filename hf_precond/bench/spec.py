"""The file that says what is compared: tasks, optimizers, grids, seeds, budgets."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_precond.bench import optimizers
from hf_precond.bench.search import fewest_trials

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")
ORDER = {"lr": 0, "momentum": 1, "beta1": 1, "weight_decay": 2}
"""In which order fields are tuned, wherever they stand; all others follow as the file has them."""


@dataclass(frozen=True)
class Training:
    """How every run of a task is trained, the same for all optimizers.

    Args:
        steps: optimizer steps of a run.
        warmup: share of the steps in which the rate rises linearly.
        schedule: what follows: ``cosine`` or ``linear`` to 0, or ``constant``.
        clip: largest norm of the gradient; 0 for none.
        eval_every: steps between two evaluations.
        eval_every_late: the same towards the end.
        late: the share of the steps that counts as the end.
        device: ``cpu``, ``cuda``, ``cuda:1``.
        precision: ``float32``, or ``bfloat16`` for autocast.
        threads: of torch, in each process.
    """

    steps: int = 300
    warmup: float = 0.1
    schedule: str = "cosine"
    clip: float = 1.0
    eval_every: int = 20
    eval_every_late: int = 5
    late: float = 0.2
    device: str = "cpu"
    precision: str = "float32"
    threads: int = 1

    def evaluated(self) -> list[int]:
        """The steps after which a reported run is evaluated; the last one always."""
        late = self.steps - round(self.late * self.steps)
        return [
            step
            for step in range(1, self.steps + 1)
            if step == self.steps
            or step % (self.eval_every_late if step > late else self.eval_every) == 0
        ]


@dataclass(frozen=True)
class TaskSpec:
    """What is trained.

    Args:
        name: its name in the file.
        function: a task of this package (``gpt``), ``module:function`` or
            ``file.py:function``; ``None`` for a script.
        script: path of a script with a ``Trainer``; ``None`` for a function.
        args: keyword arguments of the function; arguments of the script.
        data: the data folder, handed to functions that take ``data``.
        digest: of the file that holds the function or script: an edited task
            is another one.
        training: how it is trained.
    """

    name: str
    function: str | None
    script: str | None
    args: Any
    data: str | None
    digest: str
    training: Training


@dataclass(frozen=True)
class Entry:
    """An optimizer on a task.

    Args:
        label: its name in the file and the tables.
        optimizer: a name of :func:`hf_precond.bench.optimizers.names`.
        fields: fields that are not tuned.
        grid: field to the values it is tuned over, in order; empty for none.
        start: values of tuned fields before they are tuned.
    """

    label: str
    optimizer: str
    fields: dict[str, Any]
    grid: dict[str, list[Any]]
    start: dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """A whole comparison.

    Args:
        tasks: the tasks.
        entries: task to its optimizers, by label.
        trials: settings that are tried, the same number for each optimizer.
        tuning_seeds: seeds of the trials.
        seeds: seeds that are reported.
        reference: labels of the optimizers whose final loss others are timed to.
        output: folder of the results, as the file names it.
        text: the file's content.
    """

    tasks: dict[str, TaskSpec]
    entries: dict[str, dict[str, Entry]]
    trials: int
    tuning_seeds: list[int]
    seeds: list[int]
    reference: list[str]
    output: str
    text: str


@dataclass(frozen=True)
class Run:
    """One training: everything that decides its outcome.

    Args:
        task: the task.
        label: the optimizer's name in the tables.
        optimizer: its name.
        fields: its fields.
        seed: of weights and batches.
        course: evaluated along the way, not at the end alone.
    """

    task: TaskSpec
    label: str
    optimizer: str
    fields: dict[str, Any]
    seed: int
    course: bool = False

    @property
    def key(self) -> str:
        """A hash of all but the label: equal runs are not repeated."""
        values = dataclasses.asdict(self)
        del values["label"], values["task"]["name"], values["task"]["training"]["threads"]
        text = json.dumps(values, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """A line for people: task, optimizer, seed and fields."""
        return f"{self.task.name} {self.label} seed {self.seed} {shown(self.fields)}".rstrip()

    def path(self, output: Path) -> Path:
        """The file of its result.

        Args:
            output: folder of the comparison.
        """
        return output / "runs" / self.task.name / self.label / f"{self.key}.json"

    def to_json(self) -> str:
        """One line that :meth:`from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The run that :meth:`to_json` wrote.

        Args:
            text: a line.
        """
        values = json.loads(text)
        task = values.pop("task")
        training = Training(**task.pop("training"))
        return cls(task=TaskSpec(**task, training=training), **values)


def shown(fields: Mapping[str, Any]) -> str:
    """Fields as ``lr=0.004, beta1=0.9``."""
    return ", ".join(
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()
    )


def load(path: str | Path, data: str | None = None) -> Spec:
    """Read and check a file, TOML or JSON.

    Args:
        path: the file.
        data: a data folder for every task, in place of the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the table and the field that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    text = path.read_text()
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        return _Reader(values, path.parent, data).spec(path.stem, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _Reader:
    """The values of a file, checked."""

    def __init__(self, values: dict[str, Any], folder: Path, data: str | None) -> None:
        self.values, self.folder, self.data = values, folder, data

    def spec(self, stem: str, text: str) -> Spec:
        own = {f.name for f in dataclasses.fields(Spec)} - {"entries", "text"}
        training = {f.name for f in dataclasses.fields(Training)}
        _known("top level", self.values, own | training | {"optimizers", "grid", "data"})
        tasks = {name: self._task(name, t) for name, t in self._tables("tasks").items()}
        labels = self._tables("optimizers")
        entries = {
            task: {label: self._entry(label, table, task) for label, table in labels.items()}
            for task in tasks
        }
        for label, table in labels.items():
            unknown = set(table.get("on", {})) - set(tasks)
            if unknown:
                raise ValueError(
                    f"[optimizers.{label}.on]: {', '.join(sorted(unknown))} is no task of this "
                    f"file; its tasks are {', '.join(tasks)}."
                )
        spec = Spec(
            tasks=tasks,
            entries=entries,
            trials=self._integer("trials", 10, 1),
            tuning_seeds=self._seeds("tuning_seeds", [0]),
            seeds=self._seeds("seeds", [1, 2, 3]),
            reference=_listed(self.values.get("reference", [])),
            output=str(self.values.get("output", f"outputs/{stem}")),
            text=text,
        )
        self._check(spec)
        return spec

    def _path(self, name: str) -> Path:
        """A path beside the file, else in the working directory."""
        beside = (self.folder / name).resolve()
        return beside if beside.exists() or not Path(name).exists() else Path(name).resolve()

    def _tables(self, name: str) -> dict[str, dict[str, Any]]:
        tables = self.values.get(name)
        if not isinstance(tables, dict) or not tables:
            raise ValueError(f"there is no [{name}.NAME]; a comparison needs at least one.")
        for key, table in tables.items():
            if not isinstance(table, dict):
                raise ValueError(f"{name}.{key} is {table!r}; write a table [{name}.{key}].")
        return tables

    def _integer(self, name: str, default: int, low: int) -> int:
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} = {value!r}: it is an integer of at least {low}.")
        return value

    def _seeds(self, name: str, default: list[int]) -> list[int]:
        seeds = self.values.get(name, default)
        good = isinstance(seeds, list) and seeds
        if not good or any(not isinstance(s, int) or isinstance(s, bool) for s in seeds):
            raise ValueError(f"{name} = {seeds!r}: it is a list of integers, such as {default}.")
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"{name} = {seeds!r}: a seed is there twice.")
        return list(seeds)

    def _task(self, name: str, table: dict[str, Any]) -> TaskSpec:
        training = {f.name for f in dataclasses.fields(Training)}
        _known(f"[tasks.{name}]", table, training | {"function", "script", "args", "data"})
        function, script = table.get("function"), table.get("script")
        if function and script:
            raise ValueError(f"[tasks.{name}] has a function and a script; leave one out.")
        args = table.get("args", [] if script else {})
        if not isinstance(args, list if script else dict):
            raise ValueError(
                f"[tasks.{name}] args = {args!r}: a script takes a list of words, a function a "
                "table {name = value}."
            )
        data = self.data or table.get("data", self.values.get("data"))
        if data is not None:
            data = str(Path(data).resolve() if self.data else self._path(data))
        if script:
            script = str(self._path(script))
            if not Path(script).is_file():
                raise ValueError(f"[tasks.{name}] script: there is no {script}.")
        else:
            function = self._function(name, function or name)
        source = Path(script or str(function).rpartition(":")[0])
        digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source.is_file() else ""
        given = {k: v for k, v in {**self.values, **table}.items() if k in training}
        return TaskSpec(name, function, script, args, data, digest, _training(name, given))

    def _function(self, name: str, function: str) -> str:
        from hf_precond.bench.tasks import names

        if function in names():
            return function
        place, _, attribute = function.rpartition(":")
        if not place or not attribute:
            near = difflib.get_close_matches(function, names(), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"[tasks.{name}] function = {function!r}{hint}: it is one of {', '.join(names())}, "
                "or module:function, or file.py:function."
            )
        if place.endswith(".py"):
            path = self._path(place)
            if not path.is_file():
                raise ValueError(f"[tasks.{name}] function: there is no {path}.")
            return f"{path}:{attribute}"
        return function

    def _entry(self, label: str, table: dict[str, Any], task: str) -> Entry:
        where = f"[optimizers.{label}]"
        if not label.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"{where}: a name has letters, digits, '.', '-' and '_' only.")
        _known(where, table, ("optimizer", "fields", "grid", "on"))
        on = table.get("on", {}).get(task, {})
        _known(f"{where[:-1]}.on.{task}]", on, ("optimizer", "fields", "grid"))
        optimizer = on.get("optimizer", table.get("optimizer", label))
        fields = {**table.get("fields", {}), **on.get("fields", {})}
        own = {**table.get("grid", {}), **on.get("grid", {})}
        known = optimizers.field_names(optimizer)
        shared = {k: v for k, v in self.values.get("grid", {}).items() if k in known}
        grid = {name: _values(where, name, v) for name, v in {**shared, **own}.items()}
        kept = sorted((name for name in grid if grid[name]), key=lambda n: ORDER.get(n, 3))
        grid = {name: grid[name] for name in kept}  # an empty list: not tuned here
        start = {name: fields.pop(name) for name in list(fields) if name in grid}
        for name, values in grid.items():
            for value in values:
                optimizers.check(optimizer, {**fields, name: value})
        optimizers.check(optimizer, {**fields, **start})
        return Entry(label, optimizer, fields, grid, start)

    def _check(self, spec: Spec) -> None:
        both = sorted(set(spec.seeds) & set(spec.tuning_seeds))
        entries = [entry for of_task in spec.entries.values() for entry in of_task.values()]
        tuned = [entry for entry in entries if entry.grid]
        if tuned and both:
            raise ValueError(
                f"seeds and tuning_seeds both have {', '.join(map(str, both))}: results on a seed "
                "that settings were chosen on look better than they are; take other seeds."
            )
        for task, of_task in spec.entries.items():
            for entry in of_task.values():
                if not entry.grid and any(e.grid for e in of_task.values()):
                    raise ValueError(
                        f"[optimizers.{entry.label}] has no grid on {task} while others are tuned "
                        "there: give it one (an equal number of trials for each), or drop theirs."
                    )
                fewest = fewest_trials(entry.grid, entry.start) if entry.grid else 0
                if fewest > spec.trials:
                    raise ValueError(
                        f"trials = {spec.trials}: the grids of {entry.label} on {task} alone have "
                        f"{fewest}; raise it (grids may have to be extended), or drop values."
                    )
                if spec.tasks[task].script:
                    optimizers.check_for_script(entry.optimizer, entry.fields)
        for label in spec.reference:
            if label not in self.values["optimizers"]:
                raise ValueError(f"reference = {label!r}: there is no [optimizers.{label}].")
        if len(spec.reference) > 2:
            raise ValueError("reference: at most two optimizers fit the table; drop some.")


def _known(where: str, table: Mapping[str, Any], names: Iterable[str]) -> None:
    names = sorted(names)
    for name in table:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            known = ", ".join(names)
            raise ValueError(f"{where} {name}: unknown{hint} The names here are {known}.")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _values(where: str, name: str, values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError(f"{where} grid.{name} = {values!r}: it is a list of values.")
    real = name == "lr" or any(isinstance(value, float) for value in values)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return [float(value) for value in values] if real and numbers else values


def _training(name: str, values: Mapping[str, Any]) -> Training:
    """The settings of a task, each of its default's type and in range."""
    ranges = {
        **dict.fromkeys(("steps", "eval_every", "eval_every_late", "threads"), (1, 10**9)),
        **dict.fromkeys(("warmup", "late"), (0.0, 1.0)),
        "clip": (0.0, float("inf")),
    }
    choices = {"schedule": SCHEDULES, "precision": PRECISIONS}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        default = getattr(Training, key)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        low, high = ranges.get(key, (None, None))
        good = isinstance(value, kinds) and not isinstance(value, bool)
        if good and low is not None:
            good = low <= value <= high
        if not good or value not in choices.get(key, (value,)):
            legal = (
                ", ".join(choices[key])
                if key in choices
                else ("text" if low is None else f"{type(default).__name__} in [{low:g}, {high:g}]")
            )
            raise ValueError(f"[tasks.{name}] {key} = {value!r}: legal is {legal}.")
        checked[key] = type(default)(value)
    return Training(**checked)


def runs_of(spec: Spec, entry: Entry, task: str, settings: Mapping[str, Any], seeds: Iterable[int],
            course: bool) -> list[Run]:  # fmt: skip
    """The runs of some settings, one a seed.

    Args:
        spec: the comparison.
        entry: the optimizer.
        task: the task's name.
        settings: values of the tuned fields.
        seeds: the seeds.
        course: whether they are evaluated along the way.
    """
    fields = {**entry.fields, **settings}
    return [Run(spec.tasks[task], entry.label, entry.optimizer, fields, s, course) for s in seeds]
