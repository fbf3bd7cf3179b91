"""The Triton kernels as they are compiled, at the sizes of BERT-base, against float64."""

import math

import pytest
import torch

from hf_precond.linalg.matrix_functions import pack
from hf_precond.registry import create_optimizer, list_optimizers
from tests.gpu.support import inputs, passes
from tests.optimizers.models import make

pytestmark = pytest.mark.gpu


@pytest.fixture
def kernels(cuda):
    module = pytest.importorskip("hf_precond.optimizers.base.triton_kernels")
    assert module.usable(cuda)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "bias"), [(768, 768, True), (768, 3072, True), (3072, 768, False)]
)
def test_the_momentum_and_the_steps(rows, columns, bias, dtype, kernels, cuda):
    torch.manual_seed(0)
    count, width, beta, noise, length = 3, columns + 8 * bias, 0.9, 0.2, 7.0
    grads = [torch.randn(rows, columns, device=cuda).to(dtype) for _ in range(count)]
    biases = [torch.randn(rows, device=cuda).to(dtype) for _ in range(count)] if bias else None
    momentum = torch.zeros(count, rows, width, device=cuda)
    momentum[..., : columns + bias] = torch.randn(count, rows, columns + bias, device=cuda)
    usual = torch.tensor([1.0, 500.0, 4000.0], device=cuda)
    whole = torch.zeros(count, rows, width, device=cuda, dtype=torch.float64)
    whole[..., :columns] = torch.stack(grads)
    if bias:
        whole[..., columns] = torch.stack(biases)
    expected = beta * momentum.double() + (1 - beta) * whole
    norms = whole[..., :columns].flatten(1).norm(dim=1)
    average = 0.9 * usual.double() + 0.1 * norms
    found, lengths = kernels.advance(
        kernels.Matrices(grads, biases), momentum, usual, columns, beta, decay=0.9, started=True,
        noise=noise, length=length, longest=2.0, height=64.0, nesterov=True, blocks=1,
        own=width, wide=width,
    )  # fmt: skip
    torch.testing.assert_close(momentum.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(usual.double(), average, rtol=1e-5, atol=0)
    ours = expected[..., :columns].flatten(1).norm(dim=1)
    right = (ours / (average * noise)).clamp(max=2) * length
    torch.testing.assert_close(lengths.flatten().double(), right, rtol=1e-5, atol=0)
    ahead = expected + (1 / beta - 1) * whole
    ahead *= 64 / expected.abs().amax((1, 2), keepdim=True)
    torch.testing.assert_close(found.double(), ahead, rtol=2**-10, atol=1e-6)
    norms = found.float().flatten(1).norm(dim=1)
    held = kernels.Matrices([g.clone() for g in grads], [b.clone() for b in biases or ()] or None)
    rates = (0.5, 0.2, 0.25, 0.0)
    kernels.descend(held, found, norms, lengths, columns, width, width, rates)
    right = found.float() * (lengths / norms[:, None, None])
    error = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    for place in range(count):
        after = 0.9 * grads[place].float() - 0.5 * right[place, :, :columns]
        torch.testing.assert_close(held.tensors[place].float(), after, **error)
    steps, rest = kernels.scaled_steps(found, norms, columns, bias)
    right = found.float() * norms[:, None, None]
    torch.testing.assert_close(steps, right[..., :columns].contiguous())
    if bias:
        torch.testing.assert_close(rest, right[..., columns].contiguous())


def test_bfloat16_weights_are_rounded_to_the_nearest(kernels, cuda):
    torch.manual_seed(2)
    weight = torch.ones(512, 512, device=cuda, dtype=torch.bfloat16)
    found = torch.randn(1, 512, 512, device=cuda).half()
    one = torch.ones(1, device=cuda)
    rates = (1.0, 0.0, 1.0, 0.0)
    kernels.descend(kernels.Matrices([weight], None), found, one, one, 512, 512, 512, rates)
    assert torch.equal(weight, (1 - found[0].float()).bfloat16())


@pytest.mark.parametrize("size", [768, 769, 1024])
def test_triangles(size, kernels, cuda):
    torch.manual_seed(1)
    whole = torch.randn(2, 3, size, size, device=cuda)
    whole = whole + whole.mT
    sizes, wide = torch.tensor([2.0, 5.0], device=cuda), size + -size % 8
    found = kernels.unpacked(pack(whole), sizes, size, wide)
    expected = torch.zeros(2, 3, wide, wide, device=cuda)
    expected[..., :size, :size] = whole / sizes.view(2, 1, 1, 1)
    # Half a unit in the last place; of the smallest numbers, which are subnormal, that is 2**-25.
    torch.testing.assert_close(found.float(), expected, rtol=2**-10, atol=2**-25)


@pytest.mark.parametrize("name", list_optimizers())
def test_a_gradient_of_zeros_moves_nothing(name, device):
    """As of LoRA's A at the first step."""
    model = make("bert").to(device)
    layer = model.bert.encoder.layer[0].intermediate.dense
    start = layer.weight.detach().clone()
    optimizer = create_optimizer(model, name, lr=1e-3, weight_decay=0.0)
    for step in range(3):
        loss = passes(model, optimizer, inputs("bert", device, step))
        assert math.isfinite(loss.item())
        layer.weight.grad.zero_(), layer.bias.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.weight, start)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
