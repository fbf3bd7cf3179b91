"""Finds the attentions of a model: which matrices are q, k, v and o, and their heads."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from hf_precond.architectures.callers import called_apart
from hf_precond.architectures.modules import is_linear, is_readable, layer_matrix, refusal
from hf_precond.architectures.peft import find_adapter, trains, unwrap
from hf_precond.architectures.structure import (
    Adapter,
    AttentionBlock,
    Heads,
    LayerMatrix,
    RowSelection,
)
from hf_precond.architectures.tables import (
    CONVENTIONS,
    UNREADABLE,
    Convention,
    Declaration,
    called_names,
    declare_attention,
    declared,
    forget_attention,
    gates_values,
    logit_scale,
    rotates,
)

__all__ = ["declare_attention", "find_attention", "forget_attention"]

HOW_TO_DECLARE = (
    "name its projections with hf_precond.declare_attention('ClassName', query='…', key='…', "
    "value='…', output='…', heads='attribute or number') before the optimizer is created"
)

_HEAD_COUNTS = (
    "num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead", "num_attn_heads"
)
_KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_heads_kv")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_CROSS = re.compile(r"cross|enc_?dec|encoder_(decoder_)?att|multihead_attn", re.IGNORECASE)
_GENERIC = ("self", "attention", "attn", "att")
_QUERY_NORMS = ("q_norm", "q_layernorm", "query_norm", "q_ln", "qk_norm", "query_layernorm")


@dataclass(frozen=True)
class _Projection:
    """A projection that a convention names: its layer, and the wrapper around it if any."""

    layer: nn.Module
    name: str
    wrapper: nn.Module
    wrapper_name: str

    @property
    def rows(self) -> int:
        return layer_matrix(self.layer, self.name).shape[0]


def find_attention(model: nn.Module) -> list[AttentionBlock]:
    """The attentions of a model, in model order.

    A module is one when it was declared (:func:`declare_attention`), when it
    is an ``nn.MultiheadAttention``, or when its class is called an attention,
    its projections bear the names of a known convention, the number of heads
    is stated by the module or its config, and the shapes fit both. A module
    used several times (ALBERT) is found once.

    Args:
        model: any module, PEFT-wrapped or not.

    Raises:
        ValueError: when a declared module has not what the declaration names.
    """
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        declaration = declared(path, module)
        if declaration is not None:
            block = _read(modules, path, module, declaration.convention, declaration)
            if block is None:
                raise ValueError(_misdeclared(path, module, declaration))
        elif isinstance(module, nn.MultiheadAttention):
            block = _multihead(modules, path, module)
        elif _is_called_attention(module):
            readings = (_read(modules, path, module, names, None) for names in CONVENTIONS)
            block = next((reading for reading in readings if reading is not None), None)
        else:
            block = None
        if block is not None:
            found.append(block)
    return found


def _is_called_attention(module: nn.Module) -> bool:
    names = [cls.__name__ for cls in type(module).__mro__ if cls not in nn.Module.__mro__]
    if UNREADABLE.intersection(names):
        return False
    name = " ".join(names).lower()
    attention = "attention" in name or "attn" in name
    return attention and not re.search(r"mlp|feed_?forward|ffn|glu", name)


def _misdeclared(path: str, module: nn.Module, declaration: Declaration) -> str:
    children = ", ".join(name for name, _ in module.named_children()) or "none"
    return (
        f"declare_attention: {path or 'the model'} ({type(module).__name__}) does not have what "
        f"was declared for {declaration.target!r}: it needs linear layers under the given names "
        f"and head counts that divide their rows. Its children are {children}."
    )


def _resolve(
    modules: dict[str, nn.Module], path: str, name: str
) -> _Projection | None:
    """The readable linear layer under ``name``, seen from the module at ``path``."""
    if name.startswith(".."):
        path, name = path.rpartition(".")[0], name[2:]
    full = f"{path}.{name}" if path else name
    wrapper = modules.get(full)
    if wrapper is None:
        return None
    layer, layer_name = unwrap(wrapper, full)
    if not is_linear(layer) or not is_readable(layer):
        return None
    return _Projection(layer, layer_name, wrapper, full)


def _number(module: nn.Module, stated: int | str | None, names: tuple[str, ...]) -> int | None:
    """A count that was declared, or that the module or its config states."""
    if isinstance(stated, int):
        return stated
    if isinstance(stated, str):
        value: Any = module
        for part in stated.split("."):
            value = getattr(value, part, None)
        return value if isinstance(value, int) else None
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            try:
                value = getattr(holder, name, None)
            except Exception:  # a config's own property, which may raise anything
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _count_heads(
    module: nn.Module,
    declaration: Declaration | None,
    query_rows: int | None,
    key_rows: int | None,
    fused_rows: int | None,
) -> tuple[int, int, int] | None:
    """``(query heads, key-value heads, head size)`` that fit the shapes, or ``None``."""
    told = declaration
    query = _number(module, told.heads if told else None, _HEAD_COUNTS)
    if query is None:
        return None
    grouped = _number(module, told.key_value_heads, ()) if told else None
    if told is None:
        grouped = _number(module, None, _KEY_VALUE_COUNTS)
        size = _number(module, None, _HEAD_SIZES)
    else:
        size = _number(module, told.head_size, ())
    if query_rows is not None:
        strict = told is not None or any(hasattr(module, name) for name in _HEAD_SIZES)
        if size is None or (query * size != query_rows and not strict):
            size = query_rows // query
        if query * size != query_rows:
            return None
    if key_rows is not None and size:
        key_value = key_rows // size
        fits = key_value * size == key_rows
    elif fused_rows is not None:
        key_value = grouped or query
        shared = 2 * key_value + (query if query_rows is None else 0)
        size = size if size is not None and shared * size == fused_rows else fused_rows // shared
        fits = shared * size == fused_rows
    else:
        return None
    if not fits or key_value == 0 or query % key_value:
        return None
    if told is not None and grouped is not None and key_value != grouped:
        return None
    return query, key_value, size


def _read(
    modules: dict[str, nn.Module],
    path: str,
    module: nn.Module,
    names: Convention,
    declaration: Declaration | None,
) -> AttentionBlock | None:
    """The attention as a convention sees it, or ``None`` where names or shapes do not fit."""
    named = {
        role: _resolve(modules, path, name)
        for role, name in (
            ("q", names.query), ("k", names.key), ("v", names.value), ("qkv", names.fused)
        )
        if name is not None
    }
    if any(projection is None for projection in named.values()):
        return None
    parts = {role: projection for role, projection in named.items() if projection is not None}
    rows = {role: projection.rows for role, projection in parts.items()}
    gated = "q" in rows and declaration is None and gates_values(module)
    if gated:
        rows["q"] //= 2
    counts = _count_heads(module, declaration, rows.get("q"), rows.get("k"), rows.get("qkv"))
    if counts is None:
        return None
    query, key_value, size = counts
    if rows.get("v", key_value) % key_value:
        return None
    value_size = rows["v"] // key_value if "v" in rows else size
    heads = Heads(query, key_value, size, value_size)
    output = _find_output(modules, path, names, heads)
    if output is None and declaration is not None and names.outputs:
        return None
    selections = _select_rows(heads, names.layout, separate_query="q" in parts)
    matrices: dict[str, LayerMatrix] = {}
    adapters: dict[str, Adapter] = {}
    for role in ("q", "k", "v"):
        projection, selected = (
            (parts[role], None) if role in parts else (parts["qkv"], selections[role])
        )
        if gated and role == "q":
            selected = RowSelection(query, (0, size), 2 * query * size)
        matrices[role] = _matrix(projection, role, selected)
        _add_adapter(adapters, role, projection, selected)
    if output is not None:
        matrices["o"] = _matrix(output, "o", None)
        _add_adapter(adapters, "o", output, None)
    block = _finish(modules, path, module, matrices, adapters, heads, declaration)
    if names.query and names.key and names.value:
        block.apart = called_apart(module, names.query, names.key, names.value)
        widths = {role: matrix.shape[1] for role, matrix in matrices.items()}
        block.apart |= {"k"} if widths["k"] != widths["q"] else set()
        block.apart |= {"v"} if widths["v"] != widths["k"] else set()
    return block


def _matrix(projection: _Projection, role: str, rows: RowSelection | None) -> LayerMatrix:
    matrix = layer_matrix(projection.layer, projection.name)
    return matrix if rows is None else replace(matrix, name=f"{matrix.name}[{role}]", rows=rows)


def _add_adapter(
    adapters: dict[str, Adapter], role: str, projection: _Projection, rows: RowSelection | None
) -> None:
    adapter = find_adapter(projection.wrapper, projection.wrapper_name, rows)
    if adapter is None:
        return
    for other in adapters.values():
        if other.down.module is adapter.down.module:
            adapter.down = other.down
    if rows is not None:
        adapter.up.name += f"[{role}]"
    adapters[role] = adapter


def _select_rows(
    heads: Heads, layout: str, *, separate_query: bool
) -> dict[str, RowSelection]:
    """The rows of q, k and v in a fused weight."""
    groups = heads.key_value if layout == "interleaved" else 1
    keys = heads.key_value * heads.size // groups
    queries = 0 if separate_query else heads.query * heads.size // groups
    total = groups * (queries + 2 * keys)
    starts = {"q": (0, queries), "k": (queries, queries + keys)}
    starts["v"] = (queries + keys, queries + 2 * keys)
    return {role: RowSelection(groups, span, total) for role, span in starts.items()}


def _find_output(
    modules: dict[str, nn.Module], path: str, names: Convention, heads: Heads
) -> _Projection | None:
    """The first named layer whose inputs are the heads' values side by side."""
    for name in names.outputs:
        projection = _resolve(modules, path, name)
        if projection is not None:
            matrix = layer_matrix(projection.layer, projection.name)
            if matrix.shape[1] == heads.query * heads.value_size:
                return projection
    return None


