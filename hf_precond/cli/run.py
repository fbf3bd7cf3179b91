"""``hf-precond run …``: a script or module as Python would run it, with the names registered."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_precond.cli.text import wrapped
from hf_precond.registry import list_optimizers

EXAMPLES = """examples:
  hf-precond run run_glue.py --optim afopt --learning_rate 1e-3 ...
  hf-precond run -m trl.scripts.sft --optim adamr ...
  hf-precond run trl sft --optim afopt --optim_args "lr_scale=3" ...
  torchrun --nproc_per_node 2 -m hf_precond run_glue.py --optim nkfac ...

Processes that the script starts know the names too; HF_PRECOND=0 keeps them
out of those."""


def add_command(commands: Any) -> None:
    """Add the command to the parser of ``hf-precond``.

    Args:
        commands: the parser's subparsers.
    """
    names = ", ".join(list_optimizers())
    parser = commands.add_parser(
        "run",
        help=f"run a training script with --optim {names}",
        usage="hf-precond run (SCRIPT.py | -m MODULE | PROGRAM) [its own arguments]",
        description=wrapped(
            "Run a training script, module or Python program, unmodified, with the "
            f"optimizers {names} registered."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", help="a script's path, `-m MODULE`, or a program such as trl")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its own arguments")
    parser.set_defaults(act=lambda arguments: run([arguments.script, *arguments.args]))


def run(words: Sequence[str]) -> int:
    """Run a script in this process, as ``python SCRIPT.py …`` or ``python -m MODULE …`` would.

    ``sys.path`` and ``sys.argv`` are the script's. Its exceptions are shown
    without the frames of this package, and its exit codes are returned. A
    mistake in ``--optim`` or ``--optim_args`` is one sentence. Python processes
    that it starts have the names too: ``PYTHONPATH`` gets the folder
    ``cli/startup``, unless ``HF_PRECOND`` is 0.

    Args:
        words: the script's path (or a folder or archive with a
            ``__main__.py``), or ``-m`` and a module, or the name of a Python
            program on ``PATH``; then its arguments.

    Returns:
        0 when the script ends without an error; 2 when there is no such
        script, for a mistake in the optimizer's arguments, or when
        transformers cannot take the names.
    """
    from hf_precond.cli import mistakes

    is_module = words[:1] == ["-m"]
    try:
        path = _origin(words[1:]) if is_module else _script(words)
    except LookupError as error:
        return _refuse(str(error.args[0]))
    from hf_precond.integrations.registration import register

    try:
        register()
    except RuntimeError as error:
        return _refuse(str(error))
    _share_with_children()
    mistakes.watch_arguments()
    sys.argv = [path, *words[1 + is_module :]]
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            _take_first_place(os.path.dirname(path))
            runpy.run_path(path, run_name="__main__")
    except (Exception, KeyboardInterrupt) as error:
        sentence = mistakes.explained(error)
        if sentence is not None:
            mistakes.tell(sentence)
            return 2
        sys.excepthook = _without_frames_before(path, sys.excepthook)
        raise
    _leave_process_group()
    return 0


def _script(words: Sequence[str]) -> str:
    """The path of a script or Python program.

    Raises:
        LookupError: there is none.
    """
    if not words:
        raise LookupError("no script was given; write `python -m hf_precond SCRIPT.py …`.")
    path = os.path.abspath(words[0])
    if not os.path.exists(path) and words[0].startswith("-"):
        raise LookupError(
            f"{words[0]} stands before the script; write SCRIPT.py first, then options."
        )
    if not os.path.exists(path) and os.path.basename(words[0]) == words[0]:
        beside = os.path.dirname(sys.executable)
        path = shutil.which(words[0]) or shutil.which(words[0], path=beside) or path
        if os.path.exists(path) and not _is_python(path):
            raise LookupError(f"{words[0]!r} ({path}) is no Python program; give a script's path.")
    if not os.path.exists(path):
        raise LookupError(f"there is no script at {words[0]!r} (looked for {path}).")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "__main__.py")):
        raise LookupError(f"{words[0]!r} is a folder without a __main__.py; give a script's path.")
    return path


def _is_python(path: str) -> bool:
    with open(path, "rb") as file:
        line = file.readline(200)
    return line.startswith(b"#!") and b"python" in line


def _origin(words: Sequence[str]) -> str:
    """The file of a module, with the working directory first on ``sys.path``, as ``-m`` puts it.

    Raises:
        LookupError: there is no such module, or it cannot be run.
    """
    if not words or words[0].startswith("-"):
        raise LookupError("no module was given; write `python -m hf_precond -m MODULE …`.")
    _take_first_place(os.getcwd())
    name = words[0]
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        raise LookupError(f"-m {words[0]}: there is no module {error.name!r}.") from error
    if spec is None or spec.origin is None:
        raise LookupError(f"-m {words[0]}: there is no module {name!r} that could be run.")
    return spec.origin


def _share_with_children() -> None:
    """Let Python processes that the script starts register the names too."""
    if os.environ.setdefault("HF_PRECOND", "1") in ("", "0"):
        return
    startup = str(Path(__file__).resolve().parent / "startup")
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if startup not in entries:
        os.environ["PYTHONPATH"] = os.pathsep.join([startup, *filter(None, entries)])


def _leave_process_group() -> None:
    """End a process group that a script left open: gloo's threads may abort a process at exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _refuse(sentence: str) -> int:
    print(f"hf_precond: {sentence}", file=sys.stderr)
    return 2


def _take_first_place(folder: str) -> None:
    """Put the script's folder first on ``sys.path``, as ``python SCRIPT.py`` does.

    It replaces the launcher's entry: the working directory (``-m``) or the
    folder of the console script. That entry goes to the end if this package
    was imported from there.
    """
    home = str(Path(__file__).resolve().parents[2])
    replaced = None if sys.flags.safe_path or not sys.path else sys.path.pop(0)
    sys.path.insert(0, folder)
    known = {os.path.abspath(entry) for entry in sys.path}
    if replaced is not None and os.path.abspath(replaced) == home and home not in known:
        sys.path.append(home)


def _without_frames_before(path: str, hook: Any) -> Any:
    """An ``excepthook`` that leaves out the frames above the script's own."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        own = trace
        while own is not None and not own.tb_frame.f_code.co_filename.startswith(path):
            own = own.tb_next
        hook(kind, error.with_traceback(own), own)

    return show
