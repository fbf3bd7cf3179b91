"""Everything an optimizer is given about a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_precond.blocks.attention import AttentionBlock
from hf_precond.blocks.matrix import LayerMatrix
from hf_precond.blocks.norm import NormParameter
from hf_precond.blocks.routing import RoutingTable
from hf_precond.blocks.statistics import CurvatureRequest, MomentRequest, StatisticsSource

Request = MomentRequest | CurvatureRequest
Owner = tuple[str, nn.Module, str]


@dataclass(eq=False)
class Blocks:
    """What was found in a model for one optimizer.

    Args:
        matrices: the matrices to precondition, in model order. Those of
            ``attention`` that are in scope are among them.
        attention: the attention blocks that have a matrix in scope.
        others: matrices of hidden linear layers outside ``matrices``, which a
            base rule for matrices may step.
        norms: the channel-wise parameters to precondition.
        routing: the routing table.
        owners: name, module and attribute of every parameter, frozen ones too.
        open: makes the source of the statistics that are asked for, its hooks
            installed; ``None`` where there is no model to read (a deep copy).
        find: reads another model in the same way (a deep copy is attached to
            its own model with it).
    """

    matrices: list[LayerMatrix] = field(default_factory=list)
    attention: list[AttentionBlock] = field(default_factory=list)
    others: list[LayerMatrix] = field(default_factory=list)
    norms: list[NormParameter] = field(default_factory=list)
    routing: RoutingTable = field(default_factory=RoutingTable)
    owners: list[Owner] = field(default_factory=list)
    open: Callable[[Sequence[Request]], StatisticsSource] | None = None
    find: Callable[[nn.Module], Blocks] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads no model until it is attached to one."""
        return self.__dict__ | {"open": None}
