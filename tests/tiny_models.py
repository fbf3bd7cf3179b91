"""Tiny models of every architecture of transformers, from configs that are shrunk by rules.

A rule goes by the name of a field; :data:`OVERRIDES` has a row where none can know.
:mod:`tests.tiny_batches` makes what the models are called with.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, INNER, HEADS, HEAD, LAYERS = 32, 48, 2, 16, 2
VOCABULARY, POSITIONS, CLASSES = 96, 64, 3
FIRST_WORD = 70
"""Token ids below may be special."""

TASKS = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
    "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION",
    "ZERO_SHOT_OBJECT_DETECTION", "MASK_GENERATION", "CTC", "RNNT", "TDT", "RETRIEVAL",
    "TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION",
    "TEXT_RECOGNITION", "TABLE_RECOGNITION", "VISUAL_QUESTION_ANSWERING", "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING", "IMAGE_MATTING", "POSE_ESTIMATION", "AUDIO_FRAME_CLASSIFICATION",
    "NEXT_SENTENCE_PREDICTION", "PRETRAINING",
)  # fmt: skip
"""The model of the first of these tasks that a type has is built."""

ATTRIBUTES = ("layer_types", "num_attention_heads", "num_hidden_layers")
"""What a config may have under another name."""
COMMON = {field.name for field in dataclasses.fields(PretrainedConfig)}
KEPT = ("head_dim",)
"""Fields of a default config that are kept though their class computes them."""

TOKEN = re.compile(
    r"(^|_)(token|pad|bos|eos|sep|cls|mask|boi|eoi|boa|eoa|user|unk|lang|start|end|patch|newline)"
    r"_(id|index)$"
)
NONE_LEFT = re.compile(r"layer_?drop|drop_path|mask_(time|feature)_prob|spec_augment")
"""What would leave out layers or mask short sequences as a whole."""
KV_HEADS = re.compile(r"(kv|key_value)_(attention_)?heads|num_heads_kv|kv_n_heads")
HEAD_COUNT = re.compile(r"(^|_)heads?$")
EXPERTS = re.compile(r"(^|_)(num_)?(local_|routed_|moe_num_)?experts$")
TOP_K = re.compile(r"experts_per_tok|moe_top_?k|top_k_experts|moe_k$")
DEPTH = re.compile(r"(^|_)layers?$|^n_layer$|(^|_)depth$|num_blocks$")
FFN = re.compile(r"intermediate|ffn|feed_?forward|inner|mlp_(dim|hidden)|d_ff|dff|linear_units")
HEAD_SIZE = re.compile(r"head_dim|head_size|d_kv|kv_channels|dim_head|d_head|lora_rank")
STAGES = re.compile(r"depths|per_stage|num_stages|block_repeats|stage_num_blocks")
LIST_DEPTH = re.compile(
    r"depths|num_layers|num_blocks|block_repeats|numb_of_layers|blocks_per_stage"
)
LIST_WIDTH = re.compile(r"hidden_sizes|channels?|_dims?$|dim_per_stage|key_dim|conv_dim|embed_dims")
NUMBERS = {
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "num_codebooks": 4, "codebook_size": 32,
    "num_mel_bins": 32, "index_topk": 4, "num_queries": 5, "num_query_tokens": 4,
    "sliding_window": 8, "attention_chunk_size": 8, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "num_filters": 4, "num_groups": 2, "n_groups": 1, "mamba_n_groups": 1,
    "train_num_points": 32, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16,
    "num_denoising": 5, "max_length": 64, "prediction_length": 4, "context_length": 16,
    "window_size": 4, "num_pos_feats": 16, "mm_tokens_per_image": 4, "latent_query_num": 4,
    "num_patches": 16, "n_window": 8, "num_image_tokens": 4, "resampler_n_latents": 4,
    "chunk_size": 8, "mamba_chunk_size": 8,
    "max_depth": 10, "embedding_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "qk_rope_head_dim": 8,
    "temporal_patch_size": 2, "num_frames": 2, "frames_per_clip": 2, "hash_buckets": 16,
}  # fmt: skip
"""Largest values of fields."""


def model_types() -> list[str]:
    """Every type that has a model."""
    return [name for name in CONFIG_MAPPING if model_name(name)]


def model_name(model_type: str) -> str | None:
    """The class that is built for a type."""
    tables = {task: getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS}
    if model_type in tables["MASKED_LM"] and model_type in tables["SEQUENCE_CLASSIFICATION"]:
        del tables["MASKED_LM"], tables["CAUSAL_LM"]
    for table in (*tables.values(), modeling_auto.MODEL_MAPPING_NAMES):
        if model_type in table:
            found = table[model_type]
            return found if isinstance(found, str) else found[0]
    return None


def tiny_config(model_type: str) -> PretrainedConfig:
    """A small config of a type, its sub-configs shrunk alike."""
    return _Shrinker().config(CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {})))


def tiny_model(model_type: str) -> nn.Module:
    """The model of a type with random weights, in train mode."""
    torch.manual_seed(0)
    return getattr(transformers, str(model_name(model_type)))(tiny_config(model_type)).train()


class _Shrinker:
    """Shrinks a config and all inside it; a special token has one id in all of them."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def config(self, default: Any, extra: dict[str, Any] | None = None) -> Any:
        cls = type(default)
        if cls.model_type == "timm_backbone":  # timm is no dependency
            number = len(default.out_indices or [4])
            default = transformers.ResNetConfig(out_indices=[1, 2, 3, 4][-number:])
            cls = type(default)
        extra = {**OVERRIDES.get(cls.model_type, {}), **(extra or {})}
        held = {field.name: held_value(default, field.name) for field in dataclasses.fields(cls)}
        held |= {name: held_value(default, name) for name in ATTRIBUTES}
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name, value = field.name, held[field.name]
            computed = field.default is None and name not in KEPT
            if isinstance(value, PretrainedConfig):
                values[name] = self.config(value, extra.pop(name, None))
            elif not (name in COMMON or name.startswith("_out") or value is None or computed):
                values[name] = self.value(name, value, held)
        values |= extra
        values |= self.outputs(default, values, extra)
        if held.get("is_encoder_decoder"):
            values.setdefault("decoder_start_token_id", 1)
            values.setdefault("pad_token_id", 0)
        config = self.make(cls, {"num_labels": CLASSES, **values})
        return self.mixed(config, held, values, extra)

    def make(self, cls: type, values: dict[str, Any]) -> Any:
        config = cls(**values)
        for part in self.ropes(vars(config).get("rope_parameters")):
            shrink_rope(part, config)
        return config

    def ropes(self, parameters: Any) -> list[dict[str, Any]]:
        """A table of RoPE, or that of each kind of layer."""
        if not isinstance(parameters, dict):
            return []
        return [p for p in parameters.values() if isinstance(p, dict)] or [parameters]

    def outputs(
        self, default: Any, values: dict[str, Any], extra: dict[str, Any]
    ) -> dict[str, Any]:
        """Which stages a backbone returns: as many as before, the last ones."""
        names, indices = (
            getattr(default, "stage_names", None),
            getattr(default, "out_indices", None),
        )
        if names is None or not indices or "out_indices" in extra:
            return {}
        if "num_hidden_layers" not in values or is_staged(vars(default)):
            return {"out_indices": list(indices)}
        layers = max(LAYERS, len(indices))
        return {
            "num_hidden_layers": layers,
            "out_indices": list(range(layers + 1))[-len(indices) :],
        }

    def mixed(
        self, config: Any, held: dict[str, Any], values: dict[str, Any], extra: dict[str, Any]
    ) -> Any:
        """The same with a layer of every kind, where layers are of several."""
        kinds = held.get("layer_types")
        names = ("layer_types", "layers_block_type")
        made = [inspect.getattr_static(type(config), name, None) for name in names]
        computed = any(isinstance(found, property) for found in made)
        if computed or not isinstance(kinds, list | tuple) or "layer_types" in extra:
            return config
        if "num_hidden_layers" not in values:
            return config
        kinds = list(dict.fromkeys(kinds))
        if set(kinds) <= set(vars(config).get("layer_types") or ()):
            return config
        layers = max(values["num_hidden_layers"], len(kinds))
        kinds += [kinds[-1]] * (layers - len(kinds))
        values = values | {"num_hidden_layers": layers, "layer_types": kinds}
        return self.make(type(config), {"num_labels": CLASSES, **values})

    # Values -----------------------------------------------------------------------------

    def value(self, name: str, value: Any, held: dict[str, Any]) -> Any:
        if NONE_LEFT.search(name) and isinstance(value, int | float):
            return type(value)(0)
        if name == "initializer_range":  # 1e-10 in some, with which nothing moves
            return max(value, 0.02)
        if isinstance(value, list | tuple):
            return type(value)(self.sequence(name, value))
        if type(value) is int:
            return self.number(name, value, held)
        return value

    def sequence(self, name: str, values: Any) -> Any:
        if not values or not all(type(value) is int for value in values):
            return values
        if LIST_DEPTH.search(name):
            return [min(value, 1) for value in values]
        if re.search(r"(image|input|img)_size", name):
            return [32] * len(values)
        if re.search(r"patch_size$", name):
            return [min(value, 8) for value in values]
        if LIST_WIDTH.search(name):
            return [narrow(value) for value in values]
        return values

    def number(self, name: str, value: int, held: dict[str, Any]) -> int:
        if name in NUMBERS or value <= 0:
            return min(value, NUMBERS.get(name, value))
        if TOKEN.search(name):
            return self.token(name)
        if "vocab" in name or name.endswith("num_embeddings"):
            return min(value, VOCABULARY)
        if KV_HEADS.search(name):
            heads = held.get("num_attention_heads", held.get("num_heads"))
            return min(value, HEADS if value == heads else 1)
        for pattern, most in BOUNDS.items():
            if pattern.search(name):
                return min(value, most)
        if re.search(r"(image|img|crop)_size|resolution", name):
            return min(value, 32 if largest(held.get("patch_size")) >= 7 else 64)
        if "patch_size" in name or "patch_stride" in name:
            return min(value, 8) if value >= 7 else value
        return narrow(value) if is_staged(held) else min(value, WIDTH)

    def token(self, name: str) -> int:
        for number, ending in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
            if name.endswith(ending):
                return number
        return self.ids.setdefault(name.replace("_index", "_id"), 4 + len(self.ids))


