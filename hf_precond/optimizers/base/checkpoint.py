"""An optimizer's state in checkpoints: its layout, whose it is, and what earlier releases wrote.

The one place that knows checkpoint layouts. A state dict holds tensors and plain values alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_precond.architectures.structure import Owner
from hf_precond.compat import devices
from hf_precond.compat.torch_internals import REPLICA, WRAPPERS
from hf_precond.config.base import OptimizerConfig
from hf_precond.linalg.banded import banded
from hf_precond.linalg.eigenbasis import mirrored
from hf_precond.optimizers.base.groups import Groups, parameter_names

KEY = "hf_precond"
"""Where a state dict holds :func:`identity`."""
STATELESS = "stateless"
"""What stands in a state dict for a parameter that has no state of its own."""
RENAMED = {"left_turned": "left_refreshed", "right_turned": "right_refreshed"}
"""Name of a state in release 0.1 to its name now."""
DROPPED = {"updates", "left_clean", "right_clean", "left_strikes", "right_strikes"}
"""Names of states in release 0.1 that are no longer kept."""
BANDED = {"left_factor", "right_factor"}
"""States that release 0.1 kept as whole symmetric matrices."""
SHOWN = 3
"""Differences that a message names."""
UNKNOWN = re.compile(r"parameter \d+")
"""What stands for the name of a parameter that is not known."""


def identity(
    config: OptimizerConfig, groups: Groups, owners: Sequence[Owner], head: Sequence[str] = ()
) -> dict[str, Any]:
    """What must be equal where a state is loaded.

    Args:
        config: the optimizer's.
        groups: its parameter groups.
        owners: name, module and attribute of the model's parameters.
        head: names of the layers of a new head that has steps of its own.

    Returns:
        ``optimizer``, its name; ``layout``, the fields that decide which
        tensors the state has; ``parameters``, a list of ``[name, [sizes]]``
        for every group; ``head``. Plain values, so that ``weights_only`` loads it. Names
        are those in the model without its wrappers (compilation, DDP), or
        ``parameter 3`` where they are not known: before a model is attached the
        names in the groups may be those of its parts.
    """
    names = parameter_names(owners)

    def name_of(group: Mapping[str, Any], place: int, parameter: Tensor) -> str:
        unknown = {place: f"parameter {place}"}
        given = group.get("param_names", unknown) if owners else unknown
        return names.get(id(parameter)) or given[place]

    parameters = [
        [[name_of(group, place, p), list(p.shape)] for place, p in enumerate(group["params"])]
        for group in groups
    ]
    return {
        "optimizer": config.name,
        "layout": {name: getattr(config, name) for name in config.layout},
        "head": list(head),
        "parameters": _unwrapped(parameters),
    }


def decided(config: OptimizerConfig, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What the model decided in the training that is resumed, of fields that are ``auto``.

    Args:
        config: the optimizer's.
        state_dict: of that training.
    """
    saved = state_dict.get(KEY, {})
    layout = saved.get("layout", {}) if saved.get("optimizer") == config.name else {}
    open_fields = [field for field in config.from_model if getattr(config, field) == "auto"]
    return {f: layout[f] for f in open_fields if layout.get(f, "auto") != "auto"}


def _unwrapped(parameters: Sequence[Sequence[Sequence[Any]]]) -> list[list[list[Any]]]:
    """Descriptions whose names are those in the model without its wrappers."""
    kept = [[[WRAPPERS.sub("", name), shape] for name, shape in group] for group in parameters]
    entries = [entry for group in kept for entry in group if not UNKNOWN.fullmatch(entry[0])]
    while entries and all(entry[0].startswith(REPLICA) for entry in entries):
        for entry in entries:
            entry[0] = entry[0].removeprefix(REPLICA)
    return kept


