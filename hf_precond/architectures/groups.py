"""Parameter groups: weight decay by the Trainer's rule, and rates by head and depth.

Groups are plain dictionaries, as torch's optimizers take them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_precond.architectures.parameters import find_head
from hf_precond.architectures.tables import UNDECAYED

DECAY, NO_DECAY, ALSO_DECAY = "decay", "no decay", "bias and norm decay"

HEADLESS = (
    "head_lr_scale={scale}: this model has no newly initialised head that could be told from its "
    "body; leave head_lr_scale at 1, or pass groups with the learning rates you want: "
    "create_optimizer(model, {name!r}, params=[{{'params': …, 'lr': …}}, …])."
)
ALL_RATED = (
    "{field}={value}: it changes no learning rate, since every parameter that it would scale is in "
    "a group with an lr of its own, which is taken as given; leave {field} at 1, or drop lr from "
    "these groups."
)
NOTHING_TRAINS = "the model has no trainable parameter; unfreeze something to train."


def undecayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay, by the Trainer's rule.

    Those are parameters inside an ``nn.LayerNorm``, and those whose name has
    ``bias``, ``layernorm``, ``rmsnorm``, or a part ``norm`` or ``…_norm``.
    The Trainer states the patterns inside one of its methods
    (``get_decay_parameter_names``), so that nobody else can read them, and
    importing it would take seconds that a loop without it does not spend.
    """
    inside = tuple(
        f"{path}."
        for path, module in model.named_modules()
        if path and isinstance(module, nn.LayerNorm)
    )
    return {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if UNDECAYED.search(name.lower()) or name.startswith(inside)
    }


def parameter_groups(
    model: nn.Module, config: Any, given: Iterable[Any] | None = None
) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer.

    Given groups are taken as they are. One without a weight decay gets the
    config's, and one without a learning rate the config's, times
    ``head_lr_scale`` and ``layer_lr_decay`` to the power of the depth: it is
    divided by head and depth. A group with a learning rate of its own keeps
    it. Groups get a ``name`` where they have none; empty ones that say nothing
    but a weight decay are left out.

    Args:
        model: the model.
        config: ``lr``, ``weight_decay``, ``head_lr_scale``, ``layer_lr_decay``
            and ``decays_everything`` are read.
        given: what a torch optimizer takes: parameters, pairs of names and
            parameters, or dictionaries with ``params``; by default the
            parameters that train, biases and norms without weight decay (with
            it under ``decays_everything``).

    Returns:
        Dictionaries with ``params``, ``name`` and what was given; those of
        the model itself, and those that were divided, with ``lr`` and
        ``weight_decay`` too. Divided groups are named by layer, from the
        lowest (``layer 0 decay``), then the rest, then ``head decay`` and
        ``head no decay``.

    Raises:
        ValueError: when nothing trains or nothing is given, and for a
            ``head_lr_scale`` or ``layer_lr_decay`` that would change nothing
            or cannot be read off the model.
    """
    groups = _own_groups(model, config) if given is None else given_groups(given)
    rates = _rates(model, config)
    own = {"lr": config.lr, "weight_decay": config.weight_decay}
    _name(model, groups, config)
    if rates:
        groups = [own | g if "lr" not in g else g for g in _divided(groups, rates, config)]
    bare = {"params", "weight_decay", "name"}
    return [group for group in groups if group["params"] or group.keys() - bare]


def _own_groups(model: nn.Module, config: Any) -> list[dict[str, Any]]:
    """Decay by the Trainer's rule, for the parameters that train."""
    undecayed = undecayed_names(model)
    training = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not training:
        raise ValueError(NOTHING_TRAINS)
    second = ALSO_DECAY if config.decays_everything else NO_DECAY
    groups = [
        {"params": [p for n, p in training.items() if n not in undecayed], "name": DECAY},
        {"params": [p for n, p in training.items() if n in undecayed], "name": second},
    ]
    decays = (config.weight_decay, config.weight_decay if config.decays_everything else 0.0)
    for group, decay in zip(groups, decays, strict=True):
        group |= {"weight_decay": decay}
    return groups


