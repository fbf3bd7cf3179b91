"""The directions of AFOpt: a gradient between the factors of its rows and of its columns.

For a batch of matrices of one shape; see :class:`~hf_precond.optimizers.afopt.optimizer.AFOpt`. Per head, with
``P = (A + λ·tr(A)/n·I)⁻¹`` and N the momentum::

    spectral      U = P_L^(1/2) msign(P_L^(1/2) N P_R^(1/2)) P_R^(1/2)
    inverse       U = P_L N P_R               the least-squares step along -∂L/∂S, S = QKᵀ/√d
    joint         U = P_L N (P_R - ½ Ŵᵀ P_own Ŵ)    q and k: what both steps move is counted once
    inverse_sqrt  U = P_L^(1/2) N P_R^(1/2)

with ``Ŵ = [W | b]`` of the head itself and P_own of its own A_Q (q) or A_K (k).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_precond.linalg.inverses import root_without_last, without_last
from hf_precond.linalg.matrix_functions import gram_newton_schulz, newton_schulz
from hf_precond.linalg.products import Precision, float32_products, matmul
from hf_precond.optimizers.afopt.plan import FactorKind, Form


@dataclass
class TwoSidedPreconditioner:
    """The factors around a batch of gradients.

    Args:
        heads: row groups of each matrix.
        form: how the matrix sign is computed.
        left: ``[n · heads, rows, rows]``, or ``None`` for the identity.
        rights: one a matrix, ``[c, c]`` or blocks ``[b, w, w]``; ``None`` for
            the identity. The same tensor object for siblings.
        precision: of products on GPUs.
    """

    heads: int
    form: Form
    left: Tensor | None
    rights: Sequence[Tensor] | None
    precision: Precision = "highest"

    def linear(self, gradient: Tensor) -> Tensor:
        """``P_L G P_R``, ``[n, out, c]``: directions ``inverse`` and ``inverse_sqrt``."""
        right = self._times(gradient)
        if self.left is None:
            return right
        return torch.bmm(self.left, self._split(right)).view_as(gradient)

    def spectral(self, gradient: Tensor) -> Tensor:
        """``W_L msign(W_Lᵀ G W_R) W_Rᵀ``, ``[n, out, c]``.

        With ``W Wᵀ = A⁻¹``; the result depends on A only, not on the choice of
        W. In the form ``rows`` the right factor enters as ``A⁻¹`` (the matrix
        sign is ``P Z`` with P a polynomial of ``Z Zᵀ``), in the form
        ``columns`` the left one does.
        """
        work = {"rows": self._rows, "columns": self._columns, "square": self._square}
        return work[self.form](gradient)

    def _rows(self, gradient: Tensor) -> Tensor:
        scaled = self._split(self._times(gradient))
        gram = torch.bmm(scaled, self._split(gradient).mT)
        if self.left is not None:
            gram = torch.bmm(torch.bmm(self.left.mT, gram), self.left)
        sign = gram_newton_schulz(gram)
        if self.left is not None:
            sign = torch.bmm(torch.bmm(self.left, sign), self.left.mT)
        return torch.bmm(sign, scaled).view_as(gradient)

    def _columns(self, gradient: Tensor) -> Tensor:
        parts = self._split(gradient)
        scaled = parts if self.left is None else torch.bmm(self.left, parts)
        gram = torch.bmm(parts.mT, scaled)
        count, columns = gradient.shape[0], gradient.shape[-1]
        if self.rights is not None:
            gram = self._twice(gram.view(count, -1, columns, columns), False)
        sign = gram_newton_schulz(gram.view(-1, columns, columns))
        if self.rights is not None:
            sign = self._twice(sign.view(count, -1, columns, columns), True)
        return torch.bmm(scaled, sign.view(-1, columns, columns)).view_as(gradient)

    def _twice(self, symmetric: Tensor, transposed: bool) -> Tensor:
        """``Wᵀ S W`` (``W S Wᵀ`` if transposed) of symmetric ``[n, heads, c, c]``."""
        once = self._times(symmetric.flatten(1, 2), transposed).view_as(symmetric)
        turned = once.mT.contiguous()
        return self._times(turned.flatten(1, 2), transposed).view_as(symmetric)

    def _square(self, gradient: Tensor) -> Tensor:
        z = self._split(self._times(gradient))
        if self.left is not None:
            z = torch.bmm(self.left.mT, z)
        low = z.is_cuda and z.dtype == torch.float32
        sign = newton_schulz(z.bfloat16()).to(z.dtype) if low else newton_schulz(z)
        if self.left is not None:
            sign = torch.bmm(self.left, sign)
        return self._times(sign.reshape(gradient.shape), transposed=True)

    def _split(self, matrices: Tensor) -> Tensor:
        """``[n, out, c] -> [n · heads, rows, c]``."""
        return matrices.reshape(-1, matrices.shape[1] // self.heads, matrices.shape[2])

    def _times(self, matrices: Tensor, transposed: bool = False) -> Tensor:
        if self.rights is None:
            return matrices
        return times_right(matrices, self.rights, transposed, self.precision)


def resting(factor: Tensor, kind: FactorKind, columns: int) -> Tensor:
    """A right factor for steps that leave the bias as it is.

    The least change of the output is then sought without the constant 1 among
    the inputs: the moment loses its last row and column. Symmetric roots are
    left as they are (they do not follow from the factor).

    Args:
        factor: ``[c, c]`` or diagonal blocks.
        kind: what it is.
        columns: c.
    """
    if kind == "root":
        return factor
    narrow = without_last if kind == "inverse" else root_without_last
    if factor.dim() == 2:
        return narrow(factor)
    block, last = divmod(columns - 1, factor.shape[-1])
    result = factor.clone()
    result[block, : last + 1, : last + 1] = narrow(factor[block, : last + 1, : last + 1])
    return result


def times_right(
    matrices: Tensor,
    rights: Sequence[Tensor],
    transposed: bool = False,
    precision: Precision = "highest",
) -> Tensor:
    """Every matrix times its own right factor (transposed).

    Args:
        matrices: ``[n, rows, c]``.
        rights: n factors, ``[c, c]`` or diagonal blocks ``[b, w, w]`` with
            ``b · w >= c``. Neighbours with the same tensor share one product.
        transposed: multiply with the factors' transposes.
        precision: of products on GPUs.

    Returns:
        ``[n, rows, c]``.
    """
    matrices = matrices.contiguous()
    result = torch.empty_like(matrices)
    for start, stop, right in _runs(rights):
        right = right.mT if transposed else right
        rows, out = matrices[start:stop].flatten(0, 1), result[start:stop].flatten(0, 1)
        if right.dim() == 2:
            _product(rows, right, out, precision)
            continue
        width = right.shape[-1]
        for number, block in enumerate(right):
            part = rows[:, number * width : (number + 1) * width]
            target = out[:, number * width : (number + 1) * width]
            size = part.shape[1]
            _product(part, block[:size, :size], target, precision)
    return result


def _product(a: Tensor, b: Tensor, out: Tensor, precision: Precision) -> None:
    if not a.is_cuda or a.dtype == torch.float64:
        torch.mm(a, b, out=out)
    elif precision == "bf16":
        out.copy_(matmul(a, b, "bf16"))
    else:
        with float32_products(tf32=precision == "tf32"):
            torch.mm(a, b, out=out)


def _runs(rights: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """Neighbours with the same factor together: one product for q, k and v."""
    start = 0
    for place in range(1, len(rights) + 1):
        if place == len(rights) or rights[place] is not rights[start]:
            yield start, place, rights[start]
            start = place
