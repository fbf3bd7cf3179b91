"""``hf-precond run SCRIPT.py …``: the script as Python would run it, with the names registered."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_precond.registry import list_optimizers


def add_command(commands: Any) -> None:
    """Add the command to the parser of ``hf-precond``.

    Args:
        commands: the parser's subparsers.
    """
    names = ", ".join(list_optimizers())
    parser = commands.add_parser("run", help=f"run a training script with --optim {names}")
    parser.add_argument("script", help="the script's path")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own arguments")
    parser.set_defaults(act=lambda arguments: run([arguments.script, *arguments.args]))


def run(words: Sequence[str]) -> int:
    """Run a script in this process, as ``python SCRIPT.py …`` would.

    The script's folder comes first on ``sys.path``, and ``sys.argv`` is the
    script's. Its exceptions are shown without the frames of this package, and
    its exit codes are returned.

    Args:
        words: the script's path (or a folder or archive with a
            ``__main__.py``) and its arguments.

    Returns:
        0 when the script ends without an error; 2 when there is no such
        script, or transformers cannot take the names.
    """
    if not words:
        return _refuse("no script was given; write `python -m hf_precond SCRIPT.py …`.")
    path = os.path.abspath(words[0])
    if words[0].startswith("-") and not os.path.exists(path):
        return _refuse(f"{words[0]} stands before the script; write SCRIPT.py first, then options.")
    if not os.path.exists(path):
        return _refuse(f"there is no script at {words[0]!r} (looked for {path}).")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "__main__.py")):
        return _refuse(f"{words[0]!r} is a folder without a __main__.py; give a script's path.")
    from hf_precond.integrations.registration import register

    try:
        register()
    except RuntimeError as error:
        return _refuse(str(error))
    sys.argv = [path, *words[1:]]
    _take_first_place(os.path.dirname(path))
    try:
        runpy.run_path(path, run_name="__main__")
    except (Exception, KeyboardInterrupt):
        sys.excepthook = _without_frames_before(path, sys.excepthook)
        raise
    _leave_process_group()
    return 0


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

    def show(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        own = trace
        while own is not None and not own.tb_frame.f_code.co_filename.startswith(path):
            own = own.tb_next
        hook(kind, error.with_traceback(own), own)

    return show
