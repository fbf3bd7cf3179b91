"""What one operation becomes on a CUDA device, against what traces of an H200 had."""

import pytest
import torch

from hf_precond.cost import kernels
from tests.fake_cuda import GPU, Watch, pretended


@pytest.fixture(autouse=True)
def gpu():
    with pretended():
        yield


def on_gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=GPU)


def only(work):
    """The one operation of some work."""
    with Watch() as watch:
        work()
    (kernel,) = watch.records
    return kernel


def test_a_foreach_launch_is_full_by_blocks_or_by_tensors():
    many = [on_gpu(1) for _ in range(199)]
    # Counters of 199 parameters, 110 a launch; two lists, 64 a launch.
    assert only(lambda: torch._foreach_add_(many, 1.0)).launches == 2
    assert only(lambda: torch._foreach_add_(many, many)).launches == 4
    # 320 blocks of 65,536 numbers: all matrices of a BERT-base's layer kind in two launches.
    large = [on_gpu(768, 3072) for _ in range(12)]
    assert only(lambda: torch._foreach_add_(large, large)).launches == 2
    assert only(lambda: torch._foreach_add_([on_gpu(320 * 65536)], 1.0)).launches == 1
    assert only(lambda: torch._foreach_add_([on_gpu(320 * 65536 + 1)], 1.0)).launches == 2


def test_factorisations_take_dozens_of_launches():
    # A stack's Cholesky factorisation: three kernels for 16 columns (75 for 385 rows were seen,
    # besides a copy, pointers to the matrices, and the triangle).
    root = only(lambda: torch.linalg.cholesky_ex(on_gpu(7, 385, 385)))
    assert (root.launches, root.rows) == (3 * 25 + 3, 385)
    assert root.kind == kernels.FACTORIZATION
    # Up to eight matrices are solved one after the other, more at once.
    few, more = (
        only(
            lambda n=n: torch.linalg.solve_triangular(
                on_gpu(n, 384, 384), on_gpu(n, 384, 9), upper=False
            )
        )
        for n in (6, 9)
    )
    assert (few.launches, few.rows) == (1 + 6 * 4, 6 * 384)
    assert (more.launches, more.rows) == (1 + 4 * 6, 2 * 384)


def test_a_product_that_adds_copies_first():
    stack, out = on_gpu(3, 8, 8, dtype=torch.float16), on_gpu(3, 8, 8, dtype=torch.float16)
    added = only(lambda: torch.baddbmm(out, stack, stack))
    assert (added.launches, added.copied) == (2.5, 2 * 3 * 64 * 2)
    for work in (lambda: torch.bmm(stack, stack), lambda: out.baddbmm_(stack, stack)):
        assert (only(work).launches, only(work).copied) == (1.5, 0)
    bias, matrix = on_gpu(8), on_gpu(8, 8)
    assert only(lambda: torch.addmm(bias, matrix, matrix)).copied == 0
    assert only(lambda: torch.addmm(matrix, matrix, matrix)).copied == 2 * 64 * 4


def test_a_fill_comes_before_what_is_not_zero():
    assert only(lambda: torch.nn.functional.pad(on_gpu(4, 4), (0, 1))).launches == 2
    assert only(lambda: torch.eye(4, device=GPU)).launches == 2


def test_a_large_reduction_clears_memory_first():
    large, small = on_gpu(512, 512), on_gpu(512, 511)
    assert only(lambda: large.sum()).launches == 2
    assert only(lambda: small.sum()).launches == 1
    # Nothing is shared where every row has a block.
    assert only(lambda: on_gpu(2**16, 8).sum(1)).launches == 1


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda a, b, h, s: a + b, "aligned"),
        (lambda a, b, h, s: a.mul_(2.0), "aligned"),
        (lambda a, b, h, s: a.mT + b.mT, "aligned"),
        (lambda a, b, h, s: a.bfloat16(), "aligned"),
        (lambda a, b, h, s: torch.zeros_like(a.mT), "aligned"),
        (lambda a, b, h, s: h.float(), "widened"),
        (lambda a, b, h, s: a + h, "widened"),
        (lambda a, b, h, s: a + b.mT, "strided"),
        (lambda a, b, h, s: a[:, :4] * 2.0, "strided"),
        (lambda a, b, h, s: a * s, "strided"),
        (lambda a, b, h, s: a.mT.contiguous(), "strided"),
        (lambda a, b, h, s: h * s, "converted"),
        (lambda a, b, h, s: a.addcmul_(h, s), "converted"),
        (lambda a, b, h, s: torch.cat([a, b]), "joined"),
        (lambda a, b, h, s: torch._foreach_add_([a], [b]), "lists"),
        (lambda a, b, h, s: a.norm(), "reduced"),
        (lambda a, b, h, s: a.sum(-1), "reduced"),
        (lambda a, b, h, s: a.sum(0), "columns"),
        (lambda a, b, h, s: a.index_select(0, on_gpu(3, dtype=torch.int64)), "picked"),
        (lambda a, b, h, s: torch.nn.functional.pad(a, (0, 1)), "picked"),
        (lambda a, b, h, s: a @ b, "product"),
    ],
)  # fmt: skip
def test_how_an_operation_goes_through_memory(work, kind):
    half, scale = on_gpu(8, 8, dtype=torch.float16), on_gpu(1, 1)
    with Watch() as watch:
        work(on_gpu(8, 8), on_gpu(8, 8), half, scale)
    assert watch.records[-1].kind == kind
