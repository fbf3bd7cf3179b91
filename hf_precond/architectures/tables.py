"""How attention modules name their projections: the built-in table and the public hook."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

Fusion = Literal["sectioned", "interleaved"]


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
    outputs: tuple[str, ...] = ()


_OUTPUTS = (
    "o_proj",
    "out_proj",
    "proj",
    "dense",
    "out_lin",
    "o",
    "Wo",
    "wo",
    "c_proj",
    "to_out.0",
    "to_out",
    "linear_out",
    "projection_layer",
    "projection",
    "attention_out",
    "..output.dense",
)


def _separate(query: str, key: str, value: str) -> Convention:
    return Convention(query, key, value, outputs=_OUTPUTS)


CONVENTIONS: tuple[Convention, ...] = (
    _separate("q_proj", "k_proj", "v_proj"),
    _separate("query", "key", "value"),
    _separate("query_proj", "key_proj", "value_proj"),
    _separate("q_lin", "k_lin", "v_lin"),
    _separate("q", "k", "v"),
    _separate("wq", "wk", "wv"),
    _separate("Wq", "Wk", "Wv"),
    _separate("project_q", "project_k", "project_v"),
    _separate("to_q", "to_k", "to_v"),
    _separate("linear_q", "linear_k", "linear_v"),
    Convention("q_attn", fused="c_attn", outputs=_OUTPUTS),
    Convention(fused="c_attn", outputs=_OUTPUTS),
    Convention(fused="Wqkv", outputs=_OUTPUTS),
    Convention(fused="qkv_proj", outputs=_OUTPUTS),
    Convention(fused="qkv", outputs=_OUTPUTS),
    Convention(fused="query_key_value", layout="interleaved", outputs=_OUTPUTS),
)

# Attention classes that share a name above but order their rows in another way.
UNREADABLE = frozenset(
    {"CodeGenAttention", "GPTBigCodeAttention", "MiniMaxLightningAttention"}
)

_GATED = frozenset(
    {"Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention"}
)
_UNSCALED = frozenset({"GPTNeoSelfAttention"})


def gates_values(module: nn.Module) -> bool:
    """Whether an attention's query projection holds, a head, its rows and then those of a gate.

    The gate multiplies what the head gives to the output projection.
    """
    return not _GATED.isdisjoint(cls.__name__ for cls in type(module).__mro__)


def logit_scale(module: nn.Module, size: int) -> float | None:
    """What an attention multiplies its logits with, where that is known not to be ``1/√d_h``.

    Args:
        module: the attention.
        size: width of a head.
    """
    own = getattr(module, "scaling", None)
    if isinstance(own, int | float):
        return float(own)
    if hasattr(module, "key_value_proj_dim"):  # T5 and its like, which older releases do not mark
        return 1.0
    if _UNSCALED.intersection(cls.__name__ for cls in type(module).__mro__):
        return 1.0
    if hasattr(module, "disentangled_attention_bias"):  # each term of DeBERTa's sum counts
        positions: Any = module.pos_att_type
        terms = 1 + sum(term in positions for term in ("c2p", "p2c"))
        return (size * terms) ** -0.5
    return None


@dataclass(frozen=True)
class Declaration:
    """What :func:`declare_attention` was told."""

    target: str | type[nn.Module]
    convention: Convention
    heads: int | str
    key_value_heads: int | str | None
    head_size: int | str | None
    cross: bool
    rotary: bool
    normed: bool

    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether a module at ``path`` is meant."""
        if isinstance(self.target, type):
            return isinstance(module, self.target)
        if self.target in {cls.__name__ for cls in type(module).__mro__}:
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
) -> Declaration:
    """Say which modules of an unknown model are attentions, and what is what in them.

    ::

        declare_attention("MyMixer", query="a", key="b", value="c", output="d", heads="n_heads")
        declare_attention("layers.*.mix", fused="abc", output="out", heads=8)

    Args:
        target: the module's class, its class name, or a pattern of module
            paths (``*`` stands for anything within one part of the path).
        heads: number of query heads, or the attribute (dotted, from the
            module) that holds it.
        query, key, value: names of the projections, relative to the module
            (dotted; ``..`` in front starts at the parent).
        output: name of the output projection; ``None`` when there is none.
        fused: name of a projection that holds query, key and value rows (or,
            beside ``query``, key and value rows) in one weight.
        layout: row order of ``fused``: ``sectioned`` or ``interleaved``
            (per key-value head).
        key_value_heads: number of key-value heads where it is not ``heads``,
            or the attribute that holds it.
        head_size: width of a head where it is not query rows / ``heads``, or
            the attribute that holds it.
        cross: keys and values read another sequence than the queries.
        rotary: queries and keys are rotated by position.
        normed: queries and keys pass a norm of their own.

    Returns:
        The declaration, for :func:`forget_attention`. Later declarations win
        over earlier ones, and all of them over the built-in table.

    Raises:
        ValueError: when the names name neither three projections nor a fused
            one.
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
    outputs = () if output is None else (output,)
    convention = Convention(query, key, value, fused, layout, outputs)
    declaration = Declaration(
        target, convention, heads, key_value_heads, head_size, cross, rotary, normed
    )
    _DECLARED.append(declaration)
    return declaration


def forget_attention(declaration: Declaration) -> None:
    """Undo one :func:`declare_attention`."""
    _DECLARED.remove(declaration)


def declared(path: str, module: nn.Module) -> Declaration | None:
    """The latest declaration that means this module."""
    for declaration in reversed(_DECLARED):
        if declaration.matches(path, module):
            return declaration
    return None


def rotates(module: nn.Module, cross: bool = False) -> bool:
    """Whether an attention rotates its queries and keys.

    It does when its forward calls something named ``rotary`` or it has a
    child called so, unless it says itself that this layer does not (models
    that leave out the rotation in some layers, or by configuration).

    Args:
        module: the attention.
        cross: its keys are of another sequence.
    """
    children = any("rotary" in name for name, _ in module.named_children())
    if not children and not any("rotary" in name for name in called_names(module)):
        return False
    window = getattr(module, "sliding_window", None)
    called = type(module).__name__
    if cross and called.startswith(("Moonshine", "Idefics")):
        return False
    if called.startswith(("Cohere2", "Flint")):
        return window is not None or bool(getattr(module, "force_rope", False))
    if called.startswith(("Exaone", "Kolibri")):
        return window is None or bool(getattr(module, "is_sliding", True))
    return (
        bool(getattr(module, "use_rope", True))
        and bool(getattr(module, "is_local_attention", True))
        and getattr(module, "rotary_emb", module) is not None
        and getattr(module, "position_embedding_type", "rotary") == "rotary"
        and not getattr(getattr(module, "config", None), "alibi", False)
    )


def called_names(module: nn.Module) -> tuple[str, ...]:
    """Names that a module's forward looks up, read through its decorators."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code is not None else ()
