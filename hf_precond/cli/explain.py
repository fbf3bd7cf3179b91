"""``hf-precond explain``: how an optimizer would treat a model's parameters."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from hf_precond.cli.text import distinct, terminal_width, without_logs, wrapped

WEIGHTS = (".safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", ".gguf")

EXAMPLES = """examples:
  hf-precond explain bert-base-uncased --optim afopt
  hf-precond explain ./my_model --optim nkfac --optim-args "max_dim=1024"
  hf-precond explain ./my_model --optim adamr --all | less
  hf-precond explain bert-base-uncased --optim muon --tokens 4096 --device h100

The model's weights are neither loaded nor made: its config.json is enough.
A folder with weights, and a model of the Hub, is shown as in fine-tuning."""


def add_command(commands: Any) -> None:
    """Add the command to the parser of ``hf-precond``.

    Args:
        commands: the parser's subparsers.
    """
    parser = commands.add_parser(
        "explain",
        help="how an optimizer would treat a model's parameters, and the memory it takes",
        description=wrapped(
            "Show which parameters of a model an optimizer preconditions, how the others are "
            "stepped, the memory of its state, and the learning rate to start from. Like layers "
            "are shown as one."
        ),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or Hub id of a model, or of its config.json alone")
    parser.add_argument("--optim", required=True, metavar="NAME", help="an optimizer's name")
    parser.add_argument(
        "--optim_args", "--optim-args", metavar="KEY=VALUE,…", help="fields, as for training"
    )
    parser.add_argument("--all", action="store_true", help="every parameter on a row of its own")
    parser.add_argument(
        "--auto_class",
        "--auto-class",
        metavar="CLASS",
        help="AutoModelForSequenceClassification and the like; by default the architecture that "
        "the model was saved with",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="predict what a step costs there: h200, h100, a100, l4, t4, cpu (this machine), or a "
        "TOML file of peak rates",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of a step, for --device (default 4096)"
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a sequence, for --device (default 1024 of a causal language model, else "
        "128, or what an image has)",
    )
    parser.set_defaults(act=explain_command)


def explain_command(arguments: argparse.Namespace) -> int:
    """Print how an optimizer updates a model's parameters, and the memory of its state.

    Args:
        arguments: ``model``, ``optim``, ``optim_args``, ``auto_class``, ``all``, and of the
            prediction ``device``, ``tokens`` and ``length``.

    Returns:
        0; 2 when the model, the name or a field cannot be used.
    """
    model = arguments.model
    try:
        text = explanation(
            model, arguments.optim, arguments.optim_args, arguments.auto_class,
            every_row=arguments.all, width=terminal_width(),
        )  # fmt: skip
        text += _predicted(arguments)
    except (ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        # Offline, transformers names the host that it could not reach, not the model.
        named = model in sentence or sentence.startswith("--optim_args")
        subject = f"{model}: " * (isinstance(error, OSError) and not named)
        print(f"hf_precond: {subject}{sentence}", file=sys.stderr)
        return 2
    print(text)  # not above: a closed pipe is an OSError too
    return 0


def explanation(
    model: str,
    name: str,
    optim_args: str | None = None,
    auto_class: str | None = None,
    every_row: bool = False,
    width: int = 80,
) -> str:
    """Routing, memory and starting rate of an optimizer on a model built from its config.

    The model is built on the meta device: it has no weights. Where its folder, or the Hub, has
    some, it is treated as one that they were loaded into, without a new head.

    Args:
        model: folder or Hub id.
        name: the optimizer's name.
        optim_args: ``key=value,…``.
        auto_class: name of an auto class of transformers.
        every_row: a row for every parameter, not one for like layers.
        width: columns of the text.

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

    info = get_info(name)
    config = config_from_pairs(info.config_cls, parse_pairs(optim_args))
    _refuse_bad_path(model)
    with torch.device("meta"):
        built = _build(model, auto_class)
    with without_logs():  # what a training says at its start stands in the table
        optimizer = create_optimizer(built, config)
    optimizer.close()
    total = sum(parameter.numel() for parameter in built.parameters())
    title = f"{type(built).__name__}, {total:,} weights, under {name} ({info.title})"
    table = routing_table(optimizer.routing, every_row, width)
    return f"{title}\n\n{table}\n\n{memory(optimizer)}\n{info.rate}".rstrip()


def _predicted(arguments: argparse.Namespace) -> str:
    """What a step costs on a device, where one is named.

    Raises:
        ValueError: the options are not usable.
    """
    for option in ("tokens", "length"):
        value = getattr(arguments, option)
        if value is not None and arguments.device is None:
            raise ValueError(f"--{option}: costs are predicted for a device; add --device h100.")
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value}: it is a number of tokens, at least 1.")
    if arguments.device is None:
        return ""
    from hf_precond.cost.devices import find_device
    from hf_precond.cost.prediction import predict
    from hf_precond.cost.text import prediction_text
    from hf_precond.integrations.arguments import config_from_pairs, parse_pairs
    from hf_precond.registry import create_optimizer, get_info

    pairs = parse_pairs(arguments.optim_args)
    config = config_from_pairs(get_info(arguments.optim).config_cls, pairs)
    device = find_device(arguments.device)
    try:
        prediction = predict(
            lambda: _build(arguments.model, arguments.auto_class),
            lambda built: create_optimizer(built, config),
            device, arguments.tokens or 4096, arguments.length,
        )  # fmt: skip
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--device {arguments.device}: the passes of {arguments.model} cannot be traced "
            f"without numbers ({reason}); leave --device out."
        ) from error
    return f"\n\n{prediction_text(prediction, arguments.optim)}"


# The table ---------------------------------------------------------------------------------------


