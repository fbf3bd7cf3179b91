"""Which sides of which weights are rotated, and what that keeps."""

import pytest
import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.linalg.banded import banded_size
from hf_precond.optimizers.adamr import tiling as tiling_module
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.tiling import LARGE, Tiling, tile
from hf_precond.registry import create_optimizer
from tests.optimizers.adamr.cases import adamr, noise, run


def tiling_of(shape, module=None, groups=1, **fields):
    matrix = None if module is None else LayerMatrix("x", module, groups=groups)
    return tile(shape, AdamRConfig.create(**fields), matrix)


@pytest.mark.parametrize(
    ("shape", "fields", "sides"),
    [
        ((768, 768), {}, ("left", "right")),
        ((3072, 768), {}, ("right",)),
        ((768, 3072), {}, ("left",)),
        ((384, 768), {}, ("left", "right")),
        ((128, 512), {}, ("left", "right")),
        ((128, 512), {"basis": "one_sided"}, ("left",)),
        ((512, 128), {"basis": "one_sided"}, ("right",)),
        ((128, 512), {"basis": "two_sided", "max_dim": 256}, ("left",)),
        ((768, 3072), {"basis": "two_sided", "max_dim": 4096}, ("left", "right")),
        ((64, 3, 16, 16), {}, ("left", "right")),
        ((768, 3, 16, 16), {}, ("left", "right")),
        ((768, 768), {"basis": "identity"}, ()),
        ((768,), {}, ()),
        ((), {}, ()),
        ((1, 768), {}, ()),
        ((768, 1), {}, ()),
        ((32128, 1024), {}, ("right",)),
    ],
)
def test_sides(shape, fields, sides):
    assert tiling_of(shape, **fields).sides == sides


@pytest.mark.parametrize("shape", [(30522, 768), (512, 512), (100, 64)])
def test_embeddings_rotate_the_hidden_side_only(shape):
    assert tiling_of(shape, nn.Embedding(2, 2)).sides == ("right",)


def test_depthwise_convolutions_rotate_the_right_side_and_groups_stand_alone():
    depthwise = tiling_of((32, 1, 3, 3), nn.Conv2d(32, 32, 3, groups=32), groups=32)
    assert depthwise == Tiling(1, 32, 9, "columns", False, True)
    grouped = tiling_of((32, 4, 3, 3), nn.Conv2d(16, 32, 3, groups=4), groups=4)
    assert grouped == Tiling(4, 8, 36, "rows", True, True)


def test_a_matrix_wider_than_max_dim_on_both_sides_falls_into_blocks_of_the_smaller():
    assert tiling_of((5000, 3000), max_dim=2048) == Tiling(2, 5000, 1500, "columns", False, True)
    assert tiling_of((2050, 3000), max_dim=1024) == Tiling(5, 410, 3000, "rows", True, False)
    # A prime side has no block but the single column, which is no rotation.
    assert not tiling_of((2053, 2053), max_dim=1024).sides


def test_every_expert_is_a_matrix_of_its_own():
    matrix = LayerMatrix("experts", nn.Module(), layout="conv", stacked=True)

    def stacked(shape, **fields):
        return tile(shape, AdamRConfig.create(**fields), matrix)

    assert stacked((8, 256, 128)) == Tiling(8, 256, 128, "rows", True, True)
    assert stacked((8, 3072, 768)) == Tiling(8, 3072, 768, "rows", False, True)
    # Blocks of the smaller side would be no view of a stack where that is the columns.
    assert stacked((8, 96, 80), max_dim=40) == Tiling(24, 32, 80, "rows", True, False)
    assert stacked((8, 97, 80), max_dim=40) == Tiling(8, 97, 80, "rows", False, False)
    assert not stacked((8, 16, 16), basis="identity").sides


def state_elements(tiling):
    """Numbers kept: two moments, and of each rotated side a basis and a triangle in bands."""
    sizes = tiling.left * [tiling.rows] + tiling.right * [tiling.columns]
    sides = sum(size**2 + banded_size(size) for size in sizes)
    return tiling.tiles * (2 * tiling.rows * tiling.columns + sides)


@pytest.mark.parametrize(
    ("shape", "fields"),
    [((6, 8), {}), ((6, 40), {"basis": "one_sided"}), ((6, 3, 2, 2), {}), ((9, 12), {"max_dim": 4}),
     ((12, 9), {"max_dim": 4}), ((5, 7), {"basis": "identity"}), ((300, 260), {})],
)  # fmt: skip
def test_state_elements_counts_what_is_kept(shape, fields):
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(shape))
    optimizer = adamr([module], **fields)
    run(optimizer, [module], noise(shape, steps=2, dtype=torch.float32))
    state = optimizer.state[module.weight]
    kept = sum(t.numel() for t in state.values() if isinstance(t, torch.Tensor) and t.dim() > 1)
    if not tile(shape, optimizer.config).sides:
        kept = state["exp_avg"].numel() + state["exp_avg_sq"].numel()
    else:
        kept -= state["mean_sq"].numel()
    assert kept == state_elements(tile(shape, optimizer.config))


def bert_base():
    """Shapes of BERT-base's weights of two dimensions, and the number of all other numbers."""
    layer = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    embeddings = [(30522, 768), (512, 768), (2, 768)]
    vectors = 12 * (4 * 768 + 3072 + 768 + 4 * 768) + 2 * 768 + 768
    return embeddings, layer * 12 + [(768, 768)], vectors


