"""The Triton kernels of a step, in Triton's interpreter, against float64 and torch's path."""

import contextlib
import math

import pytest
import torch

from hf_precond.compat import devices
from hf_precond.linalg.matrix_functions import pack
from hf_precond.optimizers.afopt.optimizer import NORMS
from hf_precond.registry import create_optimizer
from tests.optimizers.models import batch, make, train_step, weights
from tests.rounding import accelerator

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("interpreted where there is no CUDA device", allow_module_level=True)
kernels = pytest.importorskip("hf_precond.optimizers.base.triton_kernels")
CPU = torch.device("cpu")
FIELDS = {
    "decay": 0.9, "started": False, "noise": 0.3, "length": 5.0, "longest": 2.0, "height": 64.0,
    "nesterov": True, "blocks": 1, "own": 8, "wide": 8,
}  # fmt: skip


def gradients(dtype, bias, count=3, rows=5, columns=6):
    torch.manual_seed(0)
    grads = [torch.randn(rows, columns, dtype=dtype) for _ in range(count)]
    biases = [torch.randn(rows, dtype=dtype) for _ in range(count)] if bias else None
    momentum = torch.zeros(count, rows, 8)
    momentum[..., : columns + bias] = torch.randn(count, rows, columns + bias)
    return grads, biases, momentum


@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [{}, {"started": True}, {"nesterov": False}], ids=str)
def test_the_momentum_and_its_length(values, dtype, bias, block, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", block)
    grads, biases, momentum = gradients(dtype, bias)
    usual, fields, beta = torch.tensor([0.0, 2.0, 40.0]), FIELDS | values, 0.8
    before, old = momentum.double(), usual.double()
    table = kernels.Matrices(grads, biases)
    found, lengths = kernels.advance(table, momentum, usual, 6, beta, **fields)
    whole = torch.zeros(3, 5, 8, dtype=torch.float64)
    whole[..., :6] = torch.stack(grads)
    if bias:
        whole[..., 6] = torch.stack(biases)
    expected = beta * before + (1 - beta) * whole
    torch.testing.assert_close(momentum.double(), expected, rtol=1e-5, atol=1e-6)
    norms = whole[..., :6].flatten(1).norm(dim=1)
    average = old + 0.1 * (norms - old)
    if not fields["started"]:
        average[0] = norms[0]
    torch.testing.assert_close(usual.double(), average, rtol=1e-5, atol=0)
    ratio = expected[..., :6].flatten(1).norm(dim=1) / (average * fields["noise"])
    assert (ratio > 2).any() and (ratio < 2).any()
    right = ratio.clamp(max=2) * fields["length"]
    torch.testing.assert_close(lengths.double(), right[:, None, None], rtol=1e-5, atol=0)
    ahead = expected + (1 / beta - 1) * whole * fields["nesterov"]
    ahead *= 64 / expected.abs().amax((1, 2), keepdim=True)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), ahead, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_stays_out_of_the_average(bad):
    grads, biases, momentum = gradients(torch.float32, True)
    grads[1][2, 3] = bad
    usual = torch.ones(3)
    kernels.advance(kernels.Matrices(grads, biases), momentum, usual, 6, 0.9, **FIELDS)
    assert usual.isfinite().all() and usual[1] == pytest.approx(0.9)
    assert not momentum[1].isfinite().all() and momentum[[0, 2]].isfinite().all()


def test_zeros_stay_zeros():
    momentum, usual = torch.zeros(1, 5, 8), torch.zeros(1)
    table = kernels.Matrices([torch.zeros(5, 6)], None)
    found, lengths = kernels.advance(table, momentum, usual, 6, 0.9, **FIELDS)
    assert not found.any() and not lengths.any() and not usual.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("own", "wide"), [(3, 8), (4, 4), (7, 8)])
