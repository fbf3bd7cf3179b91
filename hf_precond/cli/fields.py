"""``hf-precond list``: the optimizers, and the fields of one."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from typing import Any

from hf_precond.cli.text import terminal_width, wrapped

EXAMPLES = """examples:
  hf-precond list            the optimizers
  hf-precond list afopt      its fields: the keys of --optim_args"""


def add_command(commands: Any) -> None:
    """Add the command to the parser of ``hf-precond``.

    Args:
        commands: the parser's subparsers.
    """
    parser = commands.add_parser(
        "list",
        help="the optimizers, or the fields of one",
        description=wrapped(
            "List the optimizers, or the fields of one with types, ranges and defaults."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="an optimizer's name")
    parser.set_defaults(act=list_command)


def list_command(arguments: argparse.Namespace) -> int:
    """Print the optimizers with their descriptions, or one with its fields.

    Args:
        arguments: ``name``, or ``None`` for all.

    Returns:
        0; 2 for an unknown name.
    """
    from hf_precond.registry import get_info, list_optimizers

    if arguments.name is None:
        names = list_optimizers()
        width = max(8, *map(len, names))
        for name in names:
            try:
                line = get_info(name).description
            except Exception as error:  # of another package, say; the others are listed
                line = f"cannot be used: {error}"
            print(f"{name:<{width}} {line}")
        print("\n`hf-precond list NAME` shows the fields of one: the keys of --optim_args.")
        return 0
    try:
        info = get_info(arguments.name)
    except ValueError as error:
        print(f"hf_precond: {error}", file=sys.stderr)
        return 2
    print(f"{info.name}: {info.description}")
    print(f"{info.rate}\n" if info.rate else "")
    print(field_table(info.config_cls, min(100, terminal_width())))
    return 0


def field_table(config_cls: Any, width: int) -> str:
    """The fields of a config: name and default, then type, range and meaning.

    Choices that the meaning names are not listed apart.

    Args:
        config_cls: the config class.
        width: columns.

    Returns:
        The text, the optimizer's own fields first.
    """
    from hf_precond.config.base import OptimizerConfig

    fields = config_cls._fields()
    meanings: dict[str, str] = {}
    for cls in reversed(config_cls.__mro__):
        meanings |= _described(inspect.getdoc(cls) or "")
    shared = [name for name in OptimizerConfig._fields() if name in fields]
    own = [name for name in fields if name not in shared]
    lines = ['--optim_args "key=value,key=value" takes these fields. With their defaults:']
    for title, names in (("its own", own), ("of every optimizer", shared)):
        lines += ["", f"[{title}]"] if names else []
        for name in names:
            item, default = fields[name], fields[name].default
            shown = ":".join(map(str, default)) if isinstance(default, tuple) else str(default)
            lines.append(f"{name:<18} {shown}")
            text, meaning = item.legal().replace("'", ""), meanings.get(name)
            if meaning is not None:
                text = meaning if _names_choices(item, meaning) else f"{text}: {meaning}"
            pad = "    "
            lines.append(textwrap.fill(text, width, initial_indent=pad, subsequent_indent=pad))
    return "\n".join(lines)


def _names_choices(item: Any, meaning: str) -> bool:
    """Whether a description names every value that a field may have."""
    choices = {*item.choices, "None"} if item.optional else {*item.choices}
    return bool(item.choices) and choices <= {*re.findall(r"\w+", meaning)}


def _described(doc: str) -> dict[str, str]:
    """Field to its description in plain text, without range and default, which stand apart."""
    section = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", doc, re.DOTALL | re.MULTILINE)
    entries = re.findall(
        r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.DOTALL | re.MULTILINE
    )
    described = {}
    for name, text in entries:
        text = " ".join(text.split())
        text = re.sub(r",? (?:each )?in [\[(][\d.]+, [\d.]+[\])]|, >=? [\d.]*\d", "", text)
        text = text.replace("``", "").replace("`", "")
        value = r"[-\w.]*\w(?: and [-\w.]*\w)?"
        text = re.sub(rf" Default {value}\.(?= |$)", "", text)
        text = re.sub(rf"\. Default {value}; ", "; ", text)
        described[name] = text.strip()
    return described
