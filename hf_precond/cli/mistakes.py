"""Mistakes on the command line of a launched script: one sentence and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import functools
import linecache
import re
import subprocess
import sys
import traceback
from types import TracebackType
from typing import Any, NoReturn

from hf_precond.registry import list_optimizers

_MARK = "_hf_precond"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and where the remedy stands.

        Args:
            message: argparse's.
        """
        pattern = r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)"
        unknown = re.match(pattern, message)
        if unknown:
            names = [name.strip("' ") for name in unknown[2].split(",")]
            near = difflib.get_close_matches(unknown[1], names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            message = f"{unknown[1]!r} is no command{hint} The commands are {', '.join(names)}."
        else:
            message = f"{message}; `{self.prog} --help` shows the usage."
        tell(message)
        sys.exit(2)


def install() -> None:
    """Register the names in this process, and let mistakes in them end in one sentence.

    In a process that was started by a launched script; the launcher itself
    calls :func:`explained`.
    """
    from hf_precond.integrations.registration import register

    register()
    watch_arguments()
    if not hasattr(sys.excepthook, _MARK):
        sys.excepthook = _explaining(sys.excepthook)


def watch_arguments() -> None:
    """Let a parser's error for a name that is nearly one of ours be one sentence."""
    if not hasattr(argparse.ArgumentParser.error, _MARK):
        parser: Any = argparse.ArgumentParser
        parser.error = _suggesting(parser.error)


def explained(error: BaseException, trace: TracebackType | None = None) -> str | None:
    """The sentence for an error that is a mistake in what the Trainer was given.

    That is an error which this package raised itself, called by transformers.

    Args:
        error: the error.
        trace: its traceback, the error's own by default.

    Returns:
        The sentence; empty where another process has already said it (behind
        ``accelerate launch``); ``None`` for any other error.
    """
    frames = list(traceback.walk_tb(trace or error.__traceback__))
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    if isinstance(error, subprocess.CalledProcessError):
        return "" if error.returncode == 2 and "accelerate.commands.launch" in modules else None
    if not frames or not isinstance(error, (ValueError, OSError)):
        return None
    frame, line = frames[-1]
    raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    called = ("transformers.", "hf_precond.integrations.")
    if not raised or not modules[-1].startswith("hf_precond."):
        return None
    if not any(module.startswith(called) for module in modules):
        return None
    return " ".join(str(error).split())


def tell(sentence: str) -> None:
    """Print a sentence on stderr, unless it is empty.

    Args:
        sentence: see :func:`explained`.
    """
    if sentence:
        print(f"hf_precond: {sentence}", file=sys.stderr)


def _explaining(hook: Any) -> Any:
    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sentence = explained(error, trace)
        if sentence is None:
            hook(kind, error, trace)
            return
        tell(sentence)
        raise SystemExit(2)  # Python ends with the code of what its hook raises

    setattr(show, _MARK, True)
    return show


def _suggesting(error: Any) -> Any:
    """``ArgumentParser.error``: one sentence for a name that is nearly one of ours."""

    @functools.wraps(error)
    def refuse(self: argparse.ArgumentParser, message: str) -> NoReturn:
        given = re.match(r"argument --optim\b.*?: invalid choice: '?([^' ]+)'?", message)
        near = given and difflib.get_close_matches(given[1].lower(), list_optimizers(), n=1)
        if given and near:
            tell(f"--optim {given[1]}: there is no such optimizer; did you mean {near[0]!r}?")
            sys.exit(2)
        error(self, message)
        raise AssertionError("argparse ends the process")

    setattr(refuse, _MARK, True)
    return refuse
