"""What is known of other people's models: names of classes and of attributes.

Read in transformers 5.4 to 5.23. Code elsewhere only looks things up here, so that a
family whose names are new needs a line in this file. Names of classes stand for their
subclasses too; where two classes share a name, the file stands before it
(``modeling_ctrl.MultiHeadAttention``).
"""

from __future__ import annotations

import re

# fmt: off

# Attentions: projections and heads ------------------------------------------------

CONVENTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("Wq", "Wk", "Wv"),
    ("project_q", "project_k", "project_v"),
    ("to_q", "to_k", "to_v"),
    ("linear_q", "linear_k", "linear_v"),
    ("q_head", "k_head", "v_head"),
    ("projection_query", "projection_key", "projection_value"),
    ("q_proj.linear", "k_proj.linear", "v_proj.linear"),
    ("q_content_proj", "k_content_proj", "v_proj"),
    (
        "self_attn_query_content_proj", "self_attn_key_content_proj", "self_attn_value_proj",
    ),
    (
        "cross_attn_query_content_proj", "cross_attn_key_content_proj", "cross_attn_value_proj",
    ),
    ("vision_proj", "text_proj", "values_text_proj"),
    ("q_attn", None, None, "c_attn"),
    ("to_q", None, None, "to_kv"),
    ("queries.linear", None, None, "keys_values.linear", "interleaved"),
    (None, None, None, "c_attn"),
    (None, None, None, "att_proj"),
    (None, None, None, "Wqkv"),
    (None, None, None, "qkv_proj"),
    (None, None, None, "qkv"),
    (None, None, None, "in_proj_qkv"),
    (None, None, None, "in_proj_qkvz", "interleaved"),
    (None, None, None, "in_proj", "interleaved"),
    (None, None, None, "queries_keys_values.linear", "interleaved"),
    (None, None, None, "query_key_value", "interleaved"),
)
"""How attentions name their projections, in the order in which the names are tried.

Each is query, key, value, fused projection and its layout, as in
:class:`~hf_precond.architectures.attention_block.Convention`.
"""

LATENT_CONVENTIONS = (
    ("q_b_proj", "q_a_proj", "kv_b_proj", "kv_a_proj_with_mqa"),
    ("q_gate_proj", "q_a_proj", "kv_b_proj", "kv_a_proj_with_mqa"),
    ("q_proj", None, "kv_b_proj", "kv_a_proj_with_mqa"),
    ("q_proj", None, "kv_b_proj", ""),
    ("q_b_proj", "q_a_proj", "kv_proj", None),
)
"""The same of attentions whose keys and values are images of a latent (DeepSeek's).

Each is query, the down-projection before it, keys and values together, and the down-projection
that makes their latent (empty: another attention has it; ``None``: the keys are the values).
"""

POSITION_PROJECTIONS = {
    "q_pos": ("q_pos_proj", "self_attn_query_pos_proj", "cross_attn_query_pos_proj"),
    "k_pos": ("k_pos_proj", "self_attn_key_pos_proj", "cross_attn_key_pos_proj"),
    "q_sine": ("q_pos_sine_proj", "cross_attn_query_pos_sine_proj"),
}
"""Role to names of further projections of queries and keys, of positions (Conditional DETR's)."""

GROUPED_OUTPUT, OUTPUT_GROUPS = "o_a_proj", "n_groups"
"""Output projection that projects groups of heads apart, and its attribute with their number."""

ROTATION_KIND = "rope_layer_type"
"""Attribute of an attention that is called with rotations by name: which of them is its own."""

SHARED_KEY_SIZES = ("qk_rope_head_dim",)
"""Attributes of such an attention with the width of the part of the keys that heads share."""

OUTPUTS = (
    "o_proj", "out_proj", "proj", "dense", "out_lin", "o", "Wo", "wo", "c_proj",
    "to_out.0", "to_out", "linear_out", "projection_layer", "projection", "attention_out",
    "..output.dense", "output", "..output", "post_proj", "proj_out", "projection.linear",
    "o_proj.linear", "out_vision_proj", "output_projection.o_proj", "self_attn.output_proj",
    "cross_attn.output_proj",
)
"""Names of the output projection, in the same order."""

