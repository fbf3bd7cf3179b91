"""What is known of other people's models: names of classes and attributes, and what was declared.

Read in transformers 5.4 to 5.23. Code elsewhere only looks things up here, so that a
family whose names are new needs a line in this file. Names of classes stand for their
subclasses too; where two classes share a name, the file stands before it
(``modeling_ctrl.MultiHeadAttention``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

Fusion = Literal["sectioned", "interleaved"]


def class_names(module: nn.Module) -> set[str]:
    """The names under which a module's class and its bases may stand in a table."""
    bases = type(module).__mro__
    files = (f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for cls in bases)
    return {cls.__name__ for cls in bases} | set(files)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Attentions: projections and heads ------------------------------------------------


@dataclass(frozen=True)
class Convention:
    """Names of the projections of an attention module, relative to it.

    A name is a dotted path; ``..`` in front of it starts at the parent. A
    fused projection stands under ``fused``; with ``query`` beside it (the
    cross-attention of GPT-2) it holds keys and values alone.

    Args:
        query, key, value: the projections, where they are separate.
        fused: the projection that holds several of them.
        layout: ``sectioned`` (all query rows, then all key rows, then all
            value rows) or ``interleaved`` (per key-value head: its query
            rows, its key rows, its value rows).
        outputs: names under which the output projection may be found.
    """

    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    layout: Fusion = "sectioned"
    outputs: tuple[str, ...] = (
        *("o_proj", "out_proj", "proj", "dense", "out_lin", "o", "Wo", "wo", "c_proj"),
        *("to_out.0", "to_out", "linear_out", "projection_layer", "projection", "attention_out"),
        "..output.dense",
    )


CONVENTIONS = (
    Convention("q_proj", "k_proj", "v_proj"),
    Convention("query", "key", "value"),
    Convention("query_proj", "key_proj", "value_proj"),
    Convention("q_lin", "k_lin", "v_lin"),
    Convention("q", "k", "v"),
    Convention("wq", "wk", "wv"),
    Convention("Wq", "Wk", "Wv"),
    Convention("project_q", "project_k", "project_v"),
    Convention("to_q", "to_k", "to_v"),
    Convention("linear_q", "linear_k", "linear_v"),
    Convention("q_attn", fused="c_attn"),
    Convention(fused="c_attn"),
    Convention(fused="Wqkv"),
    Convention(fused="qkv_proj"),
    Convention(fused="qkv"),
    Convention(fused="query_key_value", layout="interleaved"),
)
"""How attentions name their projections, in the order in which the names are tried."""

NO_ATTENTION = re.compile(r"mlp|feed_?forward|ffn|glu")
"""In the lower-case name of a class that is no attention, whatever else the name says."""

UNREADABLE = _names("CodeGenAttention GPTBigCodeAttention MiniMaxLightningAttention")
"""Classes with the names of a convention that order their rows in another way."""

HEAD_COUNTS = (
    *("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead"),
    "num_attn_heads",
)
"""Attributes of an attention or its config with the number of query heads."""

KEY_VALUE_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_heads_kv")
"""The same of key-value heads."""

HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
"""The same with the width of a head."""

QUERY_NORMS = ("q_norm", "q_layernorm", "query_norm", "q_ln", "qk_norm", "query_layernorm")
"""Children of an attention that norm its queries."""

GATED = _names(
    "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention Qwen4ExpTextAttention"
)
"""Attentions whose query projection holds, a head, its rows and then those of a gate."""

UNSCALED = _names("GPTNeoSelfAttention")
"""Attentions that do not scale their logits, and do not state so."""

DISENTANGLED = "disentangled_attention_bias"
"""Attribute of attentions that add terms of content and position (DeBERTa)."""

# Attentions: what their layers read --------------------------------------------------

CROSS = re.compile(r"cross|enc_?dec|encoder_(decoder_)?att|multihead_attn", re.IGNORECASE)
"""In the name, or a name close around it, of an attention to another sequence."""

GENERIC_NAMES = ("self", "attention", "attn", "att")
"""Names of an attention that say nothing of what it attends to; the name above them does."""

