"""Which rows of a layer's input are real tokens: weights from the attention masks of a pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_precond.architectures.modules import base_of, class_names
from hf_precond.architectures.parameters import output_embedding
from hf_precond.architectures.tables import (
    IMAGE_INPUT,
    LENGTHENING,
    MASKS,
    SOUND_INPUTS,
    TIME_FIRST,
)
from hf_precond.compat.torch_internals import Hook, in_backward

_KEPT = 8  # masks of passes whose backward may still recompute them (checkpointing)


@dataclass
class _MaskedModel:
    """A (sub)model that takes masks, and those of its last passes, latest last.

    Args:
        path: its path.
        names: the position of each mask among its positional arguments.
        pairs: it takes both sequences of an encoder and a decoder.
        images: it takes images.
        lengthens: it pads sequences behind their end, to a multiple of a length.
        padding: the token that a decoder's sequences are padded with, if it is a decoder.
    """

    path: str
    names: dict[int, str]
    pairs: bool
    images: bool
    lengthens: bool
    padding: int | None
    masks: list[dict[str, Tensor]] = field(default_factory=list)


class TokenWeights:
    """Reads the masks that a model and the models in it are called with.

    A layer's tokens are weighted by the mask of the innermost model around it
    whose current pass was called with a mask of the layer's batch and length.
    Anything else (no mask, packed or unpadded sequences, images) weighs 1.
    Models of sparse attention lengthen sequences to a multiple of their window:
    what they append weighs 0.
    A mask of audio counts samples; that of the frames made of them is the one
    its encoder is called with.

    Args:
        model: the root model.

    Attributes:
        memory: layers that read the other sequence of a cross-attention.
        on_pass: called with a model whose forward pass with gradients begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self.enabled = False
        self.on_pass: Callable[[nn.Module], None] | None = None
        self.models: list[_MaskedModel] = []
        self.hooks = ExitStack()
        self.time_first: set[str] = set()
        self.head: str | None = None
        root, head = base_of(model), output_embedding(model)
        audio = getattr(root, "main_input_name", "") in SOUND_INPUTS
        for path, module in model.named_modules():
            if module is head:
                self.head = path
            if not class_names(module).isdisjoint(TIME_FIRST):
                self.time_first.add(path)
            named = module in (model, root) or hasattr(module, "base_model_prefix")
            if named or (audio and _is_masked_stack(module)):
                self._add(path, module)
        self.memory = set[nn.Module]()
        crossing = "encoder_attention_mask"
        if any(masked.pairs or crossing in masked.names.values() for masked in self.models):
            self.memory = _memory_layers(model)

    def _add(self, path: str, module: nn.Module) -> None:
        config = getattr(module, "config", None)
        token = getattr(config, "pad_token_id", None)
        decoder = isinstance(token, int) and "decoder" in path.split(".")
        masked = _MaskedModel(
            path,
            _positions(module),
            pairs=bool(getattr(config, "is_encoder_decoder", False)) and _takes_pairs(module),
            images=getattr(module, "main_input_name", "input_ids") == IMAGE_INPUT,
            lengthens=any(hasattr(module, name) for name in LENGTHENING),
            padding=token if decoder else None,
        )
        self.models.append(masked)
        hook = Hook(self._before_forward, masked)
        self.hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _before_forward(
        self,
        masked: _MaskedModel,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        # A pass without gradients between forward and backward (an evaluation, a reference
        # model's logits) must not give its masks to what the backward pass recomputes.
        if not self.enabled or not torch.is_grad_enabled():
            return
        if self.on_pass is not None:
            self.on_pass(module)
        given = {name: args[i] for i, name in masked.names.items() if i < len(args)}
        given |= {role: kwargs[name] for name, role in MASKS.items() if name in kwargs}
        if masked.padding is not None and given.get("attention_mask") is None:
            given["input_ids"] = kwargs.get("input_ids", args[0] if args else None)
        masks = {name: v for name, v in given.items() if isinstance(v, Tensor) and v.dim() == 2}
        if masked.pairs and "labels" in masks:
            # Behind the last label a decoder's positions are padding: they have no loss, and no
            # position before attends to them.
            masks.setdefault("decoder_attention_mask", _up_to_last(masks["labels"] != -100))
        if masked.padding is not None and "input_ids" in masks:
            # The last token that is given to a decoder has nothing to predict.
            mask = _up_to_last(masks["input_ids"].ne(masked.padding))
            masks["decoder_tokens"] = torch.cat([mask[:, 1:], mask[:, -1:]], dim=1)
        masked.masks = [*masked.masks[1 - _KEPT :], masks]

    def masked(self) -> bool:
        """Whether a model was called with a mask in its last pass."""
        return any(masked.masks and masked.masks[-1] for masked in self.models)

    def forget(self) -> None:
        """Releases the masks."""
        for masked in self.models:
            masked.masks.clear()

    def close(self) -> None:
        """Removes the hooks."""
        self.enabled = False
        self.hooks.close()
        self.forget()

    def reader(self, path: str, *, memory: bool = False) -> Reader:
        """Returns what reads the weights of one layer.

        Args:
            path: module path of the layer.
            memory: its input is the other sequence of a cross-attention.
        """
        head = path == self.head  # what the decoder makes enters it
        around = [
            masked
            for masked in self.models
            if _is_inside(path, masked.path) or (head and masked.padding is not None)
        ]
        around.sort(key=lambda masked: -len(masked.path))
        sources = []
        for masked in around:
            below = path[len(masked.path) :].strip(".").split(".")
            if masked.pairs:
                own = "decoder" if ("decoder" in below or head) and not memory else ""
            else:
                own = "encoder" if memory else ""
            sources.append((masked, f"{own}_attention_mask".strip("_")))
            if masked.images:
                break
        else:
            # Labels are not always given: a loss outside the model has them (label smoothing), or
            # there are none (classifiers).
            if not memory and any(masked.pairs for masked in around):
                sources += [(masked, "decoder_tokens") for masked in around]
        time_first = any(_is_inside(path, outer) for outer in self.time_first)
        return Reader(sources, memory, time_first)


@dataclass(frozen=True)
class Reader:
    """Reads the token weights of one layer.

    Args:
        sources: the models around the layer, the innermost first, and which mask of theirs is
            the layer's.
        memory: its input is the other sequence of a cross-attention.
        time_first: it works on ``[T, B, d]``.
    """

    sources: list[tuple[_MaskedModel, str]]
    memory: bool
    time_first: bool

    def read(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Returns the weights for an input, ``None`` for all ones.

        Args:
            shape: of the input.
            dtype: of the weights.

        Returns:
            ``[B, T, …]`` for ``[B, T, …, d]``, ``[B, H, T]`` for the heads first ``[B, H, T, d]``,
            ``[B · T]`` for the flattened ``[B · T, d]``; ``[T, B]`` in modules that work on
            ``[T, B, d]``.
        """
        if len(shape) < 2:
            return None
        for masked, name in self.sources:
            # A backward pass recomputes some forward pass (checkpointing): only shapes tell which.
            passes = masked.masks if in_backward() else masked.masks[-1:]
            for masks in reversed(passes):
                mask = self._fit(masks[name], shape, masked) if name in masks else None
                if mask is not None:
                    weights = mask.ne(0).to(dtype)
                    several = shape[2:-1]  # streams or heads of one token: all weigh the same
                    return weights[(..., *[None] * len(several))].expand(*weights.shape, *several)
                if name in masks and len(shape) == 4:
                    mask = self._fit(masks[name], (shape[0], *shape[2:]), masked)
                    if mask is not None:
                        return mask.ne(0).to(dtype)[:, None].expand(shape[:-1])
        return None

    def _fit(self, mask: Tensor, shape: tuple[int, ...], masked: _MaskedModel) -> Tensor | None:
        """A mask ``[B, T]`` in the input's leading dimensions; ``None`` if it is another's."""
        if len(shape) == 2:
            return mask.flatten() if mask.numel() == shape[0] else None
        batch, length = (shape[1], shape[0]) if self.time_first else shape[:2]
        missing = length - mask.shape[1]
        if mask.shape[0] != batch or missing < 0 or (missing and not masked.lengthens):
            return None
        mask = F.pad(mask, (0, missing)) if missing else mask
        return mask.mT if self.time_first else mask


def _is_inside(path: str, outer: str) -> bool:
    return not outer or f"{path}.".startswith(f"{outer}.")


def _memory_layers(model: nn.Module) -> set[nn.Module]:
    """Layers that read the other sequence of a cross-attention: its keys and values."""
    from hf_precond.architectures.attention import find_attention

    crossed = [block for block in find_attention(model) if block.cross]
    return {m.module for block in crossed for m in (block.k, block.v)} - {
        block.q.module for block in crossed
    }


def _is_masked_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of layers that is called with a mask."""
    stack = any(isinstance(child, nn.ModuleList) for child in module.children())
    return stack and "attention_mask" in _positions(module).values()


def _positions(module: nn.Module) -> dict[int, str]:
    """Positions among the arguments of a module's forward, to the masks that stand there."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return {}
    return {index: MASKS[name] for index, name in enumerate(names) if name in MASKS}


def _takes_pairs(module: nn.Module) -> bool:
    """Whether a model's forward takes both sequences of an encoder and a decoder."""
    names = inspect.signature(module.forward).parameters
    return any(name.startswith("decoder_") for name in names)


def _up_to_last(marked: Tensor) -> Tensor:
    """Ones up to the last position of each row that is marked."""
    return marked.flip(-1).cumsum(-1).clamp(max=1).flip(-1)