def complete(state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` with an entry for every parameter, unless nothing has state yet.

    A bias stepped with its weight has no state of its own, and a strict
    ``torch.distributed.checkpoint.state_dict.set_state_dict`` refuses a
    trainable parameter without any. The entry is ``{"stateless": 1}``;
    :func:`restored` removes it again.

    Args:
        state_dict: of a torch optimizer; changed in place.
    """
    devices.synchronize()  # what an accelerator is still writing to the host belongs to the state
    state = state_dict["state"]
    if any(state.values()):
        for group in state_dict["param_groups"]:
            for index in group["params"]:
                if not state.get(index):
                    state[index] = {STATELESS: 1}
    return state_dict


def forget_empty(state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Remove entries without content, which looking a parameter's state up leaves behind.

    One of a parameter that was since swapped for another would have no index.

    Args:
        state: an optimizer's state; changed in place.
    """
    for parameter in [parameter for parameter, held in state.items() if not held]:
        del state[parameter]


@contextmanager
def restoring(
    optimizer: torch.optim.Optimizer, own: Mapping[str, Any], config: OptimizerConfig
) -> Iterator[None]:
    """Inside, ``load_state_dict`` of torch gives every parameter :func:`restored` state.

    Torch's own is cast to the parameter's dtype. Ours is made of what the
    optimizer's pre-hooks have made of the state dict, and its post-hooks see it.

    Args:
        optimizer: the one that loads.
        own: its :func:`identity`.
        config: its config.

    Raises:
        ValueError: see :func:`refuse_other`; nothing has been loaded.
    """
    given: list[Mapping[str, Any]] = []

    def before(_: Any, state_dict: dict[str, Any]) -> None:
        refuse_other(state_dict, own, config)
        given.append(state_dict)

    def after(_: Any) -> None:
        state, groups = given[-1]["state"], given[-1]["param_groups"]
        saved = [index for group in groups for index in group["params"]]
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, held, strict=True):
            if index in state:
                optimizer.state[parameter] = restored(state[index], parameter)

    handles = [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def restored(saved: Mapping[str, Any], parameter: Tensor, prefix: str = "") -> dict[str, Any]:
    """One parameter's state from a state dict: own copies, on the parameter's device.

    torch's flattened checkpoints return a mapping in a mapping where a name
    has a dot (``q.exp_avg`` of a fused weight); the names are joined again.
    Names of release 0.1 are translated.

    Args:
        saved: the parameter's entry.
        parameter: the parameter.
        prefix: put before the names.
    """
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if isinstance(value, Mapping):
            state |= restored(value, parameter, f"{prefix}{name}.")
            continue
        part, dot, last = f"{prefix}{name}".rpartition(".")
        if last not in DROPPED and last != STATELESS:
            last = RENAMED.get(last, last)
            state[part + dot + last] = _copied(last, value, parameter)
    return state


def _copied(name: str, value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if name in BANDED and value.dim() == 3:
        value = banded(mirrored(value))
    on_host = name.endswith("_energy")
    # A fused AdamW reads its step counts on the device, wherever the file was mapped to.
    device = "cpu" if on_host and value.dim() == 0 else parameter.device
    return value.detach().clone().to(device=device)


def refuse_other(
    state_dict: Mapping[str, Any], own: Mapping[str, Any], config: OptimizerConfig
) -> None:
    """Refuse a state dict of another optimizer or model, or one that is not whole.

    One that came through ``torch.distributed.checkpoint`` has no identity any
    more: of it only the kind of the parameter groups is looked at.

    Args:
        state_dict: what is to be loaded.
        own: :func:`identity` of the optimizer that loads it.
        config: that optimizer's.

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
    refuse_other_model(name, saved["parameters"], own["parameters"])
    _refuse_other_layout(config, saved["layout"], own["layout"])
    _refuse_parts(name, state_dict, own["parameters"])


def refuse_other_model(
    name: str, saved: Sequence[Sequence[Any]], own: Sequence[Sequence[Any]]
) -> None:
    """Refuse a state whose parameters are others, or stand in other groups or another order.

    A name that one side does not know is taken from the other, where the shapes
    are equal: releases before 0.2 did not know those of added groups, and an
    optimizer that is not attached to a model knows none.

    Args:
        name: the optimizer's.
        saved: ``parameters`` of the :func:`identity` in the state.
        own: the same of the optimizer that loads it.

    Raises:
        ValueError: naming what differs.
    """
    saved, own = _unwrapped(saved), _unwrapped(own)
    for part, other in zip(saved, own, strict=False):
        for entry, peer in zip(part, other, strict=False):
            if UNKNOWN.fullmatch(entry[0]) or UNKNOWN.fullmatch(peer[0]):
                known = peer[0] if UNKNOWN.fullmatch(entry[0]) else entry[0]
                entry[0] = peer[0] = known
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


def _refuse_other_layout(
    config: OptimizerConfig, saved: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    for field, value in saved.items():
        last = config.removed_values.get(field, {}).get(value)
        if field in config.removed and field not in own and value != config.removed[field].default:
            last = config.removed[field].last
        if last is not None:
            raise ValueError(
                f"{config.name}: this state was saved with {field}={value!r}, and hf_precond "
                f"{last} is the last release that has it; resume with that one, or start the "
                "optimizer anew."
            )
    differences = [
        f"{field}={saved.get(field)!r} there and {value!r} here"
        for field, value in own.items()
        if saved.get(field, value) != value  # an earlier release may not have had the field
        and not (field in config.from_model and saved[field] == "auto")  # it has no state yet
    ]
    if differences:
        raise ValueError(
            f"{config.name}: this state was saved with other settings: {', '.join(differences)}. "
            "They decide which tensors it has: resume with the saved ones (--optim_args "
            "config=CHECKPOINT, whose optimizer_config.json holds them), or start the optimizer "
            "anew."
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
