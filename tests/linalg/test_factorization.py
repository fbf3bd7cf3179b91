import pytest
import torch

from hf_precond.linalg import factorization


def spd(batch, n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, n, 2 * n, generator=generator, dtype=torch.float64)
    return (root @ root.mT / (2 * n)).to(dtype)


def test_eigh_descends_and_reconstructs():
    batch = spd(3, 6)
    retries = []
    values, vectors = factorization.eigh(batch, retries.append)
    assert (values[:, :-1] >= values[:, 1:]).all()
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, batch)
    assert retries == []


def test_eigh_of_one_matrix_keeps_its_shape():
    matrix = spd(1, 5)[0]
    values, vectors = factorization.eigh(matrix)
    assert values.shape == (5,) and vectors.shape == (5, 5)
    torch.testing.assert_close(vectors @ values.diag() @ vectors.mT, matrix)


def test_eigh_gives_the_identity_for_a_poisoned_matrix_only():
    batch = spd(3, 4)
    poisoned = batch.clone()
    poisoned[1, 2, 2] = torch.nan
    retries = []
    values, vectors = factorization.eigh(poisoned, retries.append)
    assert retries == ["kept"]
    diagonal = batch[1].diagonal().clone()
    diagonal[2] = 0.0
    assert torch.equal(values[1], diagonal) and torch.equal(vectors[1], torch.eye(4).double())
    for index in (0, 2):
        torch.testing.assert_close(
            vectors[index] @ values[index].diag() @ vectors[index].mT, batch[index]
        )


def test_eigh_without_a_previous_result_falls_back_to_the_identity():
    matrix = torch.diag(torch.tensor([3.0, 1.0, torch.inf]))
    values, vectors = factorization.eigh(matrix)
    assert torch.equal(values, torch.tensor([3.0, 1.0, 0.0]))
    assert torch.equal(vectors, torch.eye(3))


@pytest.mark.parametrize(("retry", "failures"), [("scaled", 2), ("damped", 3), ("float64", 4)])
def test_eigh_is_retried_one_way_after_another(monkeypatch, retry, failures):
    plain, calls = torch.linalg.eigh, []

    def fails_at_first(matrix):
        calls.append(matrix.dtype)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("no convergence")
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_at_first)
    batch = 1e20 * spd(1, 5, dtype=torch.float32)
    retries = []
    values, vectors = factorization.eigh(batch, retries.append)
    assert retries == [retry]
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        vectors @ torch.diag_embed(values) @ vectors.mT, batch, rtol=1e-4, atol=1e15
    )


def test_spd_inverse_is_the_inverse():
    batch = spd(4, 6)
    retries = []
    inverse, failed = factorization.spd_inverse(batch, torch.zeros_like(batch), retries.append)
    torch.testing.assert_close(inverse @ batch, torch.eye(6, dtype=batch.dtype).expand(4, 6, 6))
    assert failed == [] and retries == []


def test_spd_inverse_that_no_float32_can_hold_is_the_previous_one():
    batch = spd(2, 3, dtype=torch.float32)
    batch[1] *= 1e-42
    retries = []
    previous = torch.eye(3).expand(2, 3, 3)
    inverse, failed = factorization.spd_inverse(batch, previous, retries.append)
    assert failed == [1] and retries == ["kept"]
    torch.testing.assert_close(inverse[1], torch.eye(3))
    torch.testing.assert_close(inverse[0], torch.linalg.inv(batch[0]))


@pytest.mark.parametrize(("retry", "failures"), [("scaled", 2), ("damped", 3), ("float64", 4)])
def test_spd_inverse_is_retried_one_way_after_another(monkeypatch, retry, failures):
    plain, calls = torch.linalg.cholesky_ex, []

    def fails_at_first(matrix):
        calls.append(matrix.dtype)
        factor, info = plain(matrix)
        return factor, info + (len(calls) <= failures)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_at_first)
    batch = 1e10 * spd(1, 5, dtype=torch.float32)
    retries = []
    inverse, failed = factorization.spd_inverse(batch, torch.zeros_like(batch), retries.append)
    assert retries == [retry] and failed == []
    torch.testing.assert_close(inverse @ batch, torch.eye(5)[None], rtol=0, atol=1e-3)


def test_spd_inverse_damps_a_singular_matrix_at_rounding_level():
    vector = torch.ones(4, 1, dtype=torch.float32)
    retries = []
    matrix = (vector @ vector.T)[None]
    inverse, failed = factorization.spd_inverse(matrix, torch.eye(4)[None], retries.append)
    assert failed == [] and retries == ["damped"]
    # (11ᵀ + δI)⁻¹ has the eigenvalue 1/(4 + δ) along 1 and 1/δ across.
    shift = 4 * torch.finfo(torch.float32).eps
    across = torch.tensor([1.0, -1.0, 0.0, 0.0]) / 2**0.5
    torch.testing.assert_close(
        across @ inverse[0] @ across * shift, torch.tensor(1.0), rtol=0.2, atol=0
    )


def test_spd_inverse_keeps_the_previous_inverse_of_an_indefinite_matrix():
    batch = torch.stack([torch.eye(3), -torch.eye(3)]).double()
    previous = torch.stack([2 * torch.eye(3), 5 * torch.eye(3)]).double()
    retries = []
    inverse, failed = factorization.spd_inverse(batch, previous, retries.append)
    assert failed == [1] and retries == ["kept"]
    assert torch.equal(inverse[0], batch[0]) and torch.equal(inverse[1], previous[1])


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.linalg.LinAlgError("linalg.eigh: failed to converge"), "solver"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling …"), "solver"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: …"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …"), "out_of_memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("expected scalar type Half"), None),
    ],
)
def test_the_cause_of_an_error(error, found):
    assert factorization.cause(error) == found


def test_an_error_of_another_kind_is_raised(monkeypatch):
    def fails(matrices):
        raise RuntimeError("expected scalar type Half")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(RuntimeError, match="scalar type"):
        factorization.eigh(spd(1, 3))


def test_eigh_that_runs_out_of_memory_is_retried(monkeypatch):
    plain, calls = torch.linalg.eigh, []

    def fails_at_first(matrix):
        calls.append(matrix.dtype)
        if len(calls) <= 2:
            raise torch.OutOfMemoryError("out of memory")
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_at_first)
    retries = []
    matrix = spd(1, 5)
    values, vectors = factorization.eigh(matrix, retries.append)
    assert retries == ["scaled"]
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrix)
