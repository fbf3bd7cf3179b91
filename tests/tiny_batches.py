"""Batches for :mod:`tests.tiny_models`, made from the signature of a model's forward."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_models import CLASSES, FIRST_WORD, VOCABULARY

ROWS, LENGTH, FRAMES = 2, 14, 2
Batch = dict[str, Any]


class Maker:
    """Makes the arguments of one model's forward, each in a method of its name."""

    def __init__(
        self, model: nn.Module, media: bool = True, labelled: bool = True, turned: bool = False
    ) -> None:
        self.model, self.config = model, model.config
        self.name = type(model).__name__
        parameters = inspect.signature(type(model).forward).parameters.values()
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.taken = {p.name: p.default is p.empty for p in parameters if p.kind not in kinds}
        self.taken.pop("self", None)
        self.media, self.labelled, self.turned = media, labelled, turned
        self.generator = torch.Generator().manual_seed(1)

    def batch(self) -> Batch:
        batch: Batch = {}
        self.done = batch
        for name in ORDER:
            if name in self.taken and name not in batch:
                value = getattr(self, name)()
                if value is not None:
                    batch[name] = value
        batch.update(EXTRA.get(self.config.model_type, lambda maker: {})(self))
        for name, needed in self.taken.items():
            if needed and name not in batch:
                raise NotImplementedError(f"no rule for the argument {name}")
        return {name: value for name, value in batch.items() if value is not None}

    # Values ---------------------------------------------------------------------------

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def words(self, length: int) -> Tensor:
        return self.integers(VOCABULARY, ROWS, length, low=FIRST_WORD)

    def find(self, *names: str, default: Any = None, config: Any = None) -> Any:
        """The first of these in the config, or in one inside it."""
        config = self.config if config is None else config
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
        for value in vars(config).values():
            if hasattr(value, "to_dict"):
                found = self.find(*names, config=value)
                if found is not None:
                    return found
        return default

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @property
    def vision(self) -> Any:
        names = ("vision_config", "image_config", "backbone_config", "encoder")
        for name in names:
            found = getattr(self.config, name, None)
            if hasattr(found, "to_dict"):
                return found
        return self.config

    def sides(self) -> tuple[int, int]:
        """Height and width of images."""
        names = ("image_size", "img_size", "crop_size")
        size = self.find(*names, config=self.vision) or self.find(*names, default=32)
        return (size, size) if isinstance(size, int) else tuple(size)

    def channels(self) -> int:
        channels = self.find("num_channels", "in_channels", "in_chans", config=self.vision)
        return channels if isinstance(channels, int) else 3

    # Text -----------------------------------------------------------------------------

    def input_ids(self) -> Tensor | None:
        words = min(VOCABULARY, self.find("vocab_size", config=self.text) or VOCABULARY)
        ids = self.integers(words, ROWS, LENGTH, low=min(FIRST_WORD, words // 2))
        return self._with_media(ids)

    def _with_media(self, ids: Tensor) -> Tensor:
        """Puts a placeholder for every vector that images and sound are read as."""
        for kind, given in (("image", "pixel_values"), ("audio", "input_features")):
            names = (f"{kind}_token_id", f"{kind}_token_index", "media_placeholder_token_id")
            token = self.find(*names)
            if given in self.done and token is not None and self._reader(kind):
                row = torch.full((ROWS, math.ceil(self._count(kind) / ROWS)), token)
                ids = torch.cat([ids[:, :2], row, ids[:, 2:]], 1)
        return ids

    def _reader(self, kind: str) -> Any:
        name = f"get_{kind}_features"
        return next((getattr(m, name) for m in self.model.modules() if hasattr(m, name)), None)

    def _count(self, kind: str) -> int:
        method = self._reader(kind)
        names = inspect.signature(method).parameters
        arguments = {n: v for n, v in self.done.items() if n in names}
        if not arguments:
            media = ("pixel", "input_feat")
            arguments = {n: v for n, v in self.done.items() if n.startswith(media)}
        with torch.no_grad():
            found = method(**arguments)
        found = getattr(found, "pooler_output", found)
        if isinstance(found, Tensor):
            return found.shape[:-1].numel()
        return sum(part.shape[:-1].numel() for part in found)

    def attention_mask(self) -> Tensor | None:
        ids = self.done.get("input_ids")
        if ids is None:
            return None
        mask = torch.ones_like(ids)
        if "pixel_values" not in self.done:
            mask[1, -3:] = 0
        return mask

    def mm_token_type_ids(self) -> Tensor | None:
        ids = self.done.get("input_ids")
        if ids is None:
            return None
        types = torch.zeros_like(ids)
        for number, kind in enumerate(("image", "video", "audio"), 1):
            token = self.find(f"{kind}_token_id", f"{kind}_token_index")
            if token is not None:
                types[ids == token] = number
        return types

    def token_type_ids(self) -> Tensor | None:
        if self.taken["token_type_ids"]:
            return torch.zeros_like(self.done["input_ids"])
        if self._reader("image") and "input_ids" in self.done:
            return self.mm_token_type_ids()
        return None

    def decoder_input_ids(self) -> Tensor | None:
        if "labels" in self.done or not self.config.is_encoder_decoder:
            return None
        return self.words(5)

    def bbox(self) -> Tensor:
        corners = self.integers(10, *self.done["input_ids"].shape, 2)
        return torch.cat([corners, corners + 5], -1)

    # Images ---------------------------------------------------------------------------

    def pixel_values(self) -> Tensor | None:
        if not self.media and not self.taken["pixel_values"]:
            return None
        if "image_grid_thw" in self.taken or "grid_thw" in self.taken:
            return self._patches()
        shape = (self.channels(), *self.sides())
        if "spatial_shapes" in self.taken:
            patch = self.find("patch_size", "encoder_patch_size", config=self.vision)
            return self.floats(ROWS, 16, self.channels() * patch**2)
        if self.config.model_type in SEVERAL_IMAGES:
            return self.floats(ROWS, SEVERAL_IMAGES[self.config.model_type], *shape)
        frames = self.find("num_frames", "frames_per_clip")
        if "Video" in self.name or (frames and "input_ids" not in self.taken):
            return self.floats(ROWS, frames or FRAMES, *shape)
        return self.floats(ROWS, *shape)

    def _patches(self) -> Tensor:
        vision = self.vision
        patch = self.find("patch_size", config=vision, default=8)
        time = self.find("temporal_patch_size", "patch_temporal", config=vision, default=1)
        merge = self.find("spatial_merge_size", "merge_size", config=vision, default=2)
        grid = [1, 2 * merge, 2 * merge]
        self.grid = torch.tensor([grid] * ROWS)
        number, size = ROWS * math.prod(grid), self.channels() * time * patch * patch
        if self.config.model_type.startswith("kimi"):
            return self.floats(number, self.channels(), patch, patch)
        if self.config.model_type == "colqwen2":
            return self.floats(ROWS, number // ROWS, size)
        return self.floats(number, size)

    def image_grid_thw(self) -> Tensor | None:
        return self.grid if "pixel_values" in self.done else None

    def grid_thw(self) -> Tensor:
        if not hasattr(self, "grid"):
            self._patches()
        return self.grid

    def hidden_states(self) -> Tensor:
        return self._patches()

    def pixel_values_videos(self) -> Tensor | None:
        if not self.taken["pixel_values_videos"]:
            return None
        frames = self.find("frames_per_clip", "num_frames", default=FRAMES)
        return self.floats(ROWS, frames, self.channels(), *self.sides())

    def pixel_attention_mask(self) -> Tensor | None:
        pixels = self.done.get("pixel_values")
        if pixels is None:
            return None
        if pixels.dim() == 3:  # patches in a row
            return torch.ones(pixels.shape[:2], dtype=torch.long)
        return torch.ones(*pixels.shape[:-3], *pixels.shape[-2:], dtype=torch.bool)

    def spatial_shapes(self) -> Tensor | None:
        pixels = self.done.get("pixel_values")
        side = None if pixels is None else math.isqrt(pixels.shape[1])
        return None if side is None else torch.tensor([[side, side]] * ROWS)

    def image_sizes(self) -> Tensor | None:
        if "pixel_values" not in self.done or not self._needs_sizes():
            return None
        return torch.tensor([list(self.sides())] * ROWS)

    def _needs_sizes(self) -> bool:
        reader = self._reader("image")
        asked = inspect.signature(reader).parameters.get("image_sizes") if reader else None
        required = asked is not None and asked.default is asked.empty
        return self.taken["image_sizes"] or required or self.config.model_type in SIZED

    def image_merge_sizes(self) -> Tensor | None:
        return torch.ones(ROWS, dtype=torch.long) if "pixel_values" in self.done else None

    def return_loss(self) -> bool | None:
        return True if "Blip" not in self.name else None

    # Sound, series --------------------------------------------------------------------

    def input_values(self) -> Tensor | None:
        if hasattr(self.config, "max_length"):
            return self.floats(ROWS, self.config.max_length, self.config.num_mel_bins)
        if "padding_mask" in self.taken or self.turned:
            return self.floats(ROWS, self.find("audio_channels", default=1), 1280)
        return self.floats(ROWS, 1280)

    def input_features(self) -> Tensor | None:
        if not self.media and not self.taken["input_features"]:
            return None
        bins = self.find(*BINS, default=32)
        time = 2 * self.find("max_source_positions", default=32)
        return self.floats(ROWS, *((64, bins) if self.turned else (bins, time)))

    def input_features_mask(self) -> Tensor | None:
        features = self.done.get("input_features")
        length = None if features is None else features.shape[1 if self.turned else 2]
        return None if length is None else torch.ones(ROWS, length, dtype=torch.long)

    feature_attention_mask = input_features_mask

    def past_values(self) -> Tensor:
        length = self.find("context_length", default=32)
        channels = self.find("num_input_channels")
        return self.floats(ROWS, length, *([] if channels is None else [channels]))

    # Labels ---------------------------------------------------------------------------

    def labels(self) -> Any:
        if not self.labelled:
            return None
        if re.search(r"For(Sequence|Image|Video|Audio|TimeSeries)?Classification", self.name):
            return self.integers(min(CLASSES, self.config.num_labels), ROWS)
        if "TokenClassification" in self.name or "AudioFrame" in self.name:
            return self.integers(self.config.num_labels, *self.done["input_ids"].shape)
        if "SemanticSegmentation" in self.name:
            return self.integers(self.config.num_labels, ROWS, *self.sides())
        if "ObjectDetection" in self.name:
            boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]])
            return [{"class_labels": torch.tensor([0, 1]), "boxes": boxes} for _ in range(ROWS)]
        if re.search("CTC|RNNT|TDT", self.name):
            return self.integers(20, ROWS, 3, low=4)
        if "input_ids" in self.done:
            ids = self.done["input_ids"].clone()
            if self.config.is_encoder_decoder:
                return ids[:, :6].contiguous()
            ids[ids < FIRST_WORD] = -100
            return ids
        if re.search("LM|Generation|Seq2Seq|Text", self.name):
            return self.words(6)
        return None

    def class_labels(self) -> list[Tensor]:
        return [torch.tensor([0, 1]) for _ in range(ROWS)]

    def mask_labels(self) -> list[Tensor]:
        masks = torch.zeros(2, *self.sides())
        masks[0, :8, :8] = 1
        masks[1, 8:, 8:] = 1
        return [masks.clone() for _ in range(ROWS)]

    def start_positions(self) -> Tensor:
        return torch.tensor([1, 2])

    def end_positions(self) -> Tensor:
        return torch.tensor([3, 4])