def _names_around(modules: dict[str, nn.Module], path: str) -> str:
    """The names by which an attention goes: its own, its class's, and those close around it."""
    parts = path.split(".")
    while len(parts) > 1 and parts[-1] in _GENERIC:
        parts.pop()
    parent = type(modules.get(path.rpartition(".")[0])).__name__
    kind = parent if "crossatt" in parent.lower() else ""
    return " ".join([*path.split(".")[-2:], parts[-1], type(modules[path]).__name__, kind])


def _finish(
    modules: dict[str, nn.Module],
    path: str,
    module: nn.Module,
    matrices: dict[str, LayerMatrix],
    adapters: dict[str, Adapter],
    heads: Heads,
    declaration: Declaration | None,
) -> AttentionBlock:
    crosses = bool(_CROSS.search(_names_around(modules, path)))
    rotary = rotates(module, crosses)
    normed = any(
        not isinstance(getattr(module, name, None), nn.Identity | type(None))
        for name in _QUERY_NORMS
    )
    note = ""
    if "disentangled_attention_bias" in dir(module):
        note = "content term only: the position terms of its logits are not in the metric"
    observed = "get_interface" in called_names(module)
    if gates_values(module):
        note = "the gate between values and output is not in the metric"
    if (rotary or normed) and not observed:
        note = "its queries and keys cannot be seen rotated or normed: factors of the plain ones"
    return AttentionBlock(
        name=path,
        module=module,
        q=matrices["q"],
        k=matrices["k"],
        v=matrices["v"],
        o=matrices.get("o"),
        heads=heads,
        trainable=frozenset(role for role, matrix in matrices.items() if trains(matrix)),
        rotary=declaration.rotary if declaration else rotary,
        normed=declaration.normed if declaration else normed,
        cross=declaration.cross if declaration else crosses,
        scale=logit_scale(module, heads.size),
        note=note,
        observed=observed,
        adapters=adapters,
    )


