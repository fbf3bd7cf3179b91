"""Multi-head latent attention: which rows of its projections are what.

For a head h, with ``c = norm(W_c x)`` the latent of keys and values and ``u = norm(W_u x)`` that of
the queries (or ``u = x``)::

    q_h = W_q,h u          k_h = (W_k,h c, R W_r x)          v_h = W_v,h c

W_r makes the part of the keys that all heads share, which alone is rotated. W_c and W_r are rows of
one weight; so are W_k,h and W_v,h. In DeepSeek V4 one head of keys, rotated as a whole, is the
values too: ``k = v = R c``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hf_precond.architectures.attention_block import (
    AttentionBlock,
    DownProjection,
    Fusion,
    Heads,
    Part,
)
from hf_precond.architectures.modules import is_norm
from hf_precond.architectures.structure import LayerMatrix, RowSelection

Source = tuple[str, RowSelection | None]
"""A projection, and the rows of it that are a matrix."""


@dataclass
class LatentLayout:
    """Sizes and rows.

    Args:
        heads: the heads, as the kernel sees them.
        plain: width of a head's keys that the latent makes.
        rows: role to projection and rows.
        latent_queries: the queries are made of a latent.
    """

    heads: Heads
    plain: int
    rows: dict[str, Source]
    latent_queries: bool

    def complete(
        self, block: AttentionBlock, matrices: Mapping[str, LayerMatrix], of_latent: bool
    ) -> None:
        """Adds to an attention with q, k, v and o the other matrices, and what reads what.

        Args:
            block: the attention; changed in place.
            matrices: of all roles.
            of_latent: keys and values are made of one.
        """
        block.plain = self.plain if block.rotary and self.plain < self.heads.size else 0
        block.spans["k"] = (0, self.plain)
        block.inputs["q"] = "query_latent" if self.latent_queries else "x"
        if of_latent:
            block.inputs |= {"k": "latent", "v": "latent"}
        images = {"q_down": ("q",), "kv_down": ("k", "v")}
        if block.v is block.k:
            images["k"] = ("k", "v")
        for role, matrix in matrices.items():
            if role == "k_rot":
                block.parts[role] = Part(matrix, "k", (self.plain, self.heads.size), shared=True)
            elif role in images:
                norm = _norm_behind(block.module, matrix.module, matrix.shape[0])
                block.downs[role] = DownProjection(matrix, images[role], norm)
            if role in ("k_rot", *images):
                block.inputs[role] = "x"


def latent_layout(
    heads: tuple[int, int], shapes: Mapping[str, tuple[int, int]], shared: int, fusion: Fusion
) -> LatentLayout | None:
    """The layout that shapes allow; ``None`` where there is none.

    Args:
        heads: number of query and of key-value heads.
        shapes: ``[out, in]`` of ``q``, of ``qkv`` (keys and values together) or ``k`` and ``v``,
            and of ``q_down``, ``kv_down`` and ``o`` where there are such.
        shared: width of the keys' shared part, where another layer makes the latent.
        fusion: order of the rows of ``qkv``: all keys first, or per head its keys and values.
    """
    count, groups = heads
    images = "qkv" if "qkv" in shapes else "k"
    key_rows, rank = shapes[images]
    if "kv_down" in shapes:
        shared = shapes["kv_down"][0] - rank
    query, rest = divmod(shapes["q"][0], count)
    plain, more = divmod(key_rows, groups)
    if rest or more or shared < 0:
        return None
    together = plain
    if "v" in shapes:
        value = shapes["v"][0] // groups
    elif "o" in shapes:
        value = shapes["o"][1] // count
        plain -= value
    else:
        plain, value = query - shared, plain - query + shared
    size = plain + shared
    if plain <= 0 or value <= 0 or ("o" in shapes and shapes["o"][1] != count * value):
        return None
    if query not in (size, size + value):  # a gate of the values beside the queries
        return None
    rows: dict[str, Source] = {"q": ("q", None)}
    if query > size:
        rows["q"] = "q", RowSelection(count, (0, size), count * query)
    if "v" in shapes:
        rows |= {"k": ("k", None), "v": ("v", None)}
    else:
        parts, scale = (groups, 1) if fusion == "interleaved" else (1, groups)
        ends = (0, scale * plain, scale * together)
        rows["k"] = images, RowSelection(parts, ends[:2], key_rows)
        rows["v"] = images, RowSelection(parts, ends[1:], key_rows)
    rows["o"] = "o", None
    if "q_down" in shapes and shapes["q_down"][0] == shapes["q"][1]:
        rows["q_down"] = "q_down", None
    if "kv_down" in shapes:
        total = rank + shared
        rows["kv_down"] = "kv_down", RowSelection(1, (0, rank), total) if shared else None
        if shared:
            rows["k_rot"] = "kv_down", RowSelection(1, (rank, total), total)
    return LatentLayout(Heads(count, groups, size, value), plain, rows, "q_down" in shapes)


def _norm_behind(module: nn.Module, layer: nn.Module, width: int) -> nn.Module | None:
    """The norm of a latent: the first of its width that stands behind the layer that makes it."""
    children = list(module.children())
    behind = children[children.index(layer) + 1 :] if layer in children else []
    norms = (child for child in behind if is_norm(child))
    return next((norm for norm in norms if next(norm.parameters()).numel() == width), None)
