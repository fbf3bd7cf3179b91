"""Gradients and directions of several layers at once: what each layer's own join and split say."""

import pytest
import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix, RowSelection
from hf_precond.optimizers.base.parameters import BoundMatrix, split_stack, stacked_gradients

LAYERS = {
    "linear": (lambda: nn.Linear(3, 5), {"bias": "bias"}),
    "no bias": (lambda: nn.Linear(3, 5, bias=False), {}),
    "bias apart": (lambda: nn.Linear(3, 5), {}),
    "transposed": (lambda: nn.Linear(5, 3, bias=False), {"layout": "transposed"}),
    "convolution": (lambda: nn.Conv2d(2, 5, 3), {"bias": "bias", "layout": "conv"}),
    "fused": (lambda: nn.Linear(3, 6), {"bias": "bias", "rows": RowSelection(1, (2, 4), 6)}),
}


def bound(kind, dtype=torch.float32):
    torch.manual_seed(0)
    make, fields = LAYERS[kind]
    bias_group = 0 if "bias" in fields else None
    items = [BoundMatrix(LayerMatrix(f"l{n}", make().to(dtype), **fields), 0, bias_group)
             for n in range(3)]  # fmt: skip
    for item in items:
        for parameter in item.matrix.module.parameters():
            parameter.grad = torch.randn_like(parameter)
    return items


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(kind, count, dtype):
    items = bound(kind, dtype)[:count]
    found = stacked_gradients(items)
    assert torch.equal(found, torch.stack([item.gradient() for item in items]))
    found.zero_()
    assert all(item.weight.grad.any() for item in items)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_parts(kind, frozen):
    items = bound(kind)
    if frozen and items[0].matrix.bias is not None:
        items[1].matrix.bias_parameter.grad = None
    matrices = torch.randn(3, items[0].matrix.shape[0], items[0].matrix.columns)
    known = split_stack(items, matrices)
    for item, matrix, parts in zip(items, matrices, known, strict=True):
        groups, states = [{"lr": 1.0}], ({}, {})
        each = [item.views(matrix, groups, state, {}, given)
                for state, given in zip(states, (parts, None), strict=True)]  # fmt: skip
        assert len(each[0]) == 1 + (item.matrix.bias is not None and not (
            frozen and item is items[1]))  # fmt: skip
        for one, other in zip(*each, strict=True):
            assert torch.equal(one.grad, other.grad) and one.grad.is_contiguous()
    one_by_one = kind == "fused" or (frozen and items[0].matrix.bias is not None)
    assert (known == [None] * 3) == one_by_one