ORDER = (
    "pixel_values", "image_grid_thw", "grid_thw", "hidden_states", "pixel_values_videos",
    "pixel_attention_mask", "spatial_shapes", "image_sizes", "image_merge_sizes",
    "input_values", "input_features",
    "input_features_mask", "feature_attention_mask", "past_values", "input_ids", "attention_mask",
    "mm_token_type_ids", "token_type_ids", "bbox", "labels", "class_labels", "mask_labels",
    "start_positions", "end_positions", "decoder_input_ids", "return_loss",
)  # fmt: skip
BINS = (
    "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim",
    "input_size", "input_feat_size", "input_dim",
)  # fmt: skip
"""Fields with the number of features of a frame of sound."""
SIZED = ("llava_next", "llava_next_video", "llava_onevision")
"""Types that need the sizes of images."""
ONE_IMAGE = (
    "idefics", "idefics2", "idefics3", "smolvlm", "colmodernvbert", "modernvbert", "ultravbert",
    "granite_docling",
)  # fmt: skip
SEVERAL_IMAGES = {
    **dict.fromkeys(ONE_IMAGE, 1),
    **dict.fromkeys(SIZED, 3),
    **dict.fromkeys(("lightglue", "superglue", "efficientloftr", "xclip"), 2),
}
"""Images a row, in types that take ``[B, n, C, H, W]``."""


