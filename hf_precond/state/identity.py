"""Whose state a checkpoint holds: saved with it, and compared before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hf_precond.architectures.structure import Route, RoutingTable
from hf_precond.config.base import OptimizerConfig

KEY = "hf_precond"
"""Where a state dict holds :func:`identity`."""

SHOWN = 3
"""Differences that a message names."""

Groups = Sequence[Mapping[str, Any]]


def identity(
    config: OptimizerConfig, groups: Groups, routing: RoutingTable
) -> dict[str, Any]:
    """What must be equal where the state is loaded.

    Args:
        config: the optimizer's.
        groups: its parameter groups.
        routing: the names of the parameters, where the groups are its own.

    Returns:
        ``optimizer``, its name; ``layout``, the fields that decide which
        tensors the state has; ``parameters``, a list of ``[name, [sizes]]``
        for every group. Plain values, so that ``weights_only`` loads it.
    """
    return {
        "optimizer": config.name,
        "layout": {name: getattr(config, name) for name in config.layout},
        "parameters": [_described(group, routing) for group in groups],
    }


def _described(group: Mapping[str, Any], routing: RoutingTable) -> list[list[Any]]:
    parameters: list[Tensor] = group["params"]
    routes = [route for route in routing if route.group and route.group == group.get("name")]
    shapes = [list(parameter.shape) for parameter in parameters]
    # A vocabulary may have been resized since: its parameter is the same one.
    if [len(route.shape) for route in routes] != [len(shape) for shape in shapes]:
        return [[f"parameter {index}", shape] for index, shape in enumerate(shapes)]
    return [[route.name, shape] for route, shape in zip(routes, shapes, strict=True)]


def added_route(number: int, parameter: Tensor) -> Route:
    """The row of a parameter that joined group ``number`` after the optimizer was made."""
    name = f"(added) group {number}"
    return Route(name, tuple(parameter.shape), "base", "added after creation")


def relabelled(routing: RoutingTable, model: nn.Module, groups: Groups) -> RoutingTable:
    """The routing of a model read anew, with the names of the groups its parameters are in.

    Args:
        routing: of ``model``, its parameters in no group yet.
        model: the model.
        groups: the optimizer's; what they hold beside the model's parameters is listed too.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    labels = {
        names[id(parameter)]: group.get("name", "")
        for group in groups
        for parameter in group["params"]
        if id(parameter) in names
    }
    routes = [replace(route, group=labels.get(route.name, "")) for route in routing]
    added = [
        added_route(number, parameter)
        for number, group in enumerate(groups)
        for parameter in group["params"]
        if id(parameter) not in names
    ]
    return RoutingTable(routes + added)


def refuse_other(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a state dict of another optimizer or model, or one that is not whole.

    One that came through ``torch.distributed.checkpoint`` has no identity any
    more: of it only the kind of the parameter groups is looked at.

    Args:
        state_dict: what is to be loaded.
        own: :func:`identity` of the optimizer that loads it.

    Raises:
        ValueError: naming what differs, and what to do.
    """
    name = own["optimizer"]
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            f"{name}: this is no state of an optimizer, it has no {' and no '.join(missing)}; load "
            "what state_dict() returned (a Trainer saves it as optimizer.pt)."
        )
    saved = state_dict.get(KEY)
    if saved is None:
        if all("step" in group for group in state_dict["param_groups"]):
            return
        raise ValueError(
            f"{name}: this state was saved by an optimizer of another package; resume with that "
            "one, or load the weights only and start the optimizer anew."
        )
    if saved["optimizer"] != name:
        raise ValueError(
            f"{name}: this state was saved by {saved['optimizer']}; resume with --optim "
            f"{saved['optimizer']}, or load the weights only and start {name} anew."
        )
    _refuse_other_model(name, saved["parameters"], own["parameters"])
    _refuse_other_layout(name, saved["layout"], own["layout"])
    _refuse_parts(name, state_dict, own["parameters"])


def _refuse_other_model(
    name: str, saved: Sequence[Sequence[Any]], own: Sequence[Sequence[Any]]
) -> None:
    if saved == own:
        return
    there = {(g, entry[0]): tuple(entry[1]) for g, part in enumerate(saved) for entry in part}
    here = {(g, entry[0]): tuple(entry[1]) for g, part in enumerate(own) for entry in part}
    differences = []
    for group, parameter in sorted(there.keys() | here.keys()):
        shapes = [held.get((group, parameter), "missing") for held in (there, here)]
        if shapes[0] != shapes[1]:
            differences.append(
                f"{parameter} (group {group}) is {shapes[0]} there and {shapes[1]} here"
            )
    if not differences:
        if len(there) == len(here) and {n for _, n in there} == {n for _, n in here}:
            differences = ["the parameters stand in another order"]
        else:
            differences = ["the parameter groups differ"]
    more = f", and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    raise ValueError(
        f"{name}: this state is of another model ({len(there)} parameters in {len(saved)} groups "
        f"there, {len(here)} in {len(own)} here): {'; '.join(differences[:SHOWN])}{more}. Load it "
        "into the model it was saved with, or start the optimizer anew."
    )


def _refuse_other_layout(name: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    differences = [
        f"{field}={saved.get(field)!r} there and {value!r} here"
        for field, value in own.items()
        if saved.get(field) != value
    ]
    if differences:
        raise ValueError(
            f"{name}: this state was saved with other settings: {', '.join(differences)}. They "
            "decide which tensors it has: resume with the saved ones (optimizer_config.json beside "
            "the checkpoint holds them), or start the optimizer anew."
        )


def _refuse_parts(
    name: str, state_dict: Mapping[str, Any], parameters: Sequence[Sequence[Any]]
) -> None:
    """Once anything has state every parameter has an entry, so a missing one was lost."""
    state = state_dict["state"]
    if not any(state.values()):
        return
    lost = [
        entry[0]
        for group, part in zip(state_dict["param_groups"], parameters, strict=True)
        for index, entry in zip(group["params"], part, strict=True)
        if index not in state
    ]
    if lost:
        raise ValueError(
            f"{name}: this state is not whole: it has none of {', '.join(lost[:SHOWN])}"
            f"{' …' if len(lost) > SHOWN else ''} ({len(lost)} of {sum(map(len, parameters))} "
            "parameters). Resume from an earlier checkpoint."
        )
