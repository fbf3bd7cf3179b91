"""Which rows of a layer's input are real tokens: weights from the attention masks of a pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_precond.architectures.parameters import output_embedding
from hf_precond.architectures.peft import base_of
from hf_precond.architectures.tables import (
    IMAGE_INPUT,
    LENGTHENING,
    MASKS,
    SOUND_INPUTS,
    TIME_FIRST,
    class_names,
)
from hf_precond.compat.torch_internals import Hook, in_backward

_KEPT = 8  # masks of passes whose backward may still recompute them (checkpointing)


@dataclass
class _Owner:
    """A (sub)model that takes masks, and those of its last passes, latest last.

    Args:
        path: its path.
        pairs: it takes both sequences of an encoder and a decoder.
        blind: it takes images.
        lengthens: it pads sequences behind their end, to a multiple of a length.
        padding: the token that a decoder's sequences are padded with, if it is one.
    """

    path: str
    pairs: bool
    blind: bool
    lengthens: bool = False
    padding: int | None = None
    masks: list[dict[str, Tensor]] = field(default_factory=list)


class TokenWeights:
    """Reads the masks that a model and the models in it are called with.

    A layer's tokens are weighted by the mask of the innermost model around it
    whose pass under way was called with one of the layer's batch and length.
    Anything else (no mask, packed or unpadded sequences, images) weighs 1.
    Models of sparse attention lengthen sequences to a multiple of their window:
    what they append weighs 0.
    A mask of sound counts samples; that of the frames made of them is the one
    its encoder is called with.

    Args:
        model: the root model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.enabled = False
        self.root = base_of(model)
        self.owners: list[_Owner] = []
        self.handles: list[RemovableHandle] = []
        self.time_first: set[str] = set()
        self.head: str | None = None
        root_path, head = "", output_embedding(model)
        for path, module in model.named_modules():
            if module is head:
                self.head = path
            if not TIME_FIRST.isdisjoint(class_names(module)):
                self.time_first.add(path)
            if module is self.root:
                root_path = path
            named = module is model or module is self.root or hasattr(module, "base_model_prefix")
            if named or self._stacks_frames(module):
                self._watch(path, module)
        self.root_path = root_path

    def _stacks_frames(self, module: nn.Module) -> bool:
        """Whether a module is the stack of layers of a model of sound, called with a mask."""
        sound = getattr(self.root, "main_input_name", "") in SOUND_INPUTS
        stack = any(isinstance(child, nn.ModuleList) for child in module.children())
        return sound and stack and "attention_mask" in _positions(module).values()

    def _watch(self, path: str, module: nn.Module) -> None:
        config = getattr(module, "config", None)
        owner = _Owner(
            path,
            pairs=bool(getattr(config, "is_encoder_decoder", False)) and _takes_pairs(module),
            blind=getattr(module, "main_input_name", "input_ids") == IMAGE_INPUT,
            lengthens=any(hasattr(module, name) for name in LENGTHENING),
            padding=_padding(config) if "decoder" in path.split(".") else None,
        )
        self.owners.append(owner)
        names = _positions(module)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A pass without gradients between forward and backward (an evaluation, a reference
            # model's logits) must not give its masks to what the backward pass recomputes.
            if not self.enabled or not torch.is_grad_enabled():
                return
            given = {names[i]: value for i, value in enumerate(args) if i in names} | {
                name: kwargs[name] for name in MASKS if name in kwargs
            }
            if owner.padding is not None and given.get("attention_mask") is None:
                given["input_ids"] = kwargs.get("input_ids", args[0] if args else None)
            masks = {name: v for name, v in given.items() if isinstance(v, Tensor) and v.dim() == 2}
            owner.masks = [*owner.masks[1 - _KEPT :], masks]

        self.handles.append(module.register_forward_pre_hook(Hook(see), with_kwargs=True))

    def forget(self) -> None:
        """Let go of the masks that are held."""
        for owner in self.owners:
            owner.masks.clear()

    def close(self) -> None:
        """Remove the hooks."""
        self.enabled = False
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.forget()

    def reader(self, path: str, *, memory: bool = False) -> Reader:
        """The weights as a layer at ``path`` needs them.

        Args:
            path: module path of the layer.
            memory: its input is the other sequence of a cross-attention.
        """
        head = path == self.head  # what the decoder makes enters it
        around = [
            owner
            for owner in self.owners
            if not owner.path
            or f"{path}.".startswith(f"{owner.path}.")
            or (head and owner.padding is not None)
        ]
        time_first = any(f"{path}.".startswith(f"{outer}.") for outer in self.time_first)
        return Reader(sorted(around, key=lambda o: -len(o.path)), path, memory, time_first, head)


@dataclass(frozen=True)
class Reader:
    """Finds the token weights of one layer."""

    owners: list[_Owner]
    path: str
    memory: bool
    time_first: bool = False
    head: bool = False

    def read(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Weights for an input of ``shape``, or ``None``: all ones.

        ``[B, T]`` for ``[B, T, …]``, ``[B · T]`` for the flattened ``[B · T, d]``; ``[T, B]``
        in modules that work on ``[T, B, d]``.
        """
        if len(shape) < 2:
            return None
        for owner in self.owners:
            name = self._name(owner)
            for masks in self._held(owner):
                mask = masks.get(name)
                if mask is None and name == "decoder_attention_mask" and "labels" in masks:
                    mask = _up_to_last_label(masks["labels"])
                fitting = None if mask is None else self._fit(mask, shape, owner)
                if fitting is not None:
                    return fitting.ne(0).to(dtype)
            if owner.blind:
                return None
        return self._read_decoded(shape, dtype)

    def _read_decoded(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The weights of a decoder's layer by the tokens alone: labels are not always at hand.

        A loss outside the model has them (label smoothing), or there are none (classifiers).
        """
        if self.memory or not any(owner.pairs for owner in self.owners):
            return None
        for owner in self.owners:
            padding = owner.padding
            for masks in self._held(owner):
                if padding is None or "input_ids" not in masks:
                    continue
                mask = _up_to_last(masks["input_ids"].ne(padding))
                # The last token that is given to a decoder has nothing to predict.
                mask = torch.cat([mask[:, 1:], mask[:, -1:]], dim=1)
                fitting = self._fit(mask, shape, owner)
                if fitting is not None:
                    return fitting.ne(0).to(dtype)
        return None

    @staticmethod
    def _held(owner: _Owner) -> list[dict[str, Tensor]]:
        """The masks that a call may mean, likeliest first."""
        # Backward recomputes (checkpointing): which pass it is, only the shape can tell.
        held = owner.masks if in_backward() else owner.masks[-1:]
        return held[::-1]

    def _fit(self, mask: Tensor, shape: tuple[int, ...], owner: _Owner) -> Tensor | None:
        """A mask ``[B, T]`` as an input's leading dimensions are, or ``None``: not its own."""
        if len(shape) == 2:
            return mask.flatten() if mask.numel() == shape[0] else None
        batch, length = (shape[1], shape[0]) if self.time_first else shape[:2]
        missing = length - mask.shape[1]
        if mask.shape[0] != batch or missing < 0 or (missing and not owner.lengthens):
            return None
        mask = F.pad(mask, (0, missing)) if missing else mask
        return mask.mT if self.time_first else mask

    def _name(self, owner: _Owner) -> str:
        below = self.path[len(owner.path) :].strip(".").split(".")
        if owner.pairs:
            decoding = "decoder" in below or self.head
            return "decoder_attention_mask" if decoding and not self.memory else "attention_mask"
        return "encoder_attention_mask" if self.memory else "attention_mask"


def _positions(module: nn.Module) -> dict[int, str]:
    """Place of each mask among the positional arguments of a module's forward."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return {}
    return {index: name for index, name in enumerate(names) if name in MASKS}


def _takes_pairs(module: nn.Module) -> bool:
    """Whether a model's forward takes both sequences of an encoder and a decoder."""
    names = inspect.signature(module.forward).parameters
    return any(name.startswith("decoder_") for name in names)


def _up_to_last_label(labels: Tensor) -> Tensor:
    """Ones up to the last position that has a label.

    Behind it a decoder's positions are padding: they have no loss, and no
    position before them sees them.
    """
    return _up_to_last(labels != -100)


def _up_to_last(marked: Tensor) -> Tensor:
    """Ones up to the last position of each row that is marked."""
    return marked.flip(-1).cumsum(-1).clamp(max=1).flip(-1)


def _padding(config: Any) -> int | None:
    """The token that a model's sequences are padded with."""
    token = getattr(config, "pad_token_id", None)
    return token if isinstance(token, int) else None