def given_groups(given: Iterable[Any]) -> list[dict[str, Any]]:
    """What a torch optimizer takes, as groups whose ``params`` are lists.

    Args:
        given: parameters, pairs of names and parameters, or dictionaries; these
            are copied, without the ``step`` of an optimizer that had them.

    Raises:
        TypeError: for a model, a tensor or one dictionary.
        ValueError: when nothing is given.
    """
    if isinstance(given, int | float):
        raise TypeError(
            f"params is a {type(given).__name__}; pass the learning rate by name, lr={given}, and "
            "parameters or groups in its place, or nothing."
        )
    if isinstance(given, nn.Module | Tensor | Mapping):
        raise TypeError(
            f"params is a {type(given).__name__}; pass parameters (model.parameters()), pairs of "
            "names and parameters (model.named_parameters()), or a list of groups."
        )
    items = list(given)
    if not items:
        raise ValueError("params is empty: pass parameters, or groups of parameters.")
    if not isinstance(items[0], Mapping):
        items = [{"params": items}]
    groups = []
    for item in items:
        if not isinstance(item, Mapping) or "params" not in item:
            shown = f"{item!r:.80}"
            raise TypeError(f"params: a group is {shown} and must be a dictionary with params.")
        params = item["params"]
        if isinstance(params, set | frozenset):
            raise TypeError("params: a group is a set, whose order is not fixed; pass a list.")
        group = {key: value for key, value in item.items() if key != "step"}
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        groups.append(group)
    return groups


def _name(model: nn.Module, groups: Sequence[dict[str, Any]], config: Any) -> None:
    """Name the groups that have no name, by their weight decay, else by their number."""
    undecayed = undecayed_names(model)
    vectors = {id(p) for n, p in model.named_parameters() if n in undecayed}
    taken = {group["name"] for group in groups if "name" in group}
    for number, group in enumerate(groups):
        if "name" in group:
            continue
        decay = group.get("weight_decay", config.weight_decay)
        members = {id(parameter) for parameter in _tensors(group)}
        name = f"group {number}"
        if "lr" not in group and decay == 0.0 and (config.weight_decay or members <= vectors):
            name = NO_DECAY
        elif "lr" not in group and decay == config.weight_decay:
            name = DECAY
        group["name"] = name if name not in taken else f"{name} ({number})"
        taken.add(group["name"])


def _tensors(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group, without the names that may stand beside them."""
    return [item[1] if isinstance(item, tuple) else item for item in group["params"]]


Rate = tuple[float, str, float]
"""Place among the groups, what to put before a group's name, and the scale of its rate."""


def _rates(model: nn.Module, config: Any) -> dict[int, Rate]:
    """``id`` of every parameter to its rate; empty where all have the same."""
    head = find_head(model) if config.head_lr_scale != 1.0 else set()
    if config.head_lr_scale != 1.0 and not head:
        raise ValueError(HEADLESS.format(scale=config.head_lr_scale, name=config.name))
    depths: Mapping[str, int] = {}
    top = 0
    if config.layer_lr_decay != 1.0:
        from hf_precond.architectures.depth import layer_depths

        depths, top = layer_depths(model)
    if not head and not depths:
        return {}
    rates: dict[int, Rate] = {}
    for name, parameter in model.named_parameters():
        place, label, scale = math.inf, "", 1.0
        if depths.get(name, top) < top:
            place, label = depths[name], f"layer {depths[name]} "
            scale = config.layer_lr_decay ** (top - depths[name])
        if name in head:
            place, label, scale = math.inf, f"{label}head ", scale * config.head_lr_scale
        rates[id(parameter)] = place, label, scale
    return rates


def rate_scales(model: nn.Module, config: Any) -> set[float]:
    """What multiplies the config's learning rate, in groups without a rate of their own.

    Args:
        model: the model.
        config: ``head_lr_scale`` and ``layer_lr_decay`` are read.
    """
    return {1.0, *(scale for _, _, scale in _rates(model, config).values())}


def _divided(
    groups: Sequence[dict[str, Any]], rates: Mapping[int, Rate], config: Any
) -> list[dict[str, Any]]:
    """The groups, those without a rate of their own divided by the rates of their parameters."""
    rest: Rate = (math.inf, "", 1.0)
    parts: dict[tuple[str, int], tuple[Rate, dict[str, Any]]] = {}
    for number, group in enumerate(groups):
        tensors = _tensors(group)
        for item, tensor in zip(group["params"], tensors, strict=True):
            rate = rest if "lr" in group else rates.get(id(tensor), rest)
            part = group | {"params": [], "name": rate[1] + group["name"]}
            if rate[2] != 1.0:
                part["lr"] = config.lr * rate[2]
            parts.setdefault((rate[1], number), (rate, part))[1]["params"].append(item)
        if not tensors:
            parts["", number] = (rest, group)
    scaled = [label for label, _ in parts]
    for field, mark in (("head_lr_scale", "head "), ("layer_lr_decay", "layer ")):
        value = getattr(config, field)
        if value != 1.0 and not any(mark in label for label in scaled):
            raise ValueError(ALL_RATED.format(field=field, value=value))

    def place(part: tuple[Rate, dict[str, Any]]) -> tuple[float, bool]:
        return part[0][0], "head" in part[0][1]

    return [part for _, part in sorted(parts.values(), key=place)]
