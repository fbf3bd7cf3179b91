"""An attention as plain values, what its projections are called, and what users declare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from hf_precond.architectures.declarations import Declaration, Declarations
from hf_precond.architectures.structure import LayerMatrix, LowRankAdapter
from hf_precond.architectures.tables import OUTPUTS
from hf_precond.distributed.collectives import full

Fusion = Literal["sectioned", "interleaved"]


@dataclass(frozen=True)
class Heads:
    """The heads of an attention.

    Args:
        query: number of query heads H.
        key_value: number of key-value heads, a divisor of H.
        size: width d_h of a query or key head.
        value_size: width of a value head (``size`` in most models).
    """

    query: int
    key_value: int
    size: int
    value_size: int

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.query // self.key_value


@dataclass(eq=False)
class Part:
    """A matrix that makes some columns of the queries, or keys, beside the main one.

    Args:
        matrix: the matrix.
        of: ``"q"`` or ``"k"``: what it makes a part of.
        span: the columns of a head that it makes, first and last (exclusive); where there are more
            than it has rows, these stand there several times.
        shared: its rows are one head, which all heads share.
    """

    matrix: LayerMatrix
    of: Literal["q", "k"]
    span: tuple[int, int]
    shared: bool = False


@dataclass(eq=False)
class DownProjection:
    """A matrix that makes the latent which other matrices of an attention read.

    Args:
        matrix: the matrix, ``[rank, in]``.
        images: the roles that read the latent.
        norm: the norm between, if any.
    """

    matrix: LayerMatrix
    images: tuple[str, ...]
    norm: nn.Module | None = None

    def scale(self) -> Tensor | None:
        """The scale of the norm, ``[rank]``; ``None`` where there is none."""
        weight = getattr(self.norm, "weight", None)
        return full(weight.detach()) if isinstance(weight, Tensor) else None


@dataclass(eq=False)
class AttentionBlock:
    """One attention module.

    A matrix that is frozen is still listed (its siblings' factors need its
    weight); ``trainable`` names those that are stepped.

    Args:
        name: module path of the attention.
        module: the attention module: the one that ``transformers``' attention
            functions receive as their first argument.
        q, k, v, o: the matrices; ``o`` is ``None`` where the model has none,
            ``v`` is ``k`` where the keys are the values too.
        heads: head counts and widths.
        trainable: the roles (``"q"``, ``"k"``, ``"v"``, ``"o"``) that train.
        rotary: queries and keys are rotated by position (RoPE).
        normed: queries and keys pass a norm of their own (QK-norm).
        cross: keys and values may read another sequence than the queries.
        separate_inputs: ``"k"`` where k's layer is called with another tensor
            than q's, ``"v"`` where v's is with another than k's; ``cross``
            implies the former.
        observed: ``query`` and ``key`` moments can be asked for: the module
            calls ``transformers``' attention look-up.
        adapters: role to its LoRA pair, where it has one that trains; :meth:`pairs` names those
            of all adapters.
        parts: role to a further matrix of queries or keys (``"k_rot"``).
        downs: role to a down-projection (``"q_down"``, ``"kv_down"``).
        spans: of ``q`` and ``k``, the columns of a head that they make where
            these are not all.
        inputs: role to the tensor that it reads, where :meth:`reads` has
            another than it would follow from the fields above.
        plain: so many columns in front of each query and key that are not
            rotated and that the function which rotates does not get.
        lender: the attention whose keys and values it uses: it has no
            projections of its own for these.
        borrowers: the attentions that use its keys and values beside it.
        scale: what its logits are multiplied with; ``None``: ``1/√d_h``.
        note: what the routing table should say of this block (an
            approximation, say), or the empty string.
    """

    name: str
    module: nn.Module
    q: LayerMatrix
    k: LayerMatrix
    v: LayerMatrix
    o: LayerMatrix | None
    heads: Heads
    trainable: frozenset[str]
    rotary: bool = False
    normed: bool = False
    cross: bool = False
    separate_inputs: frozenset[str] = frozenset()
    scale: float | None = None
    note: str = ""
    observed: bool = False
    adapters: dict[str, LowRankAdapter] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    downs: dict[str, DownProjection] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    plain: int = 0
    paired_values: bool = False
    output_groups: int = 1
    lender: AttentionBlock | None = None
    borrowers: list[AttentionBlock] = field(default_factory=list)

    def roles(self) -> dict[str, LayerMatrix]:
        """Role to matrix, for the roles this attention has."""
        roles = {"q": self.q}
        if self.lender is None:
            roles["k"] = self.k
            if self.v is not self.k:
                roles["v"] = self.v
        if self.o is not None:
            roles["o"] = self.o
        return roles | {role: more.matrix for role, more in (self.parts | self.downs).items()}

    def serves(self, role: str) -> str:
        """Which of q, k, v and o a role's matrix makes: one letter, several for a latent's."""
        if role in self.downs:
            return "".join(self.downs[role].images)
        return self.parts[role].of if role in self.parts else role

    def meeting(self, role: str) -> list[AttentionBlock]:
        """The attentions whose queries meet its keys (``q``), or whose keys its queries (``k``)."""
        return [self, *self.borrowers] if role == "q" else [self.lender or self]

    def makers(self, role: str) -> list[str]:
        """The roles whose matrices make the queries (``q``) or keys (``k``)."""
        return [role, *(name for name, part in self.parts.items() if part.of == role)]

    def span(self, role: str) -> tuple[int, int]:
        """The columns of a head that a matrix of queries or keys makes."""
        part = self.parts.get(role)
        return self.spans.get(role, (0, self.heads.size)) if part is None else part.span

    def heads_of(self, role: str) -> int:
        """Heads that the rows of a role's matrix fall into: 1 for those that all heads share."""
        part = self.parts.get(role)
        down = role in self.downs and role != "k"
        if role == "o" or down or (part is not None and part.shared):
            return 1
        return self.heads.query if self.serves(role) == "q" else self.heads.key_value

    @property
    def logit_scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return self.heads.size**-0.5 if self.scale is None else self.scale

    def reads(self, role: str) -> str:
        """The tensor that enters a role's layer: ``x``, ``context``, ``value``, ``o`` or other."""
        if role in self.inputs:
            return self.inputs[role]
        if role == "o":
            return "o"
        if role == "v" and "v" in self.separate_inputs:
            return "value"
        return "context" if role != "q" and (self.cross or "k" in self.separate_inputs) else "x"

    def readers(self, tensor: str) -> list[str]:
        """The roles whose layers a tensor (as :meth:`reads` names it) enters."""
        return [role for role in self.roles() if self.reads(role) == tensor]

    def pairs(self, role: str) -> tuple[LowRankAdapter, ...]:
        """The LoRA pairs of a role, one for each active adapter, where one trains."""
        first = self.adapters.get(role)
        return () if first is None else (first, *first.beside)

    def effective(self, role: str) -> Tensor:
        """``[W | b]`` of a role as the forward pass sees it: with its adapters merged."""
        matrix, pairs = self.roles()[role].read(), self.pairs(role)
        if not pairs:
            return matrix
        weight = matrix[:, : pairs[0].down.shape[1]]
        merged = weight
        for pair in pairs:
            update, scale = pair.update().to(matrix.dtype), self.row_scale(role, pair)
            # DoRA's m/‖W + scaling·B A‖ scales the weight too: W + Σ (m (W + U) - W).
            if scale is not None:
                update = scale[:, None] * (weight + update) - weight
            merged = merged + update
        return torch.cat([merged, matrix[:, weight.shape[1] :]], dim=1)

    def row_scale(self, role: str, pair: LowRankAdapter | None = None) -> Tensor | None:
        """What DoRA multiplies the rows of ``W + scaling · B A`` by: ``m / norm``, ``[out]``.

        Args:
            role: of the weight.
            pair: one of :meth:`pairs`; the first by default.

        Returns:
            ``None`` without DoRA.
        """
        pair = self.adapters.get(role) if pair is None else pair
        return None if pair is None else pair.row_scale(self.roles()[role])


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
        query_down: the down-projection whose latents ``query`` reads.
        latent: the one whose latents keys and values are made of; further
            rows of it are the part of the keys that all heads share. Empty
            where another attention has it.
    """

    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    layout: Fusion = "sectioned"
    outputs: tuple[str, ...] = OUTPUTS
    query_down: str | None = None
    latent: str | None = None


@dataclass(frozen=True)
class AttentionDeclaration(Declaration):
    """One call of :func:`declare_attention`, which explains the fields."""

    convention: Convention
    heads: int | str
    key_value_heads: int | str | None
    head_size: int | str | None
    cross: bool
    rotary: bool
    normed: bool
    separate_inputs: frozenset[str]


DECLARED = Declarations[AttentionDeclaration]()


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
    latent: str | None = None,
    query_down: str | None = None,
) -> AttentionDeclaration:
    """Declare which modules of a model are attentions, and which of their layers is which.

    ::

        declare_attention("MyMixer", query="a", key="b", value="c", output="d", heads="n_heads")
        declare_attention("layers.*.mix", fused="abc", output="out", heads=8)

    Multi-head latent attention, whose keys and values are made of a latent::

        declare_attention(
            "MyLatent", query="q_up", fused="kv_up", layout="interleaved", latent="kv_down",
            query_down="q_down", output="out", heads="n_heads", rotary=True,
        )

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
        latent: name of the down-projection that makes the latent which the key
            and value projections read. Rows of it that they do not read, the
            last ones, are the part of the keys that all heads share, and stand
            behind the other. Where such an attention is rotated, that part is,
            and the last columns of as many queries. Default ``None``: the key
            and value projections read the attention's input.
        query_down: the same of the query projection. Default ``None``.

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
    if query is None and (latent is not None or query_down is not None):
        raise ValueError(
            "declare_attention: with latent or query_down the queries have a projection of their "
            "own; give query."
        )
    roles = frozenset(separate_inputs)
    if not roles <= {"k", "v"}:
        raise ValueError(
            f"separate_inputs={separate_inputs!r}: declare_attention takes 'k', 'v' or both."
        )
    declaration = AttentionDeclaration(
        target,
        Convention(
            *(query, key, value, fused, layout),
            () if output is None else (output,),
            query_down=query_down,
            latent=latent,
        ),
        heads,
        key_value_heads,
        head_size,
        cross,
        rotary,
        normed,
        roles,
    )
    return DECLARED.add(declaration)


def forget_attention(declaration: AttentionDeclaration) -> None:
    """Undo one :func:`declare_attention`.

    Args:
        declaration: what it returned.
    """
    DECLARED.forget(declaration)
