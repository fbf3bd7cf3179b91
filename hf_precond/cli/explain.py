"""``hf-precond list`` and ``hf-precond explain``: the optimizers, and what they do to a model."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from typing import Any


def add_commands(commands: Any) -> None:
    """Add both commands to the parser of ``hf-precond``.

    Args:
        commands: the parser's subparsers.
    """
    parser = commands.add_parser("list", help="the optimizers, or the fields of one")
    parser.add_argument("name", nargs="?", help="an optimizer's name")
    parser.set_defaults(act=list_command)
    parser = commands.add_parser(
        "explain", help="how an optimizer would treat a model's parameters, and the memory it takes"
    )
    parser.add_argument("model", help="folder or Hub id of a model, or of its config.json alone")
    parser.add_argument("--optim", required=True, help="an optimizer's name")
    parser.add_argument("--optim_args", default=None, help="key=value,… as for training")
    parser.add_argument(
        "--auto_class",
        default=None,
        metavar="CLASS",
        help="AutoModelForSequenceClassification and the like; by default the architecture that "
        "the model was saved with",
    )
    parser.set_defaults(act=explain_command)


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
    print(f"{info.name}: {info.description}\n")
    print(f"{'field':<20} default")
    for field in dataclasses.fields(info.config_cls):
        default = field.default
        shown = ":".join(map(str, default)) if isinstance(default, tuple) else str(default)
        print(f"{field.name:<20} {shown}")
    for cls in (info.config_cls.__mro__[1], info.config_cls):
        print(f"\n{inspect.getdoc(cls)}")
    return 0


def explain_command(arguments: argparse.Namespace) -> int:
    """Print how an optimizer updates every parameter of a model, and the memory of its state.

    Args:
        arguments: ``model``, ``optim``, ``optim_args`` and ``auto_class``.

    Returns:
        0; 2 when the model, the name or a field cannot be used.
    """
    try:
        model, auto_class = arguments.model, arguments.auto_class
        text = explanation(model, arguments.optim, arguments.optim_args, auto_class)
    except (ValueError, OSError) as error:
        # Offline, transformers names the host that it could not reach, not the model.
        named = arguments.model in str(error) or str(error).startswith("--optim_args")
        subject = f"{arguments.model}: " * (isinstance(error, OSError) and not named)
        print(f"hf_precond: {subject}{error}", file=sys.stderr)
        return 2
    print(text)  # not above: a closed pipe is an OSError too
    return 0


def explanation(
    model: str, name: str, optim_args: str | None = None, auto_class: str | None = None
) -> str:
    """Routing table and memory of an optimizer on a model built from its config.

    The model is built on the meta device: it has no weights.

    Args:
        model: folder or Hub id.
        name: the optimizer's name.
        optim_args: ``key=value,…``.
        auto_class: name of an auto class of transformers.

    Returns:
        The text.

    Raises:
        ValueError: an unknown name, field or auto class, or nothing would be
            preconditioned.
        OSError: there is no such model.
    """
    import torch

    from hf_precond.integrations.arguments import config_from_pairs, parse_pairs
    from hf_precond.registry import create_optimizer, get_info

    config = config_from_pairs(get_info(name).config_cls, parse_pairs(optim_args))
    with torch.device("meta"):
        built = _build(model, auto_class)
    optimizer = create_optimizer(built, config)
    optimizer.close()
    return f"{optimizer.routing}\n{memory(optimizer)}"


def memory(optimizer: Any) -> str:
    """The memory of an optimizer's state, counted, compared with AdamW's.

    Args:
        optimizer: of a model on the meta device, before its first step.

    Returns:
        Two lines.
    """
    import torch

    from hf_precond.registry import get_info

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    for bound in optimizer.bound:
        optimizer.allocate(bound)
    optimizer.allocate_fallback()
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    adamw = sum(2 * p.numel() * max(p.element_size(), 4) for p in parameters)
    formula = get_info(optimizer.config.name).memory
    line = f"state: {kept / 2**20:,.1f} MiB, {kept / adamw:.2f} of AdamW's in float32"
    return f"{line}\n    {formula}"


def _build(model: str, auto_class: str | None) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    if auto_class is not None:
        chosen: Any = getattr(transformers, auto_class, None)
        if not auto_class.startswith("AutoModel") or not hasattr(chosen, "from_config"):
            raise ValueError(
                f"--auto_class {auto_class}: transformers has no such auto class; "
                "AutoModelForSequenceClassification is one."
            )
        return chosen.from_config(config)
    for architecture in getattr(config, "architectures", None) or []:
        model_cls = getattr(transformers, architecture, None)
        if model_cls is not None:
            return model_cls(config)
    return transformers.AutoModel.from_config(config)
