"""Opens the source of the statistics that an optimizer asks for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import CurvatureRequest, Request, StatisticsSource


def open_statistics(model: nn.Module, requests: Sequence[Request]) -> StatisticsSource:
    """The source of what an optimizer asks for, its hooks installed.

    Raises:
        ValueError: for curvature and second moments asked for at once.
    """
    curvature = [request for request in requests if isinstance(request, CurvatureRequest)]
    if curvature and len(curvature) == len(requests):
        from hf_precond.statistics.hessian.probe import open_probe

        return open_probe(model, curvature)
    if curvature:
        raise ValueError("curvature and second moments come from two sources: open each by itself.")
    return MomentCollector(model, [r for r in requests if not isinstance(r, CurvatureRequest)])
