"""Which sides of which weights are rotated, and what that keeps."""

import pytest
import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.linalg.banded import banded_size
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.tiling import Tiling, tile
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