FUSED_ROWS: dict[str, tuple[int | str, str]] = {
    "CodeGenAttention": (4, "qvk"),
    "GPTBigCodeAttention": ("interleaved", "qkv"),
    "MiniMaxLightningAttention": ("interleaved", "qkv"),
    "Qwen3NextGatedDeltaNet": ("interleaved", "qkvz"),
}
"""Classes with the names of a convention that order the rows of a fused weight in another way: in
how many groups, or how else, and what comes after what in a group; ``z`` is a gate of the values.
"""

VALUE_ROWS = ("value_dim", "out_dim_projection")
"""Attributes of an attention with the rows of all values, where a head's values are wider."""

BORROWS, LENDS, LENDING_KIND = "is_kv_shared_layer", "store_full_length_kv", "layer_type"
"""Attributes that are true in an attention which uses the keys and values of another, the last one
of its class and kind before it that lends them; that are true in the latter; with the kind."""

KEYS_ARE_VALUES = "use_alternative_attention"
"""Attribute that is true in an attention whose key projection makes its values too."""

PAIRED_VALUES = ("DiffLlamaAttention",)
"""Attentions whose output projection reads, a pair of heads, the values of a head of the first
half of them and then of one of the second."""

WIDER_OUTPUTS = ("ConvBertSelfAttention",)
"""Attentions whose output projection reads something else behind the heads' values."""

SINGLE_HEADS = ("GroupViTAssignAttention", "JanusVQVAEAttnBlock", "ChameleonVQVAEEncoderAttnBlock")
"""Attentions with one head, which they do not state."""

ATTENTION = re.compile(r"attention|attn|DeltaNet|MLA$", re.IGNORECASE)
"""In the name of a class that is one."""

NO_ATTENTION = re.compile(r"(?:[mM]lp|MLP|[fF]fn|FFN|[gG]lu|GLU|[fF]eed_?[fF]orward)(?![a-z])")
"""In the name of a class that is no attention, whatever else the name says."""

UNREADABLE = ("AriaCrossAttention", "Florence2VisionChannelAttention")
"""Classes with the names of a convention whose queries and keys do not meet in logits."""

HEAD_COUNTS = (
    "num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead",
    "num_attn_heads", "decoder_self_attention_heads", "num_k_heads", "self_attn.attention_heads",
    "cross_attn.attention_heads",
)
"""Attributes (dotted) of an attention or its config with the number of query heads."""

KEY_VALUE_HEAD_COUNTS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_heads_kv", "kv_heads",
)
"""The same of key-value heads."""

HEAD_SIZES = (
    "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv", "head_k_dim",
    "key_dim",
)
"""The same with the width of a head."""

QUERY_NORMS = ("q_norm", "q_layernorm", "query_norm", "q_ln", "qk_norm", "query_layernorm")
"""Children of an attention that norm its queries."""

GATED = (
    "Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention",
    "Qwen4ExpTextAttention",
)
"""Attentions whose query projection holds, a head, its rows and then those of a gate."""

OUTPUT_GATES = ("gate_proj", "g_proj", "q_gate_proj", "exclusive_self_attention")
"""Children of an attention that make a gate of what its heads give to the output projection."""

UNSCALED = ("GPTNeoSelfAttention",)
"""Attentions that do not scale their logits, and do not state so."""

OWN_SCALE = ("CvtSelfAttention", "GroupViTAssignAttention")
"""Attentions that scale their logits by ``scale``, which is not ``1/√d_h``."""

SHORT_CONVOLUTION = "conv1d"
"""Child of an attention through which queries, keys and values pass."""

DISENTANGLED = "disentangled_attention_bias"
"""Attribute of attentions that add terms of content and position (DeBERTa)."""

# Attentions: what their layers read --------------------------------------------------

CROSS = re.compile(r"cross|enc_?dec|encoder_(decoder_)?att|multihead_attn", re.IGNORECASE)
"""In the name, or a name close around it, of an attention to another sequence."""

