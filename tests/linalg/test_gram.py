"""Second moments computed from one triangle."""

import pytest
import torch

from hf_precond.linalg.gram import gram, strips_for


def rows_of(count, size, seed=0, dtype=torch.float64):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("strips", [None, 1, 2, 3, 7, 50])
@pytest.mark.parametrize("shape", [(20, 7), (5, 12), (1, 1), (0, 4), (3, 0), (40, 150), (300, 260)])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_the_whole_product(shape, strips, weighted):
    rows = rows_of(*shape)
    weights = rows_of(shape[0], 1, seed=1).abs()[:, 0] if weighted else None
    expected = rows.T @ (rows if weights is None else weights.diag() @ rows)
    found = gram(rows, weights, strips=strips)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strips", [1, 3])
def test_writes_into_a_view(strips):
    rows, held = rows_of(30, 8), torch.full((9, 9), 5.0, dtype=torch.float64)
    gram(rows, out=held[:8, :8], strips=strips)
    torch.testing.assert_close(held[:8, :8], rows.T @ rows)
    assert (held[8] == 5).all() and (held[:, 8] == 5).all()


def test_strips_only_where_they_pay():
    cpu = torch.device("cpu")
    assert strips_for(4096, 16, cpu) == 1
    assert strips_for(100, 1000, cpu) == 1
    assert strips_for(4096, 100, cpu) == 2
    assert strips_for(4096, 1536, cpu) == 8
    assert strips_for(4096, 384, torch.device("cuda")) == 1
