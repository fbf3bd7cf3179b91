"""How sharp each attention looks: the entropy of its weights, for who asks for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from hf_precond.architectures.structure import AttentionBlock
from hf_precond.statistics.moments import mean_of
from hf_precond.statistics.requests import MomentRequest, Statistic

ROWS = 8
"""Query positions of a sequence that are looked at."""


class EntropyMonitor:
    """Mean entropy of the attention weights per layer, at the last step with statistics.

    Args:
        blocks: the attentions.
    """

    def __init__(self, blocks: Sequence[AttentionBlock]) -> None:
        self.means: dict[str, Tensor] = {}
        self.watched = {f"{block.name}:entropy": block for block in blocks if block.observed}
        blind = [block.name for block in blocks if not block.observed]
        if blind:
            warnings.warn(
                f"afopt: attention_entropy leaves out {len(blind)} attentions ({blind[0]}, …) that "
                "do not call transformers' attention look-up.",
                stacklevel=2,
            )

    def requests(self) -> list[MomentRequest]:
        """One request an attention."""
        return [
            MomentRequest(key, "entropy", block.q, block, rows=ROWS)
            for key, block in self.watched.items()
        ]

    def keep(self, statistics: Mapping[str, Statistic]) -> None:
        """Keep the means of this step's statistics."""
        for key, block in self.watched.items():
            found = statistics.get(key)
            if found is not None:
                self.means[block.name] = mean_of(found.sum, found.count)

    def values(self) -> dict[str, float]:
        """``entropy/{attention}``, the mean over heads, and ``entropy_min``, of the sharpest."""
        values: dict[str, float] = {}
        for name, mean in self.means.items():
            values[f"entropy/{name}"] = float(mean.mean())
            values[f"entropy_min/{name}"] = float(mean.min())
        return values
