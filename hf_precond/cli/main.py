"""``hf-precond`` and ``python -m hf_precond``."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import shutil
import sys
from collections.abc import Sequence

from hf_precond.cli import bench, compare, doctor, explain, fields, mistakes, run
from hf_precond.config.hub import version

COMMANDS = ("run", "list", "explain", "compare", "doctor", "bench")

EXAMPLES = """examples:
  hf-precond doctor                            does it work here?
  hf-precond list afopt                        the keys of --optim_args
  hf-precond explain ./my_model --optim afopt  what it does with a model
  hf-precond run run_glue.py --optim afopt ... train with any script
  hf-precond compare out/adamw out/afopt       what two trainings reached

`hf-precond COMMAND --help` has more of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script ``hf-precond``.

    Args:
        argv: the arguments, ``sys.argv[1:]`` by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"] and words[1:2] not in (["-h"], ["--help"]):
        # argparse would read the script's options as its own.
        return run.run(words[1:])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print `?` rather than fail
            stream.reconfigure(errors="replace")
    arguments = _parser().parse_args(words)
    try:
        code = int(arguments.act(arguments))
        sys.stdout.flush()  # a closed pipe is noticed here, not while the interpreter exits
        return code
    except BrokenPipeError:  # the reader (head, less) has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def launch(argv: Sequence[str]) -> int:
    """Run ``python -m hf_precond SCRIPT.py …``; the commands of ``hf-precond`` work too.

    Args:
        argv: the arguments.

    Returns:
        The exit code.
    """
    words = list(argv)
    if words[:1] == ["--version"]:
        return main(words)
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m hf_precond (SCRIPT.py | -m MODULE | PROGRAM) [its own arguments]\n")
        _parser().print_help()
        return 0 if words else 2
    if _names_a_command(words[0]):
        return main(words)
    return run.run(words)


def _names_a_command(word: str) -> bool:
    """Whether a word is a command, or nearly one where there is no such script or program."""
    if os.path.exists(word):
        return False
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.7)
    return word in COMMANDS or bool(near and shutil.which(word) is None)


def _parser() -> argparse.ArgumentParser:
    parser = mistakes.Parser(
        prog="hf-precond",
        description="Preconditioned optimizers for Hugging Face Transformers, by --optim NAME.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf_precond {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run.add_command(commands)
    fields.add_command(commands)
    explain.add_command(commands)
    compare.add_command(commands)
    doctor.add_command(commands)
    bench.add_command(commands)
    return parser