def routing_table(routes: Iterable[Any], every_row: bool, width: int) -> str:
    """The parameters by treatment and reason, with tensors and share of the weights.

    Args:
        routes: the optimizer's routing table.
        every_row: a row for every parameter, not one for like layers.
        width: columns of the text.

    Returns:
        Lines of at most ``width`` columns, but for names that are cut no further.
    """
    routes = list(routes)
    total = sum(map(_size, routes))
    treatments = sorted({r.treatment for r in routes}, key=_rank)
    rows: list[tuple[str, ...]] = []  # of one text, a heading
    for treatment in treatments:
        chosen = [r for r in routes if r.treatment == treatment]
        rows.append((treatment, *_totals(chosen, total)))
        for reason in dict.fromkeys(map(_reason, chosen)):
            alike = [r for r in chosen if _reason(r) == reason]
            rows.append((f"  {reason}",))
            groups = [[r] for r in alike] if every_row else grouped_routes(alike)
            rows += [(_joined(group), _shape(group[0]), *_totals(group, total)) for group in groups]
    columns = [22, 8, 9]  # at most: shape, tensors, share of the weights
    shapes = [len(row[1]) for row in rows if len(row) == 4]
    columns[0] = max([len("shape"), *shapes])
    room = width - sum(columns) - 3
    names = distinct([row[0] for row in rows if len(row) == 4], room - 4)
    lines = [_line(("", "shape", "tensors", "weights"), columns, room)]
    for row in rows:
        if len(row) == 1:
            lines.append(row[0][:width])
        elif len(row) == 3:
            lines += ["", _line((row[0], "", *row[1:]), columns, room)]
        else:
            lines += _line((f"    {names[row[0]]}", *row[1:]), columns, room).split("\n")
    return "\n".join(lines[:1] + lines[2:])


def _line(row: Sequence[str], columns: Sequence[int], room: int) -> str:
    name = row[0] if len(row[0]) <= room else f"{row[0]}\n{'':<{room}}"
    cells = [f"{cell:>{column}}" for cell, column in zip(row[1:], columns, strict=True)]
    return f"{name:<{room}} {' '.join(cells)}"


def grouped_routes(routes: Sequence[Any]) -> list[list[Any]]:
    """Lists of the parameters that differ in numbers of their paths, or in weight and bias, alone.

    Args:
        routes: of one treatment and reason.

    Returns:
        In order of first appearance.
    """
    lists: dict[tuple[str, ...], list[Any]] = {}
    for route in routes:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "#", route.name)
        shape = _shape(route)
        pair = re.sub(r"\.(weight|bias)$", "", pattern)
        # A bias joins its weight, whose shape it shares in part.
        kind = "" if route.shape[:1] and pair != pattern else shape
        lists.setdefault((pair, kind, str(route.shape[:1])), []).append(route)
    return list(lists.values())


def _joined(group: Sequence[Any]) -> str:
    """One name for a group: ``layer.{0..11}.query.{weight,bias}``."""
    parts = [route.name.split(".") for route in group]
    joined = []
    for column in zip(*parts, strict=True):
        values = list(dict.fromkeys(column))
        numbers = sorted(int(value) for value in values) if values[0].isdigit() else []
        if len(values) == 1:
            joined.append(values[0])
        elif numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
            joined.append(f"{{{numbers[0]}..{numbers[-1]}}}")
        else:
            joined.append("{" + ",".join(map(str, numbers or values)) + "}")
    return ".".join(joined)


def _reason(route: Any) -> str:
    """Why, with the parameter group where it is more than decay or no decay."""
    plain = route.group in ("", "decay", "no decay")
    return route.reason if plain else f"{route.reason} [{route.group}]"


def _rank(treatment: str) -> tuple[int, str]:
    return {"preconditioned": 0, "frozen": 2}.get(treatment, 1), treatment


def _size(route: Any) -> int:
    size = 1
    for side in route.shape:
        size *= side
    return size


def _shape(route: Any) -> str:
    return "x".join(map(str, route.shape)) or "scalar"


def _totals(routes: Sequence[Any], total: int) -> tuple[str, str]:
    share = 100 * sum(map(_size, routes)) / max(total, 1)
    return str(len(routes)), "< 0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"


# The model ---------------------------------------------------------------------------------------


def _refuse_bad_path(model: str) -> None:
    """Refuse a folder that is none, or holds no config, by its name.

    Raises:
        FileNotFoundError: naming the folder.
    """
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise FileNotFoundError(
                f"{model}: there is no config.json in this folder; give that of a saved model."
            )
    elif not os.path.exists(model) and (model[:1] in "./~" or model.count("/") > 1):
        raise FileNotFoundError(
            f"{model}: there is no such folder; give that of a saved model, or a Hub id."
        )


def _has_weights(model: str) -> bool:
    """Whether a folder holds weights besides its config; what is on the Hub is taken to."""
    names = os.listdir(model) if os.path.isdir(model) else ["model.safetensors"]
    return any(name.endswith(WEIGHTS) and not name.startswith("adapter_") for name in names)


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
    return f"{line}; numbers for a weight [m, n]:\n    {formula}"


def _build(model: str, auto_class: str | None) -> Any:
    """The model, as if its weights had been loaded where there are some."""
    from hf_precond.compat.transformers_internals import mark_loaded

    built = _from_config(model, auto_class)
    if _has_weights(model):
        mark_loaded(built.parameters())
    return built


def _from_config(model: str, auto_class: str | None) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except OSError as error:
        if os.path.exists(model):
            raise
        raise OSError(
            f"{model}: there is no such folder here, and the Hub has no such model or cannot be "
            "reached; check the name, your login and the network."
        ) from error
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
