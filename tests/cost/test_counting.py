"""Kernels, operations by precision and bytes, against sums by hand."""

import pytest
import torch

from hf_precond.cost.counting import Counts, Kernel
from hf_precond.linalg.products import matmul
from tests.fake_cuda import GPU, Watch, pretended

M, K, N, BATCH = 6, 5, 4, 3


@pytest.fixture(autouse=True)
def gpu():
    with pretended():
        yield


def on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=GPU)


def counted(work):
    with Watch() as watch:
        work()
    return watch.counts


def test_products_are_counted_in_the_precision_of_their_operands():
    a, b, c = on_gpu(M, K), on_gpu(K, N), on_gpu(M, N)
    flops = 2 * M * K * N
    assert counted(lambda: a @ b).flops == {"float32": flops}
    assert counted(lambda: a.bfloat16() @ b.bfloat16()).flops == {"bfloat16": flops}
    assert counted(lambda: torch.addmm(c, a, b)).flops == {"float32": flops}
    # What is added to may be wider than the operands: those say how fast it is.
    half = a.half(), b.half()
    assert counted(lambda: torch.mm(*half, out_dtype=torch.float32)).flops == {"float16": flops}
    stack = on_gpu(BATCH, M, K), on_gpu(BATCH, K, N)
    assert counted(lambda: torch.bmm(*stack)).flops == {"float32": BATCH * flops}
    assert counted(lambda: on_gpu(BATCH, M, N).baddbmm_(*stack)).flops == {"float32": BATCH * flops}


def test_tf32_is_what_the_flag_says_when_the_product_is_started():
    a, b = on_gpu(M, K), on_gpu(K, N)
    for precision, name in (("highest", "float32"), ("tf32", "tf32"), ("bf16", "bfloat16")):
        assert set(counted(lambda p=precision: matmul(a, b, p)).flops) == {name}
    counts = counted(lambda: (matmul(a, b, "tf32"), a @ b))
    assert counts.share("tf32") == 0.5 == counts.share("float32")


def test_factorisations_are_counted_and_said_to_be_such():
    a, b = on_gpu(BATCH, M, M), on_gpu(BATCH, M, N)
    for work, flops in (
        (lambda: torch.linalg.cholesky_ex(a), BATCH * M**3 / 3),
        (lambda: torch.cholesky_inverse(a), BATCH * 2 * M**3 / 3),
        (lambda: torch.linalg.solve_triangular(a, b, upper=False), BATCH * M * M * N),
        (lambda: torch.linalg.eigh(a), BATCH * 9 * M**3),
        (lambda: torch.linalg.qr(a), BATCH * 8 * M**3 / 3),
    ):
        (kernel,) = [k for k in counted(work).kernels if k.flops]
        assert kernel.flops == pytest.approx(flops) and kernel.factorization


def test_bytes_are_what_is_read_and_written():
    a, b, n = on_gpu(M, N), on_gpu(M, N), M * N * 4
    ids, table = on_gpu(M, dtype=torch.int64), on_gpu(1000, N)
    rows = [on_gpu(M, N) for _ in range(8)]
    steps = [on_gpu()]
    for work, moved in (
        (lambda: a + b, 3 * n),
        (lambda: a.add_(b), 3 * n),
        (lambda: a.copy_(b), 2 * n),
        (lambda: a.zero_(), n),
        (lambda: torch.zeros_like(a), n),
        (lambda: a.mT, 0),
        (lambda: a[:1].expand(M, N) + a, 2 * n + n / M),
        (lambda: torch.nn.functional.embedding(ids, table), 2 * n + 8 * M),
        (lambda: torch._foreach_add_(rows[:2], rows[2:4]), 6 * n),
        # Parameter and both moments are read and written, the gradient is read.
        (
            lambda: torch._fused_adamw_(
                rows[:1], rows[1:2], rows[2:3], rows[3:4], [], steps, lr=1.0, beta1=0.9,
                beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            ),
            7 * n + 4,
        ),
    ):  # fmt: skip
        counts = counted(work)
        assert counts.bytes == pytest.approx(moved) and counts.launches == (moved > 0)


def test_a_backward_pass_runs_on_the_device():
    weight = torch.nn.Parameter(on_gpu(N, K))
    seen = []
    with Watch() as watch, torch.enable_grad(), watch.during("passes"):
        output = torch.nn.functional.linear(on_gpu(M, K), weight).relu()
        output.register_hook(lambda gradient: seen.append(gradient.device))
        output[:, 1:].square().sum().backward()
    assert weight.grad.device == GPU and seen == [GPU]
    assert watch.counts.flops == {"float32": 2 * 2 * M * K * N}
    assert {kernel.phase for kernel in watch.records} == {"passes"}
    with pytest.raises(RuntimeError, match="same device"):
        weight.grad + torch.empty(N, K)


def test_an_average_divides_by_the_steps():
    kernels = [Kernel("mm", "step", 8.0, "tf32", 16.0), Kernel("add", "refresh", bytes=4.0)]
    counts = Counts(kernels, steps=4)
    assert (counts.launches, counts.bytes, counts.flops) == (0.5, 5.0, {"tf32": 2.0})
    assert counts.of("refresh").launches == 0.25
    assert counts.by_name() == {"mm": 1, "add": 1}
