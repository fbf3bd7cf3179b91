"""An attention of a model: which matrices are its q, k, v and o, and its heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from hf_precond.blocks.matrix import LayerMatrix
from hf_precond.blocks.sharding import full


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
class Adapter:
    """A low-rank update ``scaling · up @ down`` of a matrix of an attention (LoRA).

    Args:
        down: LoRA's A, ``[r, in]``; one object for all roles of a fused weight.
        up: LoRA's B, ``[out, r]``; the role's rows where the weight is fused.
        scaling: factor of the product.
        magnitude: the module whose ``weight`` (``[out]``) are the norms that
            DoRA gives the rows of the sum of weight and update; ``None``
            without DoRA.
    """

    down: LayerMatrix
    up: LayerMatrix
    scaling: float
    magnitude: nn.Module | None = None

    def update(self) -> Tensor:
        """``scaling · B A``, ``[out, in]``."""
        up = self.up.read()[:, : self.up.shape[1]]
        return self.scaling * (up @ self.down.read())


@dataclass(eq=False)
class AttentionBlock:
    """One attention module.

    A matrix that is frozen is still listed (its siblings' factors need its
    weight); ``trainable`` names those that are stepped.

    Args:
        name: module path of the attention.
        module: the attention module: the one that ``transformers``' attention
            functions receive as their first argument.
        q, k, v, o: the matrices; ``o`` is ``None`` where the model has none.
        heads: head counts and widths.
        trainable: the roles (``"q"``, ``"k"``, ``"v"``, ``"o"``) that train.
        rotary: queries and keys are rotated by position (RoPE).
        normed: queries and keys pass a norm of their own (QK-norm).
        cross: keys and values may read another sequence than the queries.
        apart: ``"k"`` where k's layer is called with another tensor than q's,
            ``"v"`` where v's is with another than k's; ``cross`` says the
            former too.
        observed: ``query`` and ``key`` moments can be asked for: the module
            calls ``transformers``' attention look-up.
        adapters: role to its LoRA pair, where it has one that trains.
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
    apart: frozenset[str] = frozenset()
    scale: float | None = None
    note: str = ""
    observed: bool = False
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def roles(self) -> dict[str, LayerMatrix]:
        """Role to matrix, for the roles this attention has."""
        roles = {"q": self.q, "k": self.k, "v": self.v}
        return roles if self.o is None else roles | {"o": self.o}

    @property
    def logit_scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return self.heads.size**-0.5 if self.scale is None else self.scale

    def reads(self, role: str) -> str:
        """The tensor that enters a role's layer: ``x``, ``context``, ``value`` or ``o``."""
        if role == "o":
            return "o"
        if role == "v" and "v" in self.apart:
            return "value"
        return "context" if role != "q" and (self.cross or "k" in self.apart) else "x"

    def readers(self, which: str) -> list[str]:
        """The roles whose layers a tensor enters."""
        return [role for role in self.roles() if self.reads(role) == which]

    def effective(self, role: str) -> Tensor:
        """``[W | b]`` of a role as the forward pass sees it: with its adapter, if any, merged."""
        matrix = self.roles()[role].read()
        adapter = self.adapters.get(role)
        if adapter is None:
            return matrix
        update = adapter.update().to(matrix.dtype)
        scale = self.row_scale(role)
        merged = matrix[:, : update.shape[1]] + update
        if scale is not None:
            merged = scale[:, None] * merged
        return torch.cat([merged, matrix[:, update.shape[1] :]], dim=1)

    def row_scale(self, role: str) -> Tensor | None:
        """What DoRA multiplies the rows of ``W + scaling · B A`` by: ``m / norm``, ``[out]``.

        ``None`` for a role without DoRA.
        """
        adapter = self.adapters.get(role)
        if adapter is None or adapter.magnitude is None:
            return None
        update = adapter.update()
        matrix = self.roles()[role].read()[:, : update.shape[1]] + update
        magnitude = full(cast(Tensor, adapter.magnitude.weight).detach())
        rows = adapter.up.bias_view(magnitude).reshape(-1)
        return rows.to(matrix.dtype) / torch.linalg.vector_norm(matrix, dim=1)
