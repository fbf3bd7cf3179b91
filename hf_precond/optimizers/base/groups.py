"""The parameter groups of an optimizer: what may stand in them, and how the routing shows them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_precond.architectures.structure import FROZEN, ModelStructure, Owner, Route, RoutingTable
from hf_precond.compat.warn import warn
from hf_precond.config.base import ALIASES, OptimizerConfig
from hf_precond.optimizers.base import messages

Groups = Sequence[Mapping[str, Any]]

PER_GROUP = ("lr", "weight_decay", "betas", "eps", "momentum")
"""Fields of a config that a parameter group may set for itself."""
OF_SCHEDULES = {"initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr"}
"""What schedules of torch write into groups, which resembles fields."""
SWITCHES = {"maximize": " and negate the loss", "amsgrad": ""}
"""What changes the steps of torch's optimizers, and what to do in its place."""
RESEMBLANCE = 0.8
"""Of a key to a field, from which it is taken for a mistake in writing it."""
NOT_STEPPED = "not stepped"
"""The treatment of a parameter that trains and is in no group."""


def check_group(group: Mapping[str, Any], config: OptimizerConfig) -> None:
    """Refuse a parameter group that could not be followed.

    Args:
        group: its ``params`` are a list.
        config: the optimizer's.

    Keys of a script's own are let be, as torch does; one that resembles a field
    is warned of.

    Raises:
        ValueError: a field of the config that holds for all groups alike, or
            one under another name (``beta1``), a value out of range, a switch
            that would change the step, or a parameter that stands in the group
            twice.
    """
    known = {field.name for field in dataclasses.fields(config)}
    fields, legal = known & group.keys(), ", ".join(key for key in PER_GROUP if key in known)
    others = sorted(fields - set(PER_GROUP))
    _check_keys(group, config.name, known, legal)
    config.replace(**{key: group[key] for key in group.keys() & config.removed.keys()})
    if others:
        raise ValueError(
            messages.NOT_PER_GROUP.format(name=config.name, field=others[0], legal=legal)
        )
    # A rate may be a tensor, whose value is not looked at: that would wait for a GPU.
    config.replace(**{key: group[key] for key in fields if not isinstance(group[key], Tensor)})
    params: Sequence[Tensor] = group["params"]
    if len({id(parameter) for parameter in params}) < len(params):
        raise ValueError(messages.TWICE.format(name=config.name))


def _check_keys(group: Mapping[str, Any], name: str, known: set[str], legal: str) -> None:
    """Refuse or warn of keys that are no fields and were probably meant to be."""
    for key in group.keys() - known - OF_SCHEDULES:
        if key in ALIASES:
            near = ALIASES[key]
            raise ValueError(messages.MISNAMED.format(key=key, name=name, near=near, legal=legal))
        if key in SWITCHES and group[key]:
            instead = SWITCHES[key]
            raise ValueError(messages.SWITCHED.format(key=key, name=name, instead=instead))
        near_ones = difflib.get_close_matches(key.lower(), PER_GROUP, 1, RESEMBLANCE)
        if key in PER_GROUP:
            warn(messages.UNREAD.format(key=key, name=name))
        elif near_ones:
            near = near_ones[0]
            said = messages.MISNAMED.format(key=key, name=name, near=near, legal=legal)
            warn(said)


def have_own_rates(groups: Any, config: Any) -> bool:
    """Whether every group was given with a learning rate of its own, and not all the config's.

    Args:
        groups: what the optimizer is made with.
        config: the optimizer's; under ``head_lr_scale`` and ``layer_lr_decay`` the rates are ours.
    """
    if not isinstance(groups, list) or not groups:
        return False
    if config.head_lr_scale != 1.0 or config.layer_lr_decay != 1.0:
        return False
    rates = [group.get("lr") if isinstance(group, Mapping) else None for group in groups]
    return None not in rates and any(isinstance(r, Tensor) or r != config.lr for r in rates)


def parameter_names(owners: Sequence[Owner]) -> dict[int, str]:
    """``id`` of every parameter that the model holds now to its name; not to be kept.

    Args:
        owners: name, module and attribute of the model's parameters.
    """
    held = ((name, module._parameters.get(attribute)) for name, module, attribute in owners)
    return {id(parameter): name for name, parameter in held if parameter is not None}


def label(number: int, group: Mapping[str, Any]) -> str:
    """What the routing table calls a group.

    Args:
        number: of the group.
        group: the group.
    """
    return str(group.get("name", f"group {number}"))


def routed(
    structure: ModelStructure, groups: Groups, config: Any, given: int | None = None
) -> RoutingTable:
    """The routing table of a model that was read, with the groups that hold its parameters.

    Parameters that are not the model's are listed too, and those of the model
    that train and are in no group are not stepped.

    Args:
        structure: what was found in the model.
        groups: the optimizer's.
        config: the optimizer's.
        given: how many groups it was made with; ``None`` for all.
    """
    names, labels, others = parameter_names(structure.owners), dict[str, str](), []
    treatment = getattr(config, "base", "adamw")
    for number, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) in names:
                labels[names[id(parameter)]] = label(number, group)
                continue
            if given is not None and number >= given:
                others.append(added_route(number, parameter))
                continue
            name = f"(outside) group {number}, parameter {place}"
            if "param_names" in group:
                name = group["param_names"][place]
            reason = "outside the model" if structure.owners else "no model is attached yet"
            held = treatment if parameter.requires_grad else FROZEN
            shape = tuple(parameter.shape)
            others.append(Route(name, shape, held, reason, label(number, group)))
    routes = []
    for route in structure.routing:
        if route.name in labels:
            route = replace(route, group=labels[route.name])
        elif route.treatment != FROZEN:
            reason = f"{route.reason}; in no parameter group"
            route = replace(route, treatment=NOT_STEPPED, reason=reason)
        routes.append(route)
    return RoutingTable(routes + others)


def added_route(number: int, parameter: Tensor) -> Route:
    """The row of a parameter that joined a group after the optimizer was made.

    Args:
        number: of the group.
        parameter: the parameter.
    """
    name = f"(added) group {number}"
    return Route(name, tuple(parameter.shape), "base", "added after creation", f"group {number}")


def note_added(structure: ModelStructure, number: int, group: Mapping[str, Any]) -> list[str]:
    """Show in the routing table the parameters of a group that was added.

    Args:
        structure: what was found in the model; its routing changes.
        number: of the group.
        group: the group.

    Returns:
        Names of those that are the model's: it was read without them.
    """
    routes, joined = structure.routing.routes, list[str]()
    names = parameter_names(structure.owners)
    places = {route.name: place for place, route in enumerate(routes)}
    for parameter in group["params"]:
        row, name = added_route(number, parameter), names.get(id(parameter), "")
        if name in places:
            routes[places[name]] = replace(row, name=name, group=label(number, group))
            joined.append(name)
        else:
            routes.append(row)
    return joined
