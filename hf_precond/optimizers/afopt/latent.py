"""Left factors where queries, keys and values are made of latents, or of several matrices.

With the notation of :mod:`~hf_precond.architectures.latent`, ``D = diag(γ)`` the scale of a
latent's norm, ``[·]`` the columns of a head that a matrix makes, and A_Q, A_K, d_h wide, of the
whole queries and keys:

- queries: A_K,h; keys made of the latent: ``A_Q,h`` in their columns; the shared part of the keys:
  ``Σ_h A_Q,h`` in its columns
- one of several matrices whose images are added, or stand side by side: the same in its columns;
  where its image stands there twice, ``E = (I, I)ᵀ``, ``Eᵀ A_Q,h E``
- values: ``W_o,hᵀ W_o,h``
- the down-projection of the queries: ``D Σ_h W_q,hᵀ A_K,h W_q,h D``
- keys that are values: ``D (M_k + M_v) D`` too, of ``Σ_h A_Q,h`` and ``Σ_h W_o,hᵀ W_o,h``
- that of keys and values: ``D (M_k + M_v) D``, ``M_k = Σ_h W_k,hᵀ A_Q,h W_k,h`` and ``M_v = Σ_h
  W_v,hᵀ W_o,hᵀ W_o,h W_v,h``, each over its mean eigenvalue: logits and outputs have no common unit

The norm's division by the length of its input, another number for each token, is left out, as
those of normed queries and keys are. A_Q and A_K are those of the vectors that the kernel is called
with (under RoPE averaged as ever); where it cannot be observed, or with ``rope="ignored"``, they
are sums over the matrices, without the products of two of them: ``A_K,h`` is then ``W_k,h A_c
W_k,hᵀ`` in the columns of the latent's keys and ``W_r A_X W_rᵀ`` in those of the shared ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_precond.architectures.attention_block import AttentionBlock
from hf_precond.linalg.matrix_functions import mean_eigenvalue

if TYPE_CHECKING:
    from hf_precond.optimizers.afopt.factors import Factors


def output_moment(factors: Factors, block: AttentionBlock, role: str) -> Tensor | None:
    """What the output of a matrix is weighed by, ``[heads, rows, rows]``.

    Args:
        factors: reads moments and weights.
        block: the attention.
        role: of a latent, a part of queries or keys, or those beside a part.

    Returns:
        ``None`` for the identity.
    """
    if role in block.downs:
        return _latent_moment(factors, block, role)
    return _part_moment(factors, block, role)


def _part_moment(factors: Factors, block: AttentionBlock, role: str) -> Tensor:
    """That of queries or keys, in the columns that a matrix makes."""
    queries = "q" in block.serves(role)
    moment = factors.met(block, "k" if queries else "q")
    moment = in_span(block, role, moment)
    if queries:
        moment = moment.repeat_interleave(block.heads.group, 0)
    return moment.unflatten(0, (block.heads_of(role), -1)).sum(1)


def in_span(block: AttentionBlock, role: str, moment: Tensor) -> Tensor:
    """What a moment of queries or keys is to the rows of a matrix: ``Eᵀ A E``.

    Args:
        block: the attention.
        role: of the matrix, which makes ``E W x`` of its input.
        moment: A, ``[heads, d_h, d_h]``.
    """
    start, stop = block.span(role)
    moment = moment[:, start:stop, start:stop]
    rows = block.roles()[role].shape[0] // block.heads_of(role)
    if rows == stop - start:
        return moment
    return moment.unflatten(2, (-1, rows)).sum(2).unflatten(1, (-1, rows)).sum(1)


def _latent_moment(factors: Factors, block: AttentionBlock, role: str) -> Tensor | None:
    down = block.downs[role]
    terms = []
    for image in down.images:
        if image == role:  # keys that are values
            terms.append(_part_moment(factors, block, role))
            continue
        moment = factors.output_moment(block, image)
        if moment is None:
            continue
        if block.v is block.k and image == "v":
            terms.append(moment)
            continue
        weight = factors.weight(block, image)[:, : down.matrix.shape[0]]
        parts = weight.unflatten(0, (len(moment), -1))
        term = torch.bmm(parts.mT, torch.bmm(moment.to(parts.dtype), parts))
        terms.append(term.sum(0, keepdim=True))
    if len(terms) > 1:
        tiny = torch.finfo(terms[0].dtype).tiny
        terms = [term / mean_eigenvalue(term).mean().clamp(min=tiny) for term in terms]
    total = torch.stack(terms).sum(0)
    scale = down.scale()
    if scale is None:
        return total
    scale = scale.to(total.dtype)
    return scale[:, None] * total * scale


def vector_moment(factors: Factors, block: AttentionBlock, role: str) -> Tensor:
    """A_Q (role q) or A_K (role k) where it was not observed.

    Args:
        factors: reads moments and weights.
        block: the attention.
        role: ``q`` or ``k``.

    Returns:
        ``[heads, d_h, d_h]``.
    """
    count, size, terms = block.heads_of(role), block.heads.size, []
    for maker in block.makers(role):
        moment = factors.image_moment(block, maker)
        start, stop = block.span(maker)
        times, edges = (stop - start) // moment.shape[-1], (start, size - stop)
        moment = moment.repeat(1, times, times)
        terms.append(F.pad(moment, edges * 2).expand(count, -1, -1))
    return torch.stack(terms).sum(0)
