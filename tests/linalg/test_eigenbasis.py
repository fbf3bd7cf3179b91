import pytest
import torch

from hf_precond.linalg import banded, eigenbasis


def symmetric(batch, n, seed=0, spread=1.0, dtype=torch.float64):
    """Random bases around eigenvalues 1, 1/2^spread, 1/3^spread, …"""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=torch.float64))[0]
    values = torch.arange(1, n + 1, dtype=torch.float64).pow(-spread)
    matrix = basis @ (values[:, None] * basis.mT)
    return ((matrix + matrix.mT) / 2).to(dtype), values


def test_the_first_basis_diagonalises_in_descending_order():
    matrix, values = symmetric(3, 7)
    basis, rotated = eigenbasis.eigenbasis(matrix)
    torch.testing.assert_close(rotated, torch.diag_embed(values).expand(3, 7, 7))
    torch.testing.assert_close(basis.mT @ matrix @ basis, rotated)


def test_two_by_two_is_exact_after_one_refresh():
    matrix = torch.tensor([[[1.0, 0.7], [0.7, -2.0]], [[2.0, 0.3], [0.3, 2.0]]]).double()
    rotation, rotated = eigenbasis.refresh(matrix)
    assert rotated[:, 0, 1].abs().max() < 1e-15
    torch.testing.assert_close(
        rotated.diagonal(dim1=-2, dim2=-1).sort().values, torch.linalg.eigvalsh(matrix)
    )
    torch.testing.assert_close(rotation.mT @ matrix @ rotation, rotated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_a_few_roundings_apart_give_a_rotation(dtype):
    """In float32 some of a thousand eigenvalues always are; a pair once lost never comes back."""
    size = 24
    steps = torch.stack([torch.arange(size), torch.arange(size).flip(0), torch.zeros(size)])
    values = 1 + steps.to(dtype) * torch.finfo(dtype).eps
    noise = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = torch.diag_embed(values) + 0.01 * (noise + noise.mT).tril(-1)
    rotation, _ = eigenbasis.refresh(matrix)
    eye = torch.eye(size, dtype=dtype).expand(3, size, size)
    torch.testing.assert_close(rotation.mT @ rotation, eye, rtol=0, atol=1e-5)


def test_a_refresh_squares_a_small_error():
    _, values = symmetric(2, 8)
    noise = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    energies = []
    for size in (1e-3, 1e-4):
        nearly = torch.diag_embed(values.expand(2, 8)) + size * (noise + noise.mT) / 2
        _, rotated = eigenbasis.refresh(nearly)
        energies.append(float(eigenbasis.off_diagonal_energy(rotated).max()) ** 0.5)
    # A tenth of the error becomes a hundredth (a linear method: a tenth).
    assert energies[1] < energies[0] / 50


def test_sweeps_converge_from_a_basis_that_is_wrong_altogether():
    matrix, values = symmetric(3, 24)
    total = torch.eye(24, dtype=torch.float64).expand(3, 24, 24)
    rotated, energies = matrix, []
    for _ in range(14):
        rotation, rotated = eigenbasis.refresh(rotated)
        total = total @ rotation
        energies.append(float(eigenbasis.off_diagonal_energy(rotated).max()))
    assert energies[-1] < 1e-20, energies
    torch.testing.assert_close(total.mT @ matrix @ total, rotated)
    eigenvalues = rotated.diagonal(dim1=-2, dim2=-1).sort(descending=True).values
    torch.testing.assert_close(eigenvalues, values.expand(3, 24))


def test_float32_finds_the_subspaces_of_float64():
    """Spectrum over ten decades: the leading and trailing halves agree in both precisions."""
    matrix, _ = symmetric(1, 16, spread=3.0)
    bases = []
    for dtype in (torch.float32, torch.float64):
        basis, rotated = eigenbasis.eigenbasis(matrix.to(dtype))
        for _ in range(3):
            rotation, rotated = eigenbasis.refresh(rotated)
            basis = basis @ rotation
        bases.append(basis.double()[0])
    for columns in (slice(0, 8), slice(8, 16)):
        cosines = torch.linalg.svdvals(bases[0][:, columns].T @ bases[1][:, columns])
        assert cosines.min() > 1 - 1e-5


@pytest.mark.parametrize("sweeps", [1, 2])
def test_basis_stays_orthogonal_over_a_thousand_refreshes_in_float32(sweeps):
    generator = torch.Generator().manual_seed(0)
    n = 32
    scale = torch.arange(1, n + 1.0).pow(-1.5)
    basis, factor = torch.eye(n)[None], torch.zeros(1, n, n)
    for number in range(1000):
        gradient = basis.mT @ (scale[:, None] * torch.randn(n, 8, generator=generator))
        factor = 0.6 * factor + 0.4 * gradient @ gradient.mT
        rotation, factor = eigenbasis.refresh(factor, sweeps)
        basis = basis @ rotation
        if number % 8 == 0:
            basis = eigenbasis.orthonormal(basis)
    assert (basis.mT @ basis - torch.eye(n)).norm() < 1e-5


def test_rank_deficient_factors_keep_an_orthogonal_basis():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 64, 4, generator=generator)
    factor = root @ root.mT
    rotation, rotated = eigenbasis.refresh(factor, sweeps=2)
    eye = torch.eye(64).expand(2, 64, 64)
    torch.testing.assert_close(rotation.mT @ rotation, eye, rtol=0, atol=1e-5)
    assert torch.isfinite(rotated).all()


