"""Batches of the shapes that a model is trained on, from its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CAUSAL_LENGTH, OTHER_LENGTH = 1024, 128
"""Tokens of a sequence: of a model that predicts the next one, and of all others."""


def sequence_length(model: nn.Module) -> int:
    """Tokens of a sequence, or of an image, by default.

    Args:
        model: with a ``config`` of transformers.
    """
    config: Any = model.config
    size = _image_size(config)
    if size is not None:
        patch = getattr(config, "patch_size", None) or 32
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        return (size[0] // patch) * (size[1] // patch) + 1
    causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    longest = getattr(config, "max_position_embeddings", None) or CAUSAL_LENGTH
    return min(CAUSAL_LENGTH if causal else OTHER_LENGTH, longest)


def make_batch(
    model: nn.Module, tokens: int, device: torch.device, length: int | None = None
) -> dict[str, Tensor]:
    """What a model is called with: ids or pixels, and labels where its class takes them.

    Args:
        model: with a ``config`` of transformers.
        tokens: in all; at least one sequence, or one image, comes out.
        device: where tensors are made.
        length: tokens of a sequence; :func:`sequence_length` by default.

    Raises:
        ValueError: the model reads neither token ids nor images.
    """
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    size = _image_size(config)
    whole = length or sequence_length(model)
    if name == "pixel_values" and size is not None:
        count = max(1, tokens // whole)
        channels = getattr(config, "num_channels", 3)
        batch = {name: torch.empty(count, channels, *size, device=device)}
    elif name == "input_ids":
        whole = min(whole, max(1, tokens))
        count = max(1, tokens // whole)
        batch = {name: torch.zeros(count, whole, dtype=torch.long, device=device)}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = batch[name].clone()
    else:
        raise ValueError(
            f"{type(model).__name__}: its input is {name}; costs are predicted for models that "
            "read token ids or images."
        )
    return batch | _labels(type(model).__name__, count, batch[name])


def _labels(kind: str, count: int, inputs: Tensor) -> dict[str, Tensor]:
    """Labels by the name of a model's class; none where it takes none, or others."""
    device = inputs.device
    if kind.endswith(("ForSequenceClassification", "ForImageClassification")):
        return {"labels": torch.zeros(count, dtype=torch.long, device=device)}
    words = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification",
             "ForConditionalGeneration")  # fmt: skip
    if kind.endswith(words) and inputs.dim() == 2:
        return {"labels": inputs.clone()}
    if kind.endswith("ForQuestionAnswering"):
        place = torch.zeros(count, dtype=torch.long, device=device)
        return {"start_positions": place, "end_positions": place.clone()}
    return {}


def _image_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])
