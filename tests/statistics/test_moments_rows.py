"""Patches of convolutions and rows of linear layers against the gradients that torch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.modules import layer_matrix
from hf_precond.statistics.moments import multihead_inner, output_rows, patches, select_outputs
from tests.architectures.families import build

CONVOLUTIONS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.Conv1d, (9,), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "2d": (nn.Conv2d, (7, 8), {"kernel_size": 3}),
    "rectangular": (nn.Conv2d, (7, 8), {"kernel_size": (2, 3), "stride": (2, 1), "padding": 1}),
    "dilated": (nn.Conv2d, (9, 9), {"kernel_size": (3, 2), "dilation": (2, 3), "padding": 2}),
    "same": (nn.Conv2d, (6, 5), {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)}),
    "reflect": (nn.Conv2d, (6, 5), {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "circular": (nn.Conv1d, (6,), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "grouped": (nn.Conv2d, (5, 6), {"kernel_size": 3, "groups": 2, "stride": 2}),
    "depthwise": (nn.Conv2d, (5, 6), {"kernel_size": 3, "groups": 4, "padding": 1}),
    "3d": (nn.Conv3d, (4, 5, 3), {"kernel_size": (2, 3, 1), "padding": (1, 0, 1)}),
    "patch embedding": (nn.Conv2d, (8, 8), {"kernel_size": 4, "stride": 4}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_and_output_rows_make_the_gradient(name: str) -> None:
    """``Σ_rows δ âᵀ = [dW | db]``, group by group."""
    torch.manual_seed(0)
    kind, sizes, options = CONVOLUTIONS[name]
    layer = kind(4, 8, **options).double()
    inputs = torch.randn(3, 4, *sizes, dtype=torch.float64)
    output = layer(inputs)
    loss = (output * torch.randn_like(output)).sum() + output.pow(3).sum()
    (delta,) = torch.autograd.grad(loss, output, retain_graph=True)
    loss.backward()
    rows = patches(layer, inputs)
    rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    out = output_rows(layer, delta).unflatten(-1, (layer.groups, -1)).movedim(1, 0)
    product = (out.mT @ rows).flatten(0, 1)
    expected = layer_matrix(layer, "").join(layer.weight.grad, layer.bias.grad)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


def test_an_image_without_a_batch_is_one() -> None:
    layer = nn.Conv2d(3, 2, 3).double()
    image = torch.randn(3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(patches(layer, image), patches(layer, image[None]))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "modernbert"])
def test_selected_outputs_are_the_rows_of_the_part(name: str) -> None:
    block = find_attention(build(name))[0]
    fused = layer_matrix(block.q.module, "", bias=False)
    x = torch.randn(5, 16, dtype=torch.float64)
    outputs = x @ fused.read().T
    for role in "qkv":
        matrix = block.roles()[role]
        expected = x @ matrix.read()[:, :16].T
        torch.testing.assert_close(select_outputs(matrix, outputs), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}])
def test_what_enters_the_output_projection_of_multihead_attention(
    batch_first: bool, widths: dict[str, int]
) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=batch_first, **widths).double()
    nn.init.normal_(layer.out_proj.bias)
    query = torch.randn(5, 5, 16, dtype=torch.float64)
    key = torch.randn(5, 5, widths.get("kdim", 16), dtype=torch.float64)
    value = torch.randn(5, 5, widths.get("vdim", 16), dtype=torch.float64)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2, 3:] = True
    output, _ = layer(query, key, value, key_padding_mask=mask)
    inner = multihead_inner(layer, (query, key, value), {"key_padding_mask": mask})
    torch.testing.assert_close(inner @ layer.out_proj.weight.T + layer.out_proj.bias, output)