def test_diagonal_matrices_are_left_alone_whatever_their_order():
    values = torch.tensor([[1.0, 5.0, 0.0, 3.0, 3.0]])
    rotation, rotated = eigenbasis.refresh(torch.diag_embed(values))
    assert torch.equal(rotation, torch.eye(5)[None])
    assert torch.equal(rotated, torch.diag_embed(values))


def test_a_matrix_that_is_not_finite_keeps_its_basis_and_disturbs_no_other():
    matrix, _ = symmetric(3, 6)
    alone, _ = eigenbasis.refresh(matrix)
    poisoned = matrix.clone()
    poisoned[1, 3, :] = poisoned[1, :, 3] = torch.nan
    rotation, _ = eigenbasis.refresh(poisoned)
    assert torch.equal(rotation[1], torch.eye(6).double())
    assert torch.equal(rotation[0], alone[0]) and torch.equal(rotation[2], alone[2])


def test_overlap_is_doubly_stochastic_and_a_permutation_for_a_swap():
    matrix, _ = symmetric(1, 6)
    rotation, _ = eigenbasis.refresh(matrix, sweeps=3)
    share = eigenbasis.overlap(rotation)
    ones = torch.ones(1, 6, dtype=torch.float64)
    torch.testing.assert_close(share.sum(1), ones)
    torch.testing.assert_close(share.sum(2), ones)
    swap = torch.eye(6)[[1, 0, 2, 3, 4, 5]] * torch.tensor([1, -1, 1, 1, 1, 1.0])
    assert torch.equal(eigenbasis.overlap(swap), swap.abs())


def test_off_diagonal_energy():
    matrix = torch.tensor([[[3.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]], [[0, 0], [0, 0]]])
    expected = torch.tensor([2 / 12, 0.0, 0.0])
    torch.testing.assert_close(eigenbasis.off_diagonal_energy(matrix), expected)


def test_wide_matrices_in_bands_are_refreshed_as_in_one_piece(monkeypatch):
    matrix, _ = symmetric(1, 300)
    rotation, rotated = eigenbasis.refresh(matrix, sweeps=2)
    monkeypatch.setattr(banded, "bands", lambda size: ((0, size),))
    monkeypatch.setattr(eigenbasis, "banded_size", lambda size: size**2)
    expected, whole = eigenbasis.refresh(matrix, sweeps=2)
    torch.testing.assert_close(rotation, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(rotated, whole, rtol=0, atol=1e-10)