def test_default_state_of_bert_base_is_at_most_half_more_than_that_of_adamw():
    embeddings, matrices, vectors = bert_base()
    config, table = AdamRConfig(), LayerMatrix("x", nn.Embedding(2, 2))
    ours = sum(state_elements(tile(shape, config, table)) for shape in embeddings)
    ours += sum(state_elements(tile(shape, config)) for shape in matrices) + 2 * vectors
    adamw = 2 * (sum(a * b for a, b in embeddings + matrices) + vectors)
    assert 1.4 < ours / adamw <= 1.55


@pytest.mark.parametrize("width", [384, 768])
def test_default_state_of_encoder_layers_is_at_most_1_7_times_that_of_adamw(width):
    """Of MiniLM and BERT-base, without their embeddings, whose share is small."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    ours = sum(state_elements(tile(shape, AdamRConfig())) for shape in shapes)
    assert 1.5 < ours / (2 * sum(a * b for a, b in shapes)) <= 1.7


@pytest.mark.parametrize(
    ("shape", "module", "fields", "expected"),
    [
        # Mllama's tile embedding: blocks of its hidden side would be 98 GiB.
        ((9, 8197120), nn.Embedding(2, 2), {}, Tiling(1, 9, 8197120, "rows", True, False)),
        ((30522, 768), nn.Embedding(2, 2), {}, Tiling(1, 30522, 768, "columns", False, True)),
        ((256, 8192), None, {"basis": "two_sided", "max_dim": 8192},
         Tiling(1, 256, 8192, "rows", True, False)),
        ((8192, 256), None, {"basis": "two_sided", "max_dim": 8192},
         Tiling(1, 8192, 256, "rows", False, True)),
        # Below 64 MiB a state may be any multiple of AdamW's.
        ((16, 1024), None, {}, Tiling(1, 16, 1024, "rows", True, True)),
        ((2048, 2048), None, {}, Tiling(1, 2048, 2048, "rows", True, True)),
        ((2048, 2048), None, {"max_state_ratio": 2.5}, Tiling(1, 2048, 2048, "rows", True, False)),
        ((2048, 2048), None, {"max_state_ratio": 1.2}, Tiling(8, 256, 2048, "rows", True, False)),
        ((4096, 2048), None, {"max_state_ratio": 1.2},
         Tiling(4, 4096, 512, "columns", False, True)),
        ((2048, 2048), None, {"max_state_ratio": 1.0}, Tiling(1, 2048, 2048, "rows", False, False)),
    ],
)  # fmt: skip
def test_a_large_state_is_bounded(shape, module, fields, expected):
    tiling = tiling_of(shape, module, **fields)
    assert tiling == expected
    adamw = 2 * shape[0] * shape[1]
    most = AdamRConfig.create(**fields).max_state_ratio
    assert state_elements(tiling) <= max(most * adamw, LARGE)
    assert tiling.state_ratio == pytest.approx(state_elements(tiling) / adamw)


def test_bounded_experts_and_groups_are_divided_where_they_can_be():
    matrix = LayerMatrix("experts", nn.Module(), layout="conv", stacked=True)
    fields = {"max_state_ratio": 1.2}
    rows = tile((8, 512, 1024), AdamRConfig.create(**fields), matrix)
    assert rows == Tiling(32, 128, 1024, "rows", True, False)
    # Columns of some experts are no view of the stack.
    assert not tile((8, 1024, 512), AdamRConfig.create(**fields), matrix).sides


def test_the_routing_says_where_a_state_is_bounded():
    model = nn.Sequential(nn.Embedding(4, 2_500_000, device="meta"), nn.Linear(8, 8),
                          nn.Linear(2048, 2048, device="meta"))  # fmt: skip
    reasons = {}
    for most in (6.0, 1.2, 1.0):
        optimizer = create_optimizer(model, "adamr", max_state_ratio=most)
        reasons[most] = {route.name: (route.treatment, route.reason) for route in optimizer.routing}
        optimizer.close()
    treated, plain = ("preconditioned", "adamw")
    only = "embedding, only rows rotated: max_state_ratio"
    assert reasons[6.0]["0.weight"] == reasons[1.2]["0.weight"] == (treated, only)
    assert "max_state_ratio" not in reasons[6.0]["2.weight"][1]
    blocks = "only rows rotated in blocks of 256: max_state_ratio"
    assert reasons[1.2]["2.weight"][1].endswith(blocks)
    for name in ("0.weight", "2.weight"):
        assert reasons[1.0][name][0] == plain
        assert reasons[1.0][name][1].endswith("without bases: max_state_ratio")
    assert "max_state_ratio" not in reasons[1.0]["1.weight"][1]


def test_a_bounded_embedding_rotates_its_rows(monkeypatch):
    """As the same matrix in a linear layer does, whichever of them a step has read."""
    monkeypatch.setattr(tiling_module, "LARGE", 0)
    tiling_module._bounded.cache_clear()
    table, layer = nn.Embedding(4, 60, dtype=torch.float64), nn.Linear(60, 4, bias=False).double()
    layer.weight.data = table.weight.data.clone()
    gradients = noise((4, 60), steps=10)
    for (gradient,) in gradients:
        gradient[1:] = 0.0
    for module, fields in ((table, {"max_state_ratio": 2.0}), (layer, {"basis": "one_sided"})):
        optimizer = adamr([module], **fields)
        run(optimizer, [module], gradients)
        assert optimizer._tiling(optimizer.bound[0]).sides == ("left",)
    torch.testing.assert_close(table.weight, layer.weight, rtol=0, atol=1e-10)
    tiling_module._bounded.cache_clear()
