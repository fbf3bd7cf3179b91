"""``hf-precond list``: the optimizers, and the fields of one."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from typing import Any


def add_command(commands: Any) -> None:
    """Add the command to ``hf-precond``'s parser."""
    parser = commands.add_parser("list", help="the optimizers, or the fields of one")
    parser.add_argument("name", nargs="?", help="an optimizer's name")
    parser.set_defaults(act=act)


def act(arguments: argparse.Namespace) -> int:
    """Print every optimizer with its line of description, or one with its fields.

    Returns:
        0; 2 for an unknown name.
    """
    from hf_precond.registry import get_info, list_optimizers

    if arguments.name is None:
        for name in list_optimizers():
            print(f"{name:<8} {get_info(name).description}")
        print("\n`hf-precond list NAME` shows the fields of one: the keys of --optim_args.")
        return 0
    try:
        info = get_info(arguments.name)
    except ValueError as error:
        print(f"hf_precond: {error}", file=sys.stderr)
        return 2
    print(f"{info.name}: {info.description}\n")
    print(f"{'field':<20} default")
    for field in dataclasses.fields(info.config_cls):
        default = field.default
        shown = ":".join(map(str, default)) if isinstance(default, tuple) else str(default)
        print(f"{field.name:<20} {shown}")
    for cls in (info.config_cls.__mro__[1], info.config_cls):
        print(f"\n{inspect.getdoc(cls)}")
    return 0
