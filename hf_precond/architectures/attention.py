"""Finds the attentions of a model: which matrices are q, k, v and o, and their heads."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import nn

from hf_precond.architectures import tables
from hf_precond.architectures.attention_block import (
    DECLARED,
    AttentionBlock,
    AttentionDeclaration,
    Convention,
    DownProjection,
    Heads,
    Part,
)
from hf_precond.architectures.modules import (
    class_names,
    has_adapters,
    is_known,
    is_linear,
    is_pointwise,
    is_readable,
    layer_matrix,
    refusal,
)
from hf_precond.architectures.structure import LayerMatrix, LowRankAdapter, RowSelection


def find_attention(model: nn.Module) -> list[AttentionBlock]:
    """The attentions of a model, in model order.

    A module is one when it was declared (:func:`~hf_precond.declare_attention`), when it
    is an ``nn.MultiheadAttention``, or when its class is named an attention,
    its projections bear the names of a known convention, the number of heads
    is stated by the module or its config, and the shapes fit both. A module
    used several times (ALBERT) is listed once.

    Args:
        model: any module, PEFT-wrapped or not.

    Raises:
        ValueError: when a declared module does not have what the declaration names.
    """
    modules, adapted = dict(model.named_modules()), has_adapters(model)
    blocks: list[AttentionBlock] = []
    for path, module in modules.items():
        candidate = _Candidate(modules, path, adapted)
        block = candidate.read()
        if block is None and getattr(module, tables.BORROWS, None) is True:
            block = candidate.borrow(blocks)
        if block is not None:
            blocks.append(block)
    return blocks


def forward_names(module: nn.Module) -> tuple[str, ...]:
    """The names that a module's forward looks up, read through its decorators.

    What a forward calls (a rotation, ``transformers``' attention look-up) is
    stated nowhere else before it runs: a table of classes would have several
    hundred entries and lack those of the next release. The names are those
    of the compiled function; no source is read.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code is not None else ()


@dataclass(frozen=True)
class _Projection:
    """A projection that a convention names: its layer, and the wrapper around it if any."""

    layer: nn.Module
    name: str
    wrapper: nn.Module
    wrapper_name: str

    def matrix(self, role: str = "", rows: RowSelection | None = None) -> LayerMatrix:
        """The matrix of a role: the whole weight, or its rows of a fused one."""
        whole = layer_matrix(self.layer, self.name)
        return whole if rows is None else replace(whole, name=f"{whole.name}[{role}]", rows=rows)


class _Candidate:
    """A module that may be an attention, among the modules of its model.

    Args:
        modules: path to module, for the whole model.
        path: the module's path.
        adapted: whether the model has PEFT's wrappers in it.
    """

    def __init__(self, modules: dict[str, nn.Module], path: str, adapted: bool) -> None:
        self.modules, self.path, self.module = modules, path, modules[path]
        self.adapted = adapted
        self.declaration = DECLARED.of(path, self.module)

    def read(self) -> AttentionBlock | None:
        """The attention, or ``None`` where the module is not one that can be read."""
        if self.declaration is not None:
            block = self._by_convention(self.declaration.convention)
            if block is None:
                raise ValueError(self._misdeclared(self.declaration))
            return block
        if isinstance(self.module, nn.MultiheadAttention):
            return self._multihead(self.module)
        if not is_named_attention(self.module):
            return None
        latent = itertools.starmap(_latent_convention, tables.LATENT_CONVENTIONS)
        known = (Convention(*names) for names in tables.CONVENTIONS)
        readings = map(self._by_convention, itertools.chain(latent, known))
        return next((block for block in readings if block is not None), None)

    def borrow(self, others: Sequence[AttentionBlock]) -> AttentionBlock | None:
        """The attention of an own query projection and another's keys and values.

        Args:
            others: the attentions before it; that which lends is told of it.
        """
        module = self.module
        lenders = [
            other
            for other in others
            if type(other.module) is type(module)
            and other.lender is None
            and getattr(other.module, tables.LENDS, None) is True
            and _kind(other.module) == _kind(module)
        ]
        names = (self._resolve(row[0]) for row in tables.CONVENTIONS)
        query = next((found for found in names if found is not None), None)
        if not lenders or query is None or query.matrix().shape[0] != lenders[-1].q.shape[0]:
            return None
        lender = lenders[-1]
        output = self._output(Convention(), lender.heads)
        matrices = {"q": query.matrix()} | ({} if output is None else {"o": output.matrix()})
        adapters: dict[str, LowRankAdapter] = {}
        for role, projection in (("q", query), ("o", output)) if self.adapted else ():
            if projection is not None:
                _add_adapter(adapters, role, projection, None)
        block = self._block(matrices | {"k": lender.k, "v": lender.v}, lender.heads, adapters)
        block.lender, block.trainable = lender, block.trainable - {"k", "v"}
        lender.borrowers.append(block)
        return block

    def _misdeclared(self, declaration: AttentionDeclaration) -> str:
        children = ", ".join(name for name, _ in self.module.named_children()) or "none"
        return (
            f"declare_attention: {self.path or 'the model'} ({type(self.module).__name__}) does "
            f"not have what was declared for {declaration.target!r}: it needs linear layers under "
            f"the given names and head counts that divide their rows. Its children are {children}."
        )

    def _resolve(self, name: str | None) -> _Projection | None:
        """The readable linear layer under a name that is relative to the module."""
        if name is None:
            return None
        path = self.path
        if name.startswith(".."):
            path, name = path.rpartition(".")[0], name[2:]
        try:  # not by its path, which may be another where a module stands under two names
            wrapper = self.modules[path].get_submodule(name)
        except AttributeError:
            return None
        full = f"{path}.{name}" if path else name
        layer, layer_name = wrapper, full
        if self.adapted:
            from hf_precond.architectures.peft import unwrap

            layer, layer_name = unwrap(wrapper, full)
        if not (is_linear(layer) and is_known(layer)) and not is_pointwise(layer):
            return None
        return _Projection(layer, layer_name, wrapper, full)

    def _by_convention(self, names: Convention) -> AttentionBlock | None:
        """The attention as a convention sees it, or ``None`` where names or shapes do not fit."""
        wanted = {"q": names.query, "k": names.key, "v": names.value, "qkv": names.fused}
        wanted |= {"q_down": names.query_down, "kv_down": names.latent or None}
        resolved = {role: self._resolve(name) for role, name in wanted.items() if name is not None}
        one = bool(getattr(self.module, tables.KEYS_ARE_VALUES, False))
        one = one and resolved.get("v", self) is None
        if one:
            del resolved["v"]
        parts = {role: part for role, part in resolved.items() if part is not None}
        if len(parts) < len(resolved):
            return None
        if names.latent is not None or names.query_down is not None:
            return self._by_latents(names, parts)
        rows = {role: projection.matrix().shape[0] for role, projection in parts.items()}
        gated = "q" in rows and self.declaration is None and _gates_values(self.module)
        if gated:
            rows["q"] //= 2
        layout, order = self._fusion(names)
        heads = self._heads(rows, order.count("z"))
        if heads is None:
            return None
        output = self._output(names, heads)
        if output is None and self.declaration is not None and names.outputs:
            return None
        order = order.replace("q", "") if "q" in parts else order
        selections = _fused_rows(heads, layout, order)
        matrices: dict[str, LayerMatrix] = {}
        adapters: dict[str, LowRankAdapter] = {}
        for role in ("q", "k", "v", "o"):
            projection = output if role == "o" else parts.get(role, parts.get("qkv"))
            if projection is None:
                continue
            selected = None if role in parts else selections.get(role)
            if gated and role == "q":
                selected = RowSelection(heads.query, (0, heads.size), 2 * heads.query * heads.size)
            matrices[role] = projection.matrix(role, selected)
            if self.adapted:
                _add_adapter(adapters, role, projection, selected)
        if one:
            matrices["v"] = matrices["k"]
        block = self._block(matrices, heads, adapters)
        if one:
            block.downs["k"] = DownProjection(matrices["k"], ("k", "v"))
        if names.query and names.key and names.value:
            block.separate_inputs = self._separate_inputs(matrices)
        if self.declaration is None:
            self._add_positions(block)
        return block

    def _add_positions(self, block: AttentionBlock) -> None:
        """Adds the projections of positions, which are added to queries and keys or stand beside.

        Where those of the queries stand beside them, those of the keys do too, and are added to the
        keys as well where others are added to the queries.
        """
        found: dict[str, LayerMatrix] = {}
        for role, names in tables.POSITION_PROJECTIONS.items():
            resolved = (self._resolve(name) for name in names)
            projection = next((part for part in resolved if part is not None), None)
            if projection is not None:
                found[role] = projection.matrix()
                if self.adapted:
                    _add_adapter(block.adapters, role, projection, None)
        size = block.heads.size
        if "k_pos" not in found:
            return
        spans = {"q_pos": (0, size), "k_pos": (0, size)}
        if "q_sine" in found:
            block.heads = replace(block.heads, size=2 * size)
            block.scale = _logit_scale(self.module, 2 * size)
            block.spans |= {"q": (0, size), "k": (0, size)}
            spans = {"q_pos": (0, size), "q_sine": (size, 2 * size)}
            spans["k_pos"] = 0 if "q_pos" in found else size, 2 * size
        for role, matrix in found.items():
            block.parts[role] = Part(matrix, cast(Literal["q", "k"], role[0]), spans[role])
            block.inputs[role] = role if block.cross else "position"
        block.trainable |= {role for role, matrix in found.items() if matrix.trains}

    def _by_latents(
        self, names: Convention, parts: Mapping[str, _Projection]
    ) -> AttentionBlock | None:
        """The attention whose keys and values are images of a latent (multi-head latent attention).

        All sizes follow from the shapes and the number of heads: those of the latent's images, of
        the part of the keys beside it that all heads share, and of a gate beside the queries.
        """
        from hf_precond.architectures.latent import latent_layout

        heads = self._stated_heads()
        outputs = (self._resolve(name) for name in names.outputs)
        output = next((found for found in outputs if found is not None), None)
        shapes = {role: projection.matrix().shape for role, projection in parts.items()}
        groups = 1 if output is None else int(getattr(output.layer, tables.OUTPUT_GROUPS, 1))
        if heads and heads % groups:  # parts of a head in several groups
            output, groups = None, 1
        if output is not None:
            height, width = output.matrix().shape
            shapes["o"] = height, groups * width
        declaration, key_value = self.declaration, heads
        one = names.key is not None and names.key == names.value  # keys that are values too
        if one:
            key_value = 1
        if declaration is not None and declaration.key_value_heads is not None:
            key_value = self._declared_number(declaration.key_value_heads)
        if not heads or not key_value or heads % key_value:
            return None
        elsewhere = names.latent == ""
        shared = self._stated(tables.SHARED_KEY_SIZES) or 0 if elsewhere else 0
        layout = latent_layout((heads, key_value), shapes, shared, names.layout)
        if layout is None or (output is None and declaration is not None and names.outputs):
            return None
        projections = dict(parts) | {"o": output}
        matrices: dict[str, LayerMatrix] = {}
        adapters: dict[str, LowRankAdapter] = {}
        for role, (source, rows) in layout.rows.items():
            projection = projections[source]
            if projection is not None:
                matrices[role] = projection.matrix(role, rows)
                if self.adapted:
                    _add_adapter(adapters, role, projection, rows)
        if one:
            matrices["v"] = matrices["k"]
        block = self._block(matrices, layout.heads, adapters)
        block.output_groups = groups
        layout.complete(block, matrices, of_latent=names.latent is not None)
        return block

    def _stated_heads(self) -> int | None:
        if self.declaration is not None:
            return self._declared_number(self.declaration.heads)
        single = _is_one_of(self.module, tables.SINGLE_HEADS)
        return 1 if single else self._stated(tables.HEAD_COUNTS)

    def _fusion(self, names: Convention) -> tuple[str | int, str]:
        """How the rows of a fused weight fall into groups, and their order in a group."""
        if self.declaration is None:
            for name in class_names(self.module) & tables.FUSED_ROWS.keys():
                return tables.FUSED_ROWS[name]
        return names.layout, "qkv"

    def _heads(self, rows: Mapping[str, int], gates: int = 0) -> Heads | None:
        """The heads that fit the rows of the projections, or ``None``.

        Args:
            rows: of each projection.
            gates: how many gates of the values the fused one holds.
        """
        declaration, query = self.declaration, self._stated_heads()
        if declaration is None:
            key_value_stated = self._stated(tables.KEY_VALUE_HEAD_COUNTS)
            size = self._stated(tables.HEAD_SIZES)
        else:
            key_value_stated = self._declared_number(declaration.key_value_heads)
            size = self._declared_number(declaration.head_size)
        if query is None:
            return None
        if "q" in rows:
            # A size that the config alone states may be that of another part of the model.
            own = any(hasattr(self.module, name) for name in tables.HEAD_SIZES)
            strict = declaration is not None or own
            if size is None or (query * size != rows["q"] and not strict):
                size = rows["q"] // query
            if query * size != rows["q"]:
                return None
        if "k" in rows and size:
            key_value, rest = divmod(rows["k"], size)
        elif "qkv" in rows:
            key_value = key_value_stated or query
            parts = 2 * key_value + (0 if "q" in rows else query)
            held = (getattr(self.module, name, None) for name in tables.VALUE_ROWS)
            values = next((number for number in held if isinstance(number, int)), 0)
            wide = (parts - key_value) * (size or 0) + values * (1 + gates) == rows["qkv"]
            if values and wide and declaration is None and values % key_value == 0:
                return Heads(query, key_value, size or 0, values // key_value)
            if size is None or parts * size != rows["qkv"]:
                size = rows["qkv"] // parts
            rest = rows["qkv"] - parts * size
        else:
            return None
        if rest or key_value == 0 or query % key_value or rows.get("v", key_value) % key_value:
            return None
        if declaration is not None and key_value_stated not in (None, key_value):
            return None
        return Heads(query, key_value, size, rows["v"] // key_value if "v" in rows else size)

    def _stated(self, names: Collection[str]) -> int | None:
        """A count that the module or its config states under one of some names."""
        for holder in (self.module, getattr(self.module, "config", None)):
            for name in names:
                try:
                    value = operator.attrgetter(name)(holder)
                except Exception:  # none, or a config's own property, which may raise anything
                    continue
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def _declared_number(self, stated: int | str | None) -> int | None:
        """A count that was declared, as a number or as the attribute that holds it."""
        if not isinstance(stated, str):
            return stated
        value: Any = self.module
        for part in stated.split("."):
            value = getattr(value, part, None)
        return value if isinstance(value, int) else None

    def _output(self, names: Convention, heads: Heads) -> _Projection | None:
        """The first named layer whose inputs are the heads' values side by side."""
        width = heads.query * heads.value_size
        width *= 2 if _is_one_of(self.module, tables.WIDER_OUTPUTS) else 1
        for name in names.outputs:
            projection = self._resolve(name)
            if projection is not None and projection.matrix().shape[1] == width:
                return projection
        return None

    def _separate_inputs(self, matrices: Mapping[str, LayerMatrix]) -> frozenset[str]:
        """Which of k and v read a tensor of their own: by declaration, class and widths."""
        separate = set(self.declaration.separate_inputs if self.declaration else ())
        for roles, classes in tables.SEPARATE_INPUTS.items():
            separate |= set(roles) if _is_one_of(self.module, classes) else set()
        for role, other in (("k", "q"), ("v", "k")):
            if matrices[role].shape[1] != matrices[other].shape[1]:
                separate.add(role)
        return frozenset(separate)

    def _block(
        self,
        matrices: Mapping[str, LayerMatrix],
        heads: Heads,
        adapters: dict[str, LowRankAdapter],
    ) -> AttentionBlock:
        module, declaration = self.module, self.declaration
        cross = bool(tables.CROSS.search(self._names_around()))
        rotary = rotates(module, cross)
        normed = any(
            not isinstance(getattr(module, name, None), nn.Identity | type(None))
            for name in tables.QUERY_NORMS
        )
        observed = "get_interface" in forward_names(module)
        return AttentionBlock(
            name=self.path,
            module=module,
            q=matrices["q"],
            k=matrices["k"],
            v=matrices["v"],
            o=matrices.get("o"),
            heads=heads,
            trainable=frozenset(role for role, matrix in matrices.items() if matrix.trains),
            rotary=declaration.rotary if declaration else rotary,
            normed=declaration.normed if declaration else normed,
            cross=declaration.cross if declaration else cross,
            scale=_logit_scale(module, heads.size),
            note=_note(module, (rotary or normed) and not observed),
            observed=observed,
            adapters=adapters,
            paired_values=_is_one_of(module, tables.PAIRED_VALUES),
        )

    def _names_around(self) -> str:
        """The names that say what the attention is: its own, its class's, and those around it."""
        parts = self.path.split(".")
        while len(parts) > 1 and parts[-1] in tables.GENERIC_NAMES:
            parts.pop()
        parent = type(self.modules.get(self.path.rpartition(".")[0])).__name__
        kind = parent if "crossatt" in parent.lower() else ""
        return " ".join([*self.path.split(".")[-2:], parts[-1], type(self.module).__name__, kind])

    def _multihead(self, module: nn.MultiheadAttention) -> AttentionBlock | None:
        """``nn.MultiheadAttention``: q, k and v in ``in_proj_weight`` or in three weights."""
        if not isinstance(module.out_proj, nn.Linear) or not is_readable(module.out_proj):
            return None
        width = module.embed_dim
        size = width // module.num_heads
        fused = module.kdim == module.vdim == width
        matrices: dict[str, LayerMatrix] = {}
        for index, role in enumerate("qkv"):
            attribute = "in_proj_weight" if fused else f"{role}_proj_weight"
            weight, bias = module._parameters.get(attribute), module._parameters.get("in_proj_bias")
            if weight is not None and refusal(weight):
                return None
            matrix = matrices[role] = layer_matrix(module, self.path, weight=attribute)
            if fused:
                joined = bias is not None and (bias.requires_grad or not matrix.trains)
                matrix.name += f"[{role}]"
                matrix.bias = "in_proj_bias" if joined else None
                matrix.rows = RowSelection(1, (index * width, (index + 1) * width), 3 * width)
        matrices["o"] = layer_matrix(module.out_proj, f"{self.path}.out_proj".lstrip("."))
        block = self._block(matrices, Heads(module.num_heads, module.num_heads, size, size), {})
        # It is called with three tensors; of torch's own layers alone it is known which are one.
        layer = self.modules.get(self.path.rpartition(".")[0])
        own = isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        block.cross = not (own and self.path.endswith("self_attn"))
        block.separate_inputs = frozenset() if own else frozenset({"v"})
        return block


def _latent_convention(
    query: str, down: str | None, together: str, latent: str | None
) -> Convention:
    """A row of the table of latent attentions."""
    if latent is None:
        outputs = (tables.GROUPED_OUTPUT,)
        return Convention(query, together, together, outputs=outputs, query_down=down)
    return Convention(query, None, None, together, "interleaved", query_down=down, latent=latent)


def is_named_attention(module: nn.Module) -> bool:
    """Whether the name of a module's class, or of a base of it, says that it is an attention."""
    names = [cls.__name__ for cls in type(module).__mro__ if cls not in nn.Module.__mro__]
    if not set(names).isdisjoint(tables.UNREADABLE):
        return False
    return any(map(tables.ATTENTION.search, names)) and not any(
        map(tables.NO_ATTENTION.search, names)
    )


def _is_one_of(module: nn.Module, classes: Iterable[str]) -> bool:
    return not class_names(module).isdisjoint(classes)


def _kind(module: nn.Module) -> Any:
    """Among attentions that share keys and values, which of them share."""
    return getattr(module, tables.LENDING_KIND, None)


def _gates_values(module: nn.Module) -> bool:
    """Whether an attention's query projection holds, a head, its rows and then those of a gate.

    The gate multiplies what the head gives to the output projection.
    """
    return _is_one_of(module, tables.GATED)


def _fused_rows(heads: Heads, layout: str | int, order: str) -> dict[str, RowSelection]:
    """The rows of q, k and v in a fused weight.

    Args:
        heads: the heads.
        layout: ``sectioned``, ``interleaved``, or in how many groups.
        order: what comes after what in a group, ``z`` a gate as wide as the values.
    """
    named = {"sectioned": 1, "interleaved": heads.key_value}
    groups = named[layout] if isinstance(layout, str) else layout
    values = heads.key_value * heads.value_size
    widths = {"q": heads.query * heads.size, "k": heads.key_value * heads.size}
    ends = itertools.accumulate((widths.get(r, values) // groups for r in order), initial=0)
    spans = list(itertools.pairwise(ends))
    selections = (RowSelection(groups, span, groups * spans[-1][1]) for span in spans)
    return dict(zip(order, selections, strict=True))


def _add_adapter(
    adapters: dict[str, LowRankAdapter],
    role: str,
    projection: _Projection,
    rows: RowSelection | None,
) -> None:
    from hf_precond.architectures.peft import find_adapter

    adapter = find_adapter(projection.wrapper, projection.wrapper_name, rows)
    if adapter is None:
        return
    known = [pair for first in adapters.values() for pair in (first, *first.beside)]
    for pair in (adapter, *adapter.beside):
        for other in known:
            if other.down.module is pair.down.module:
                pair.down = other.down
        if rows is not None:
            pair.up.name += f"[{role}]"
    adapters[role] = adapter


def rotates(module: nn.Module, cross: bool = False) -> bool:
    """Whether an attention rotates its queries and keys.

    It does when its forward calls something named ``rotary`` or it has a
    child named so, unless it is known, or states itself, that this layer does
    not (models that leave out the rotation in some layers, or by
    configuration).

    Args:
        module: the attention.
        cross: its keys are of another sequence.
    """
    names = [*dict(module.named_children()), *forward_names(module)]
    if not any(tables.ROTARY in name for name in names) or _is_one_of(
        module, tables.ROTATED_INPUTS
    ):
        return False
    window = getattr(module, "sliding_window", None)
    family = type(module).__name__
    if cross and family.startswith(tables.UNROTATED_ACROSS):
        return False
    if family.startswith(tables.ROTATED_IN_WINDOWS):
        return window is not None or bool(getattr(module, "force_rope", False))
    if family.startswith(tables.UNROTATED_BESIDE_WINDOWS):
        return window is None or bool(getattr(module, "is_sliding", True))
    return (
        all(bool(getattr(module, flag, True)) for flag in tables.ROTATION_FLAGS)
        and getattr(module, "rotary_emb", module) is not None
        and getattr(module, "position_embedding_type", tables.ROTARY) == tables.ROTARY
        and not getattr(getattr(module, "config", None), "alibi", False)
    )


def _logit_scale(module: nn.Module, size: int) -> float | None:
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
    if _is_one_of(module, tables.UNSCALED):
        return 1.0
    if _is_one_of(module, tables.OWN_SCALE):
        return float(cast(float, module.scale))
    if hasattr(module, tables.DISENTANGLED):  # each term of DeBERTa's sum counts
        positions: Any = module.pos_att_type
        terms = 1 + sum(term in positions for term in ("c2p", "p2c"))
        return (size * terms) ** -0.5
    return None


def _note(module: nn.Module, unseen: bool) -> str:
    """What the routing table should say of an attention.

    Args:
        module: the attention.
        unseen: whether its queries and keys are rotated or normed where nothing can see them.
    """
    if unseen:
        return "its queries and keys cannot be seen rotated or normed: factors of the plain ones"
    if _gates_values(module) or any(hasattr(module, name) for name in tables.OUTPUT_GATES):
        return "the gate between values and output is not in the metric"
    if hasattr(module, tables.SHORT_CONVOLUTION):
        return "the convolution behind its projections is not in the metric"
    if hasattr(module, tables.DISENTANGLED):
        return "content term only: the position terms of its logits are not in the metric"
    return ""