GENERIC_NAMES = ("self", "attention", "attn", "att")
"""Names of an attention that say nothing of what it attends to; the name above them does."""

SEPARATE_INPUTS = {
    "k": (
        "CanineSelfAttention", "CpmAntAttention", "EvollaSequenceCompressorAttention",
        "FunnelRelMultiheadAttention", "GLPNEfficientSelfAttention", "GroupViTAssignAttention",
        "GroundingDinoBiMultiHeadAttention", "Idefics2PerceiverAttention",
        "LevitAttentionSubsample", "LocalSelfAttention", "LongT5TransientGlobalAttention",
        "LxmertAttention", "MMGroundingDinoBiMultiHeadAttention", "MuseGlimmerAssistantAttention",
        "PerceiverSelfAttention", "PvtEfficientSelfAttention", "PvtV2SelfAttention",
        "SegformerAttention", "SegformerEfficientSelfAttention", "SuperGlueSelfAttention",
        "VideoPrismMultiheadAttentionPoolingHead", "VisualBertRegionToPhraseAttention",
    ),
    "v": (
        "ConditionalDetrSelfAttention", "DFineSelfAttention", "DeformableDetrSelfAttention",
        "Deimv2SelfAttention", "DetrAttention", "DetrCrossAttention", "DetrSelfAttention",
        "EdgeTamVideoRoPECrossAttention", "LwDetrAttention", "MaskFormerDetrCrossAttention",
        "MaskFormerDetrSelfAttention", "PPDocLayoutV2SelfAttention", "PPDocLayoutV3SelfAttention",
        "PPDocLayoutV4SelfAttention", "RTDetrSelfAttention", "RTDetrV2SelfAttention",
        "RfDetrAttention", "SeamlessM4TConformerSelfAttention", "VJEPA2PoolerCrossAttention",
        "Wav2Vec2BertSelfAttention", "Wav2Vec2ConformerSelfAttention", "XCLIPCrossAttention",
    ),
    "kv": (
        "CvtSelfAttention", "EdgeTamAttention", "EdgeTamVideoAttention",
        "EdgeTamVideoPerceiverAttention", "EdgeTamVideoRoPESelfAttention",
        "GroundingDinoMultiheadAttention", "Inkling2FullAttention",
        "MMGroundingDinoMultiheadAttention", "Mask2FormerAttention", "MobileBertSelfAttention",
        "OmDetTurboMultiheadAttention", "OneFormerAttention", "OneFormerTextMapperAttention",
        "Sam2Attention", "Sam2VideoAttention", "Sam2VideoRoPEAttention", "Sam3Attention",
        "Sam3LiteTextAttention", "Sam3TrackerAttention", "Sam3TrackerVideoAttention",
        "Sam3TrackerVideoRoPEAttention", "SamAttention", "SamHQAttention",
        "TableTransformerAttention", "ZoeDepthMultiheadAttention",
        "modeling_ctrl.MultiHeadAttention",
    ),
}
"""Attentions whose k reads another tensor than q (those named :data:`CROSS` do anyway), whose v
reads another than k, or both."""

# Attentions: rotation by position ----------------------------------------------------

ROTARY = "rotary"
"""In the names of functions, children and classes that rotate queries and keys."""

INTERLEAVED_ROTATION, INTERLEAVED_FLAG = "_interleave", "rope_interleave"
"""End of the name of a function that is called where a config says so, and the field."""

ROTATION_FLAGS = ("use_rope", "is_local_attention")
"""Attributes that are false in an attention that does not rotate, though its class can."""

ROTATED_INPUTS = ("Wav2Vec2BertSelfAttention", "Wav2Vec2ConformerSelfAttention")
"""Attentions that rotate, if anything, what their q and k read, and not queries and keys."""

OWN_ROTATIONS = {
    "VJEPA2RopeAttention": ("position_mask", "get_position_ids", "apply_rotary_embeddings"),
}
"""Attentions that compute their rotation inside, of pairs of neighbours: the name of the argument
with the positions, and methods that make of an input and these what rotates, and rotate by it."""