SEPARATE_KEYS = _names(
    """
    CanineSelfAttention CpmAntAttention EdgeTamAttention EdgeTamVideoAttention
    EdgeTamVideoPerceiverAttention EdgeTamVideoRoPESelfAttention GLPNEfficientSelfAttention
    GroundingDinoMultiheadAttention GroupViTAssignAttention Idefics2PerceiverAttention
    Inkling2FullAttention LocalSelfAttention LongT5TransientGlobalAttention LxmertAttention
    MMGroundingDinoMultiheadAttention Mask2FormerAttention MobileBertSelfAttention
    MuseGlimmerAssistantAttention OmDetTurboMultiheadAttention OneFormerAttention
    OneFormerTextMapperAttention PerceiverSelfAttention PvtEfficientSelfAttention
    PvtV2SelfAttention Sam2Attention Sam2VideoAttention Sam2VideoRoPEAttention Sam3Attention
    Sam3LiteTextAttention Sam3TrackerAttention Sam3TrackerVideoAttention
    Sam3TrackerVideoRoPEAttention SamAttention SamHQAttention SegformerAttention
    SegformerEfficientSelfAttention TableTransformerAttention
    VideoPrismMultiheadAttentionPoolingHead VisualBertRegionToPhraseAttention
    ZoeDepthMultiheadAttention modeling_ctrl.MultiHeadAttention
    """
)
"""Attentions whose k is called with another tensor than q, those named :data:`CROSS` aside."""

SEPARATE_VALUES = _names(
    """
    ConditionalDetrSelfAttention DFineSelfAttention DeformableDetrSelfAttention
    Deimv2SelfAttention DetrAttention DetrCrossAttention DetrSelfAttention EdgeTamAttention
    EdgeTamVideoAttention EdgeTamVideoPerceiverAttention EdgeTamVideoRoPECrossAttention
    EdgeTamVideoRoPESelfAttention GroundingDinoMultiheadAttention Inkling2FullAttention
    LwDetrAttention MMGroundingDinoMultiheadAttention Mask2FormerAttention
    MaskFormerDetrCrossAttention MaskFormerDetrSelfAttention MobileBertSelfAttention
    OmDetTurboMultiheadAttention OneFormerAttention OneFormerTextMapperAttention
    PPDocLayoutV2SelfAttention PPDocLayoutV3SelfAttention PPDocLayoutV4SelfAttention
    RTDetrSelfAttention RTDetrV2SelfAttention RfDetrAttention Sam2Attention Sam2VideoAttention
    Sam2VideoRoPEAttention Sam3Attention Sam3LiteTextAttention Sam3TrackerAttention
    Sam3TrackerVideoAttention Sam3TrackerVideoRoPEAttention SamAttention SamHQAttention
    SeamlessM4TConformerSelfAttention TableTransformerAttention VJEPA2PoolerCrossAttention
    Wav2Vec2BertSelfAttention Wav2Vec2ConformerSelfAttention XCLIPCrossAttention
    ZoeDepthMultiheadAttention modeling_ctrl.MultiHeadAttention
    """
)
"""Attentions whose v is called with another tensor than k."""

# Attentions: rotation by position ----------------------------------------------------

ROTARY = "rotary"
"""In the names of functions, children and classes that rotate queries and keys."""

ROTATION_FLAGS = ("use_rope", "is_local_attention")
"""Attributes that are false in an attention that does not rotate, though its class can."""

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

HEAD_CHILDREN = _names(
    "lm_head classifier score head fc qa_outputs embed_out output_projection"
)
"""Children that make the outputs of a model which is not one of transformers'."""

# Masks -------------------------------------------------------------------------------

MASKS = ("attention_mask", "encoder_attention_mask", "decoder_attention_mask", "labels")
"""Arguments of a model's forward that say which tokens are real."""

SOUND_INPUTS = ("input_values", "input_features")
"""Main inputs of models of sound."""

IMAGE_INPUT = "pixel_values"
"""Main input of models of images."""

LENGTHENING = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")
"""Methods of models that pad sequences behind their end, to a multiple of a length."""

TIME_FIRST = _names(
    """
    LEDEncoderSelfAttention LongformerSelfAttention XLNetLayer
    modeling_fsmt.DecoderLayer modeling_fsmt.EncoderLayer
    """
)
"""Modules that work on ``[T, B, d]``."""

# What users declare ------------------------------------------------------------------

