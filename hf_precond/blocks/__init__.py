"""What ``model`` finds in a module and ``optim`` steps: plain values and module handles.

This package imports torch only. It knows no optimizer and no architecture.
"""

from hf_precond.blocks.attention import Adapter, AttentionBlock, Heads
from hf_precond.blocks.found import Blocks
from hf_precond.blocks.matrix import LayerMatrix, RowSelection
from hf_precond.blocks.norm import NormParameter
from hf_precond.blocks.routing import Route, RoutingTable
from hf_precond.blocks.statistics import (
    CurvatureRequest,
    CurvatureSource,
    MomentRequest,
    Statistic,
    StatisticsSource,
)

__all__ = [
    "Adapter",
    "AttentionBlock",
    "Blocks",
    "CurvatureRequest",
    "CurvatureSource",
    "Heads",
    "LayerMatrix",
    "MomentRequest",
    "NormParameter",
    "Route",
    "RoutingTable",
    "RowSelection",
    "Statistic",
    "StatisticsSource",
]