UNROTATED_ACROSS = ("Moonshine", "Idefics")
"""Families (first words of a class) that rotate where an attention is not across two sequences."""

ROTATED_IN_WINDOWS = ("Cohere2", "Flint")
"""Families that rotate in layers with a sliding window only."""

UNROTATED_BESIDE_WINDOWS = ("Exaone", "Kolibri")
"""Families that do not rotate in the layers without a sliding window, where others have one."""

# Other modules and parameters --------------------------------------------------------

NORM_CLASS = re.compile(r"(?:rms|layer|batch|group|instance)_?norm", re.IGNORECASE)
"""In the name of a class that is a norm, torch's aside."""

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""In the lower-case name of a parameter that the Trainer does not decay."""

HEAD_CHILDREN = (
    "lm_head", "classifier", "score", "head", "fc", "qa_outputs", "embed_out",
    "output_projection",
)
"""Children that make the outputs of a model which is not one of transformers'."""

FOR_TASK = re.compile("For[A-Z]")
"""In the name of a class of transformers that is for a task."""

NECKS = ("neck", "fpn")
"""Children beside the base model of a model which are between it and the head."""

EMBEDDED = re.compile(
    r"(?<!class_)(?<!bbox_)(?<!box_)embed|(?:^|[._])emb(?:$|[._])|(?:^|[._])stem|patch|"
    r"cls_token|mask_token|feature_extractor|feature_projection"
)
"""In the name of a parameter below the first layer: it makes the vectors that the layers read."""

ABOVE_LAYERS = re.compile(
    r"rel(?:ative)?_(?:pos|position|attention)_bias|(?:^|[._])final_|project_out"
)
"""In the name of a parameter above the last layer, wherever it is registered. As in BEiT's scheme,
a relative position bias that the layers share is one."""

PARALLEL_TOWERS = ("text_model", "vision_model", "image_model", "audio_model")
"""Encoders side by side, whose outputs meet (CLIP and its like)."""

LORA_MARK = ".lora_"
"""In the name of a parameter of LoRA or DoRA."""

# Experts -----------------------------------------------------------------------------

EXPERT = re.compile(r"expert", re.IGNORECASE)
"""In the name of a class that holds experts' matrices, and of a list of experts."""

EXPERT_COUNTS = ("num_experts", "moe_num_experts")
"""Attributes of such modules with the number of experts."""

TRANSPOSED_EXPERTS = "is_transposed"
"""Attribute that is true in stacks of experts whose matrices are ``[in, out]``."""

FLAT_EXPERTS = {"DbrxExpertGLU": {"w1": False, "v1": False, "w2": True}}
"""Modules whose stacks are ``[experts · rows, columns]``: weight to whether it is transposed."""

ROUTER = re.compile(r"gate|gating|wg|\w*router\w*")
"""The name of a child, beside experts, that chooses among them."""

# Masks -------------------------------------------------------------------------------

MASKS = {
    "attention_mask": "attention_mask",
    "encoder_attention_mask": "encoder_attention_mask",
    "decoder_attention_mask": "decoder_attention_mask",
    "labels": "labels",
}
"""Arguments of a forward that say which tokens are real, to what transformers calls them."""

SOUND_INPUTS = ("input_values", "input_features")
"""Main inputs of models of sound."""

IMAGE_INPUT = "pixel_values"
"""Main input of models of images."""

LENGTHENING = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")
"""Methods of models that pad sequences behind their end, to a multiple of a length."""

TIME_FIRST = (
    "LEDEncoderSelfAttention", "LongformerSelfAttention", "XLNetLayer",
    "modeling_fsmt.DecoderLayer", "modeling_fsmt.EncoderLayer",
)
"""Modules that work on ``[T, B, d]``."""

CHECKPOINTING = "_gradient_checkpointing_func"
"""Attribute of modules that are checkpointed: the function that does it."""

# Messages ----------------------------------------------------------------------------

HOW_TO_DECLARE = (
    "name its projections with hf_precond.declare_attention('ClassName', query='…', key='…', "
    "value='…', output='…', heads='attribute or number') before the optimizer is created"
)
"""The remedy in messages on attentions that were not found."""
