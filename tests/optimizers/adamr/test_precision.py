"""AdamR with products rounded as an accelerator rounds them, against float64."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from hf_precond.linalg import eigenbasis
from hf_precond.linalg.banded import add_lower_product
from tests.optimizers.adamr.cases import adamr, layers, orthogonal, run
from tests.rounding import accelerator


def gradients(condition, steps, size=48):
    """Noise whose left factor has a condition number, in a basis that is not the axes'."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -0.5 * math.log10(condition), size, dtype=torch.float64)
    left, right = orthogonal(size, 1), orthogonal(size, 2)
    for _ in range(steps):
        sample = torch.randn(size, size, generator=generator, dtype=torch.float64)
        yield left @ (scale[:, None] * sample) @ right.T


@pytest.mark.parametrize("direction", ["adam", "sign"])
@pytest.mark.parametrize(
    ("condition", "precision", "least"),
    [(c, "auto", 0.999) for c in (1.0, 1e2, 1e4)]
    + [(1e6, "auto", 0.99), (1e6, "highest", 0.99999), (1e2, "bf16", 0.99)],
)
def test_the_direction_of_a_step_is_that_of_float64(condition, precision, least, direction):
    """Steps with a refresh of either side and with none, from the same state."""
    seen = list(gradients(condition, 24))
    (exact,) = layers(torch.zeros(48, 48, dtype=torch.float64))
    fields = {"lr": 1.0, "basis_tolerance": 0.0, "stat_decay": 0.9, "direction": direction}
    optimizer = adamr([exact], **fields)
    run(optimizer, [exact], [[g] for g in seen[:20]])
    for gradient in seen[20:]:
        (rounded,) = layers(exact.weight.detach().float())
        copy = adamr([rounded], **fields, precision=precision)
        copy.load_state_dict(optimizer.state_dict())
        before = exact.weight.detach().clone()
        run(optimizer, [exact], [[gradient]])
        with accelerator():
            run(copy, [rounded], [[gradient.float()]])
        steps = [(w.weight.detach().double() - before).flatten() for w in (exact, rounded)]
        assert cosine_similarity(*steps, dim=0) >= least


def test_in_tf32_a_basis_stays_orthogonal_over_200_refreshes():
    size, generator = 32, torch.Generator().manual_seed(0)
    scale = torch.arange(1, size + 1.0).pow(-1.5)
    eye = torch.eye(size)
    basis, factor = eye[None], torch.zeros(1, size, size)
    rotations, bases = [], []
    with accelerator():
        for number in range(200):
            noise = scale[:, None] * torch.randn(size, 8, generator=generator)
            root = basis.mT @ noise
            factor = add_lower_product(factor, root, root.mT, beta=0.6, alpha=0.4)
            rotation, factor = eigenbasis.refresh(factor, precision="auto")
            change = eigenbasis.change_of(rotation, "auto")
            assert change is not None
            basis = eigenbasis.rotate("right", rotation, basis, change, True)
            if number % 8 == 0:
                basis = eigenbasis.orthonormal(basis)
            rotations.append(rotation)
            bases.append(basis)
    # The rotation's own products are exact. TF32 rounds a basis's by 2^-11, and it is corrected at
    # every eighth refresh.
    for found, most in ((torch.cat(rotations), 2e-5), (torch.cat(bases), 8 * 2**-11)):
        miss = torch.linalg.matrix_norm(found.mT.double() @ found.double() - eye, ord=2)
        assert miss.max() <= most


@pytest.mark.parametrize("size", [32, 300])
def test_a_factor_refreshed_in_tf32_errs_in_proportion_to_its_eigenvalues(size):
    """Over eight decades: an entry by some thousandths of ``√(B_ii B_jj)``, so small ones keep."""
    generator = torch.Generator().manual_seed(0)
    values = torch.logspace(0, -8, size, dtype=torch.float64)
    noise = torch.randn(size, 4 * size, generator=generator, dtype=torch.float64)
    factor = values.sqrt()[:, None] * (noise @ noise.mT) * values.sqrt() / (4 * size)
    with accelerator():
        rotation, found = eigenbasis.refresh(factor[None].float(), precision="auto")
    exact = rotation.double().mT @ factor @ rotation.double()
    own = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    miss = (found.double() - exact).abs() / (own[..., None] * own[..., None, :])
    assert miss.tril().max() <= 1e-2