def _series(maker: Maker) -> Batch:
    config, length = maker.config, maker.config.context_length + max(maker.config.lags_sequence)
    features = config.num_time_features
    return {
        "past_values": maker.floats(ROWS, length),
        "past_observed_mask": torch.ones(ROWS, length),
        "past_time_features": torch.zeros(ROWS, length, features),
        "future_values": maker.floats(ROWS, config.prediction_length),
        "future_time_features": torch.zeros(ROWS, config.prediction_length, features),
    }


def _decisions(maker: Maker) -> Batch:
    config = maker.config
    return {
        "states": maker.floats(ROWS, 5, config.state_dim),
        "actions": maker.floats(ROWS, 5, config.act_dim),
        "rewards": maker.floats(ROWS, 5, 1),
        "returns_to_go": maker.floats(ROWS, 5, 1),
        "timesteps": torch.arange(5).expand(ROWS, 5),
        "attention_mask": torch.ones(ROWS, 5, dtype=torch.long),
    }


def _regions(maker: Maker) -> Batch:
    config = maker.config
    return {
        "visual_feats": maker.floats(ROWS, 3, config.visual_feat_dim),
        "visual_pos": maker.floats(ROWS, 3, config.visual_pos_dim),
    }


def _flattened(maker: Maker) -> Batch:
    width = maker.config.vision_config.patch_embed_hidden_size
    places = maker.integers(4, ROWS, 9, 2, low=1).float()
    return {
        "flattened_patches": torch.cat([places, maker.floats(ROWS, 9, width)], -1),
        "attention_mask": torch.ones(ROWS, 9),
        "labels": maker.words(5),
    }