def _multihead(
    modules: dict[str, nn.Module], path: str, module: nn.MultiheadAttention
) -> AttentionBlock | None:
    """``nn.MultiheadAttention``: q, k and v in ``in_proj_weight`` or in three weights."""
    if not isinstance(module.out_proj, nn.Linear) or not is_readable(module.out_proj):
        return None
    width = module.embed_dim
    size = width // module.num_heads
    matrices: dict[str, LayerMatrix] = {}
    for index, role in enumerate("qkv"):
        fused = module.in_proj_weight is not None
        attribute = "in_proj_weight" if fused else f"{role}_proj_weight"
        if refusal(getattr(module, attribute)):
            return None
        matrix = layer_matrix(module, path, weight=attribute)
        span = (index * width, (index + 1) * width)
        rows = RowSelection(1, span, 3 * width) if fused else None
        matrices[role] = replace(
            matrix,
            name=f"{matrix.name}[{role}]" if fused else matrix.name,
            bias=_multihead_bias(module, getattr(module, attribute)) if fused else None,
            rows=rows,
        )
    matrices["o"] = layer_matrix(module.out_proj, f"{path}.out_proj".lstrip("."))
    heads = Heads(module.num_heads, module.num_heads, size, size)
    block = _finish(modules, path, module, matrices, {}, heads, None)
    # Called with three tensors; only torch's own layers say which are the same.
    layer = modules.get(path.rpartition(".")[0])
    own = isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    block.cross = not (own and path.endswith("self_attn"))
    block.apart = frozenset() if own else frozenset({"v"})
    return block


def _multihead_bias(module: nn.MultiheadAttention, weight: Tensor) -> str | None:
    bias = module.in_proj_bias
    read = bias is not None and (bias.requires_grad or not weight.requires_grad)
    return "in_proj_bias" if read else None