def test_blocks_of_columns(own, wide, bias):
    grads, biases, momentum = gradients(torch.float32, bias)
    table, usual = kernels.Matrices(grads, biases), torch.ones(3)
    whole, _ = kernels.advance(table, momentum.clone(), usual.clone(), 6, 0.8, **FIELDS)
    blocks = -(-(6 + bias) // own) + 1  # one of them with no column of its own
    fields = FIELDS | {"blocks": blocks, "own": own, "wide": wide}
    found, _ = kernels.advance(table, momentum, usual, 6, 0.8, **fields)
    assert found.shape == (3, 5, blocks * wide)
    parts = found.unflatten(2, (blocks, wide))
    assert not parts[..., own:].any()
    joined = parts[..., :own].flatten(2)
    assert torch.equal(joined[..., : 6 + bias], whole[..., : 6 + bias])
    assert not joined[..., 6 + bias :].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("own", "wide"), [(3, 8), (8, 8)])
def test_descent(own, wide, dtype, bias):
    weights, biases, _ = gradients(dtype, bias)
    old = torch.stack(weights).double(), torch.stack(biases).double() if bias else None
    blocks = -(-(6 + bias) // own)
    found = torch.randn(3, 5, blocks * wide).half()
    norms, lengths = torch.rand(3) + 0.5, torch.rand(3)
    versions = [tensor._version for tensor in weights]
    table = kernels.Matrices(weights, biases)
    kernels.descend(table, found, norms, lengths, 6, own, wide, (0.5, 0.2, 0.25, 0.1))
    steps = found.double().unflatten(2, (blocks, wide))[..., :own].flatten(2)
    steps = steps * (lengths / norms).double()[:, None, None]
    error = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    right = 0.9 * old[0] - 0.5 * steps[..., :6]
    torch.testing.assert_close(torch.stack(weights).double(), right, **error)
    if bias:
        right = 0.975 * old[1] - 0.25 * steps[..., 6]
        torch.testing.assert_close(torch.stack(biases).double(), right, **error)
    assert all(tensor._version > old for tensor, old in zip(weights, versions, strict=True))


@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_halves_of_gradients(dtype, bias, block, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", block)
    grads, biases, _ = gradients(dtype, bias)
    whole = torch.zeros(3, 8, 16, dtype=torch.float64)
    whole[:, :5, :6] = torch.stack(grads)
    if bias:
        whole[:, :5, 6] = torch.stack(biases)
    table, scales = kernels.Matrices(grads, biases), torch.tensor([1.0, 2.0, 0.5])
    norms = kernels.frobenius_norms(table, 6)
    torch.testing.assert_close(norms.double(), whole.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    found = kernels.halved(table, scales, 6, (8, 16))
    expected = whole * scales[:, None, None]
    torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=1e-7)


def test_the_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernels.trial(CPU)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_steps_of_padded_rows(bias):
    torch.manual_seed(1)
    found, scales = torch.randn(2, 8, 16).half(), torch.rand(2)
    steps, rest = kernels.scaled_steps(found, scales, 6, bias, 5)
    expected = (found.float() * scales[:, None, None])[:, :5]
    torch.testing.assert_close(steps, expected[..., :6].contiguous())
    if bias:
        torch.testing.assert_close(rest, expected[..., 6].contiguous())


@pytest.mark.parametrize("bias", [True, False])
def test_steps_have_the_length(bias):
    torch.manual_seed(1)
    found, scales = torch.randn(2, 5, 8).half(), torch.rand(2)
    steps, rest = kernels.scaled_steps(found, scales, 6, bias)
    expected = found.float() * scales[:, None, None]
    torch.testing.assert_close(steps, expected[..., :6].contiguous())
    assert (rest is not None) == bias
    if bias:
        torch.testing.assert_close(rest, expected[..., 6].contiguous())


@pytest.mark.parametrize("size", [1, 2, 7, 40, 65])
@pytest.mark.parametrize("blocks", [None, 3])
def test_triangles_are_unpacked(size, blocks):
    torch.manual_seed(2)
    whole = torch.randn(2, *([] if blocks is None else [blocks]), size, size)
    whole = whole + whole.mT
    sizes, wide = torch.tensor([2.0, 5.0]), size + -size % 8
    found = kernels.unpacked(pack(whole), sizes, size, wide)
    expected = torch.zeros(*whole.shape[:-2], wide, wide)
    expected[..., :size, :size] = whole / sizes.view(2, *[1] * (whole.dim() - 1))
    assert torch.equal(found, expected.half())


def run(name, model_name, dtype, steps, interpreted, monkeypatch):
    """Losses, and the weights at the end; with float64 on the CPU's path."""
    monkeypatch.setattr(devices, "has_triton", lambda tensor: interpreted)
    model, exact = make(model_name, dtype=dtype), dtype == torch.float64
    with contextlib.nullcontext() if exact else accelerator():
        optimizer = create_optimizer(model, name, lr=1e-3, stat_interval=5, inverse_interval=5)
        losses = [
            train_step(model, optimizer, batch(model_name, step, dtype=dtype))
            for step in range(steps)
        ]
        optimizer.close()
    return losses, weights(model)


@pytest.mark.parametrize("model_name", ["bert", "vit", "llama"])
@pytest.mark.parametrize(("name", "kernel"), [("afopt", "advance"), ("nkfac", "halved")])
def test_steps_are_as_near_to_float64_as_those_of_torchs_operations(
    name, kernel, model_name, monkeypatch
):
    calls, own = [], getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda *a, **k: calls.append(1) or own(*a, **k))
    start = weights(make(model_name, dtype=torch.float64))
    _, exact = run(name, model_name, torch.float64, 3, False, monkeypatch)
    errors = []
    for interpreted in (False, True):
        _, found = run(name, model_name, torch.float32, 3, interpreted, monkeypatch)
        assert bool(calls) == interpreted
        errors.append(
            sum(
                float((found[key] - value).norm() / (value - start[key]).norm())
                for key, value in exact.items()
                if "key.bias" not in key  # its gradient is rounding
            )
        )
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("width", [3, 4, 5, 7])
def test_many_blocks(width, monkeypatch):
    """Of 24 columns and a bias, which may need fewer blocks than the factors have."""
    found = []
    for interpreted in (False, True):
        monkeypatch.setattr(devices, "has_triton", lambda tensor, on=interpreted: on)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Linear(8, 4))
        inputs = torch.randn(16, 24)
        with accelerator():
            optimizer = create_optimizer(model, "afopt", lr=1e-2, max_dim=width)
            for _ in range(3):
                model(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            optimizer.close()
        found.append(weights(model))
    for key, value in found[0].items():
        assert (found[1][key] - value).norm() <= 2e-2 * value.norm(), key


def test_losses_are_those_of_torchs_operations(monkeypatch):
    ours, theirs = (
        run("afopt", "llama", torch.float32, NORMS + 2, interpreted, monkeypatch)[0]
        for interpreted in (True, False)
    )
    assert ours == pytest.approx(theirs, abs=2e-3)


@pytest.mark.parametrize(
    "name", ["advance", "descend", "scaled_steps", "frobenius_norms", "halved", "unpacked"]
)
def test_a_kernel_with_other_results_is_not_used(name, monkeypatch, caplog):
    own = getattr(kernels, name)

    def wrong(*args, **kwargs):
        found = own(*args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        first = args[0].tensors[0] if name == "descend" else first
        first.view(-1)[-1 if name == "frobenius_norms" else 5] += 0.1
        return found

    kernels.trial(CPU)
    monkeypatch.setattr(kernels, name, wrong)
    assert not kernels.usable.__wrapped__(CPU)
    assert "more slowly" in caplog.text


def test_where_they_do_not_compile_torch_takes_the_step(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "advance", lambda *a, **k: 1 / 0)
    assert not kernels.usable.__wrapped__(CPU)
    assert "division by zero" in caplog.text
