"""The routing table of every family, recorded.

``python -m tests.architectures.test_snapshots`` writes the tables anew; read the
difference before it is committed.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers.models.vit import modeling_vit

from hf_precond.optimizers.afopt.config import AFOptConfig
from hf_precond.optimizers.afopt.scope import attention_matrices
from tests.architectures.families import FAMILIES, build

FOLDER = Path(__file__).parent / "snapshots"


def table(name: str) -> str:
    blocks = attention_matrices(build(name, torch.float32), AFOptConfig(scope="all_linear"))
    lines = [f"{r.name}  {r.treatment}: {r.reason}" for r in blocks.routing]
    for block in blocks.attention:
        heads, marks = block.heads, ("rotary", "normed", "cross", "observed")
        said = [mark for mark in marks if getattr(block, mark)]
        lines.append(
            f"{block.name}  {heads.query} heads of {heads.size}, {heads.key_value} key-value"
            + (f", {', '.join(said)}" if said else "")
        )
        lines += [f"    {role}: {matrix.name}" for role, matrix in block.roles().items()]
    return "\n".join(lines) + "\n"


@pytest.mark.skipif(
    "q_proj" not in inspect.getsource(modeling_vit), reason="names of transformers 5.10 and later"
)
@pytest.mark.parametrize("name", FAMILIES)
def test_routing_is_the_recorded_one(name: str) -> None:
    assert table(name) == (FOLDER / f"{name}.txt").read_text()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for family in FAMILIES:
        (FOLDER / f"{family}.txt").write_text(table(family))