def _first_are_images(maker: Maker) -> Batch:
    places = torch.arange(maker.done["input_ids"].shape[1])
    return {"image_embeds_position_mask": (places < 4).long().expand(ROWS, -1)}


EXTRA: dict[str, Callable[[Maker], Batch]] = {
    "time_series_transformer": _series,
    "informer": _series,
    "autoformer": _series,
    "patchtst": lambda maker: {"past_observed_mask": None},
    "decision_transformer": _decisions,
    "lxmert": _regions,
    "pix2struct": _flattened,
    "instructblip": lambda maker: {"qformer_input_ids": maker.words(4)},
    "instructblipvideo": lambda maker: {"qformer_input_ids": maker.words(4)},
    "clap": lambda maker: {"input_features": maker.floats(ROWS, 1, 32, 32)},
    "oneformer": lambda maker: {
        "task_inputs": maker.words(32),
        "text_inputs": maker.integers(VOCABULARY, ROWS, 5, 32),
    },
    "dac": lambda maker: {"input_values": maker.floats(ROWS, 1, 1280)},
    "clvp": lambda maker: {"input_features": maker.floats(ROWS, 32, 64)},
    "kosmos-2": _first_are_images,
    "mllama": lambda maker: {"pixel_values": None},
    "blip_2_qformer": lambda maker: {
        "query_embeds": maker.floats(ROWS, 4, 32),
        "encoder_hidden_states": maker.floats(ROWS, 6, 32),
    },
    "speech-encoder-decoder": lambda maker: {"input_features": None},
    "videomt": lambda maker: {"pixel_values_videos": maker.floats(ROWS, 2, 3, *maker.sides())},
}
"""Arguments that no rule makes, by model type."""


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor with a gradient in a model's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss; else the mean squared distance of its outputs to fixed numbers."""
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, dict) else None
    if loss is not None and loss.requires_grad:
        return loss.sum()
    total = 0
    for value in tensors(output):
        goal = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
        total = total + (value - goal).square().mean()
    if not isinstance(total, Tensor):
        raise ValueError("no output has a gradient")
    return total


WAYS = (
    ("", True, True),
    ("distance of outputs", True, False),
    ("text alone", False, True),
    ("text alone, distance of outputs", False, False),
)
"""What is said of a batch; whether it has images or sound where it need not; whether labels."""


def ways(model: nn.Module) -> Iterator[tuple[str, Callable[[], Batch]]]:
    """Ways to make a batch, the best first."""
    for words, media, labelled in WAYS:
        for turned in (False, True):  # sound by frames, or by features
            yield words, Maker(model, media, labelled, turned).batch
