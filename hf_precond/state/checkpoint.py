"""An optimizer's state on its way into a checkpoint and out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

STATELESS = "stateless"
"""What stands in a state dict for a parameter that has no state of its own."""


def complete(state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` with an entry for every parameter, unless nothing has state yet.

    A bias stepped with its weight has no state of its own, and a strict
    ``torch.distributed.checkpoint.state_dict.set_state_dict`` refuses a
    trainable parameter without any. The entry is ``{"stateless": 1}``;
    :func:`restored` takes it away again.

    Args:
        state_dict: of a torch optimizer; changed in place.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # what GPUs are still writing to the host belongs to the state
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
    optimizer: torch.optim.Optimizer, check: Callable[[Mapping[str, Any]], None]
) -> Iterator[None]:
    """Inside, ``load_state_dict`` of torch gives every parameter :func:`restored` state.

    Torch's own is cast to the parameter's dtype. Ours is made of what the
    optimizer's pre-hooks have made of the state dict, and its post-hooks find it.

    Args:
        optimizer: what loads.
        check: called with the state dict before anything is loaded.
    """
    given: list[Mapping[str, Any]] = []

    def before(_: Any, state_dict: dict[str, Any]) -> None:
        check(state_dict)
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

    torch's flattened checkpoints come back as a mapping in a mapping where a
    name has a dot (``q.exp_avg`` of a fused weight); the names are joined
    again.

    Args:
        saved: the parameter's entry.
        parameter: the parameter.
        prefix: put before the names.
    """
    state: dict[str, Any] = {}
    for name, value in saved.items():
        full_name = prefix + str(name)
        if isinstance(value, Mapping):
            state |= restored(value, parameter, f"{full_name}.")
        elif full_name != STATELESS:
            state[full_name] = _copied(full_name, value, parameter)
    return state


def _copied(name: str, value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    on_host = name.endswith("_energy") or (name.endswith("step") and not parameter.is_cuda)
    # A GPU's fused AdamW reads its step counts on the device, wherever the file was mapped to.
    device = "cpu" if on_host and value.dim() == 0 else parameter.device
    return value.detach().clone().to(device=device)