HOW_TO_DECLARE = (
    "name its projections with hf_precond.declare_attention('ClassName', query='…', key='…', "
    "value='…', output='…', heads='attribute or number') before the optimizer is created"
)
"""The remedy in messages on attentions that were not found."""


@dataclass(frozen=True)
class Declaration:
    """One call of :func:`declare_attention`, which explains the fields."""

    target: str | type[nn.Module]
    convention: Convention
    heads: int | str
    key_value_heads: int | str | None
    head_size: int | str | None
    cross: bool
    rotary: bool
    normed: bool
    separate_inputs: frozenset[str]

    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether the module at ``path`` is meant."""
        if isinstance(self.target, type):
            return isinstance(module, self.target)
        if self.target in class_names(module):
            return True
        parts, patterns = path.split("."), self.target.split(".")
        return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


_DECLARED: list[Declaration] = []


def declare_attention(
    target: str | type[nn.Module],
    *,
    heads: int | str,
    query: str | None = None,
    key: str | None = None,
    value: str | None = None,
    output: str | None = None,
    fused: str | None = None,
    layout: Fusion = "sectioned",
    key_value_heads: int | str | None = None,
    head_size: int | str | None = None,
    cross: bool = False,
    rotary: bool = False,
    normed: bool = False,
    separate_inputs: Iterable[str] = (),
) -> Declaration:
    """Declare which modules of a model are attentions, and which of their layers is which.

    ::

        declare_attention("MyMixer", query="a", key="b", value="c", output="d", heads="n_heads")
        declare_attention("layers.*.mix", fused="abc", output="out", heads=8)

    Args:
        target: the module's class, its class name, or a pattern of module
            paths (``*`` stands for anything within one part of the path).
        heads: number of query heads, or the attribute (dotted, from the
            module) that holds it.
        query: name of the query projection, relative to the module (dotted;
            ``..`` in front starts at the parent).
        key: the same of the key projection.
        value: the same of the value projection.
        output: the same of the output projection. Default ``None``: there is
            none.
        fused: name of a projection that holds query, key and value rows (or,
            beside ``query``, key and value rows) in one weight.
        layout: row order of ``fused``: ``sectioned`` (the default) or
            ``interleaved`` (per key-value head).
        key_value_heads: number of key-value heads, or the attribute that holds
            it. Default ``None``: as many as ``heads``.
        head_size: width of a head, or the attribute that holds it. Default
            ``None``: query rows / ``heads``.
        cross: keys and values read another sequence than the queries.
        rotary: queries and keys are rotated by position.
        normed: queries and keys pass a norm of their own.
        separate_inputs: ``"k"`` where the key projection is called with another
            tensor than the query projection, ``"v"`` where the value projection
            is with another than the key projection.

    Returns:
        The declaration, for :func:`forget_attention`. Later declarations win
        over earlier ones, and all of them over the built-in table.

    Raises:
        ValueError: when the names name neither three projections nor a fused
            one, or an option has a value that is none of the above.
    """
    separate = query is not None and key is not None and value is not None
    if not (separate and fused is None) and not (fused is not None and key is None is value):
        raise ValueError(
            "declare_attention: give query, key and value, or fused (alone, or with query when "
            f"fused holds keys and values); got query={query!r}, key={key!r}, value={value!r}, "
            f"fused={fused!r}."
        )
    if layout not in ("sectioned", "interleaved"):
        raise ValueError(
            f"layout={layout!r}: declare_attention takes 'sectioned' or 'interleaved'."
        )
    roles = frozenset(separate_inputs)
    if not roles <= {"k", "v"}:
        raise ValueError(
            f"separate_inputs={separate_inputs!r}: declare_attention takes 'k', 'v' or both."
        )
    declaration = Declaration(
        target,
        Convention(query, key, value, fused, layout, () if output is None else (output,)),
        heads,
        key_value_heads,
        head_size,
        cross,
        rotary,
        normed,
        roles,
    )
    _DECLARED.append(declaration)
    return declaration


def forget_attention(declaration: Declaration) -> None:
    """Undo one :func:`declare_attention`.

    Args:
        declaration: what it returned.
    """
    _DECLARED.remove(declaration)


def declared(path: str, module: nn.Module) -> Declaration | None:
    """The latest declaration that means the module at ``path``."""
    for declaration in reversed(_DECLARED):
        if declaration.matches(path, module):
            return declaration
    return None