BOUNDS = {
    HEAD_COUNT: HEADS, EXPERTS: 4, TOP_K: 2, DEPTH: LAYERS, HEAD_SIZE: HEAD, FFN: INNER,
    re.compile("positions?($|_emb)"): POSITIONS,
}  # fmt: skip


def held_value(config: Any, name: str) -> Any:
    """An attribute, or ``None``; of layers that differ, what is declared."""
    try:
        return getattr(config, name, None)
    except Exception:
        return vars(config).get(name)


def is_staged(held: dict[str, Any]) -> bool:
    """Whether a config is of stages, each wider than the one before."""
    return any(STAGES.search(n) and isinstance(v, list | tuple) for n, v in held.items())


def narrow(width: int) -> int:
    """A width of a stage; ratios of stages are kept."""
    return max(4, width // 8) if width >= 16 else width


def largest(value: Any) -> int:
    return max(value) if isinstance(value, list | tuple) else value or 1


def shrink_rope(part: dict[str, Any], config: Any) -> None:
    """Cut sections and factors of RoPE to the size of a head, in place."""
    if part.get("rope_theta", 0) is None:
        part["rope_theta"] = 10000.0
    held = vars(config)
    size = held.get("qk_rope_head_dim") or held.get("head_dim") or HEAD
    half = int(size * part.get("partial_rotary_factor", 1.0)) // 2
    section = part.get("mrope_section")
    if section is None and "mrope_section" in modeling_source(type(config)):
        section = [2, 3, 3]
    if section is not None and sum(section) != half:
        section = [max(1, part * half // sum(section)) for part in section]
        part["mrope_section"] = [*section[:-1], half - sum(section[:-1])]
    elif section is not None:
        part["mrope_section"] = section
    for key in ("long_factor", "short_factor"):
        if key in part:
            part[key] = list(part[key])[:half]


@functools.cache
def modeling_source(config_class: type) -> str:
    """The text of the module with the models of a config."""
    path = Path(inspect.getfile(config_class))
    return "".join(p.read_text() for p in path.parent.glob("modeling_*.py"))


DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
}
"""What default configs need to be made at all."""
EFFICIENT = {
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
}
STREAM = {"chunk_length": 32, "chunk_right_context": 4, "chunk_left_context": 4}
SERIES = {"prediction_length": 4, "context_length": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "align_vision_model": EFFICIENT,
    "efficientnet": EFFICIENT,
    "blip-2": {"image_token_index": 5},
    "instructblip": {"image_token_index": 5},
    "instructblipvideo": {"video_token_index": 5},
    "superpoint": {"keypoint_decoder_dim": 65},
    "step3p5": {"sliding_window": 8},
    "radio": {"video_temporal_patch_size": 2},
    "nemotron3_5_transcribe_audio": STREAM,
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": (0, 1, 2, 3)},
    "cosmos3_edge_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    },
    "deepseek_ocr2_vision": {},
    "lilt": {"hidden_size": 48, "num_attention_heads": 2},
    "longcat_flash": {"qk_rope_head_dim": 8, "head_dim": 8},
    "moonshine_streaming": {"head_dim": 16, "num_key_value_heads": 2},
    "swin": {"window_size": 2},
    "donut-swin": {"window_size": 2},
    "nystromformer": {"segment_means_seq_len": 14, "num_landmarks": 7},
    "siglip2_vision_model": {"num_patches": 16},
    "musicgen_decoder": {},
    "clvp_encoder": {"use_rotary_embedding": False},
    "levit": {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 6], "key_dim": [8, 8, 8]},
    "slanext": {},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": SERIES | {"label_length": 4, "moving_average": 3},
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "chmv2": {
        "post_process_channels": [8, 8, 16, 16],
        "bins_strategy": "linear",
        "norm_strategy": "linear",
    },
    "tipsv2_dpt": {"neck_hidden_sizes": [8, 8, 16, 16]},
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4}
            for k in ("full_attention", "sliding_attention")
        }
    },
    "dac": {"encoder_hidden_size": 4, "decoder_hidden_size": 64},
    "neucodec": {"encoder_hidden_size": 4},
    "xcodec2": {"encoder_hidden_size": 4},
    "deepseek_vl_hybrid": {},
    "dinov3_convnext": {"hidden_sizes": [12, 24, 48, 96], "depths": [1, 1, 1, 1]},
    "edgetam_vision_model": {},
    "exaone4_5_vision": {"window_size": 32},
    "qwen2_5_vl_vision": {"window_size": 32},
    "janus_vqgan": {"num_res_blocks": 1, "channel_multiplier": (1, 1)},
    "chameleon_vqgan": {"num_res_blocks": 1, "channel_multiplier": (1, 1)},
    "emu3_vqgan": {"num_res_blocks": 1, "channel_multiplier": (1, 1)},
    "mobilenet_v1": {"depth_multiplier": 0.125},
    "mobilenet_v2": {"depth_multiplier": 0.2},
    "mobilevitv2": {"width_multiplier": 0.25},
    "muse_spark_audio": {
        "num_hidden_layers": 4,
        "hidden_sizes": (8, 16, 32, 64),
        "out_hidden_size": 32,
    },
    "pp_lcnet": {"scale": 0.25},
    "pp_lcnet_v3": {"scale": 0.25},
    "pp_lcnet_v4": {"scale": 0.25},
    "sam2_vision_model": {"backbone_channel_list": [96, 48, 24, 12]},
    "voxtral": {"audio_token_id": 5},
    "timesfm": {"context_length": 64},
    "timesfm2_5": {"context_length": 64},
    "textnet": {"stem_out_channels": 8},
    "voxtral_encoder": {"intermediate_size": 64},
    "glmasr_encoder": {"intermediate_size": 64},
    "granite_speech": {"downsample_rate": 2},
    "granite_speech_plus": {"downsample_rate": 2},
    "llama4_vision_model": {"intermediate_size": 128},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "univnet": {
        "model_hidden_channels": 8,
        "model_in_channels": 8,
        "kernel_predictor_hidden_channels": 8,
    },
    "vitmatte": {"convstream_hidden_sizes": [8, 8, 8], "fusion_hidden_sizes": [16, 8, 8, 8]},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4, "embedding_size": 8},
    "bros": {"bbox_scale": 1.0, "head_dim": None},
    "bridgetower_vision_model": {"hidden_size": 64},
    "bridgetower_text_model": {"num_attention_heads": 2},
    "chameleon": {"vocabulary_map": {"<image>": 9, "IMGIMGA": 10, "IMGIMGB": 11}},
    "codegen": {"rotary_dim": 4, "n_head": 4},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 32]},
    "efficientloftr": {"out_features": [8, 8, 16, 32]},
    "emu3": {
        "vocabulary_map": {
            "<image>": 9,
            "<|visual token 000000|>": 10,
            "<|visual token 000001|>": 11,
            "<|extra_200|>": 12,
        }
    },
    "esm": {"pad_token_id": 1, "vocab_size": 96, "mask_token_id": 5},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": {
        "intermediate_size": 48,
        "activation_sparsity_pattern": None,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention"] * 3,
        "num_kv_shared_layers": 1,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 1,
        "attention_k_eq_v": True,
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "glm5_next_text": {"index_kpool": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hgnet_v2": {"embedding_size": 8, "stem_channels": (3, 8, 6)},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "inkling_vision": {"hidden_size": 32, "num_hidden_layers": 2},
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "llava_next": {"image_grid_pinpoints": [[32, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron3_diarization": {
        "streaming_config": {"chunk_length": 32, "chunk_right_context": 4, "chunk_left_context": 4}
    },
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_shape": (2, 7),
        "axial_pos_embds_dim": (8, 24),
        "attn_layers": ("local", "lsh"),
        "local_attn_chunk_length": 7,
        "lsh_attn_chunk_length": 7,
        "num_buckets": 2,
        "hidden_size": 32,
    },
    "sam2_hiera_det_model": {
        "hidden_size": 12,
        "embed_dim_per_stage": [12, 24, 48, 96],
        "blocks_per_stage": [1, 1, 1, 1],
        "global_attention_blocks": [2],
        "image_size": [64, 64],
    },
    "swin2sr": {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "image_size": 8},
    "xlstm": {"num_heads": 2, "embedding_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        "attention_head_dim": 32,
        "attention_hidden_size": 64,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
    },
}
"""Fields that no rule gets right, by model type; of a config inside another by its field."""
