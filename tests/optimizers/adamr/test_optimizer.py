"""AdamR's step against closed forms, an explicit reference and AdamW."""

import math

import pytest
import torch
from torch import nn

from hf_precond.linalg import eigenbasis
from hf_precond.optimizers.adamr.batch import Batch
from hf_precond.optimizers.adamr.refresh import RefreshItem
from hf_precond.optimizers.base.parameters import ParamView
from tests.optimizers.adamr.cases import adamr, layers, noise, orthogonal, run

SHAPES = [(7, 7), (6, 9), (9, 6), (4, 20), (20, 4), (1, 5), (5, 1)]


def start(*shapes, seed=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("shape", [*SHAPES, (6, 3, 2, 2)])
def test_identity_basis_is_torch_adamw(shape):
    (weight,) = start(shape)
    ours, plain = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    module = nn.Module()
    module.weight = ours
    optimizer = adamr([module], basis="identity", lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1)
    for (gradient,) in noise(shape, steps=50):
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert (ours - plain).abs().max() <= 1e-12


class Explicit:
    """The step of one matrix, both factors kept in the coordinates of the weight."""

    def __init__(
        self,
        weight,
        left=True,
        right=True,
        interval=4,
        decay=0.95,
        lr=1e-2,
        wd=0.1,
        floor=1e-4,
        transport="overlap",
        betas=(0.9, 0.999),
        eps=1e-8,
        every=1,
    ):
        self.weight, self.lr, self.wd, self.floor = weight.clone(), lr, wd, floor
        self.betas, self.eps, self.decay, self.interval = betas, eps, decay, interval
        self.sides, self.transport = {"left": left, "right": right}, transport
        self.first, self.second = torch.zeros_like(weight), torch.zeros_like(weight)
        sizes = {"left": weight.shape[0], "right": weight.shape[1]}
        self.factor = {s: torch.zeros(n, n, dtype=weight.dtype) for s, n in sizes.items()}
        self.basis = {s: torch.eye(n, dtype=weight.dtype) for s, n in sizes.items()}
        self.steps, self.calls, self.every = 0, 0, every
        self.updates = {"left": 0, "right": 0}

    def step(self, gradient, phases):
        self.calls += 1
        moments = {"left": gradient @ gradient.T, "right": gradient.T @ gradient}
        for side, shift in (("left", 0), ("right", self.every // 2)):
            if self.calls <= 2 or (self.steps + shift) % self.every == 0:
                self.updates[side] += 1
                keep = min(self.decay, 1 - 1 / self.updates[side])
                self.factor[side].lerp_(moments[side], 1 - keep)
        if self.calls == 1:
            return
        for side, on in self.sides.items():
            t = self.steps
            early = t < self.interval and t in ((0, 1, 4, 16) if side == "left" else (0, 2, 8))
            if on and (early or (t >= self.interval and t % self.interval == phases[side])):
                self.refresh(side)
        self.steps += 1
        left, right = self.basis["left"], self.basis["right"]
        rotated = left.T @ gradient @ right
        beta1, beta2 = self.betas
        self.first = beta1 * self.first + (1 - beta1) * rotated
        self.second = beta2 * self.second + (1 - beta2) * rotated**2
        first = self.first / (1 - beta1**self.steps)
        second = (self.second / (1 - beta2**self.steps)).sqrt()
        lowest = self.floor * second.square().mean().sqrt()
        direction = first / (torch.maximum(second, lowest) + self.eps)
        self.weight = (1 - self.lr * self.wd) * self.weight
        self.weight = self.weight - self.lr * left @ direction @ right.T

    def refresh(self, side):
        old = self.basis[side]
        seen = (old.T @ self.factor[side] @ old)[None]
        if self.steps == 0:
            rotation = eigenbasis.eigenbasis(seen)[0][0]
        else:
            rotation = eigenbasis.refresh(seen)[0][0]
        self.basis[side] = old @ rotation
        share = rotation.square()
        moves = self.transport == "overlap" or self.steps < self.interval
        if side == "left":
            self.first = rotation.T @ self.first
            self.second = share.T @ self.second if moves else self.second
        else:
            self.first = self.first @ rotation
            self.second = self.second @ share if moves else self.second
        if not moves:
            beta1, beta2 = self.betas
            ratio = (1 - beta2**self.steps) / (1 - beta1**self.steps) ** 2
            self.second = torch.maximum(self.second, self.first**2 * ratio)


@pytest.mark.parametrize(("transport", "every"), [("overlap", 1), ("permute", 1), ("permute", 3)])
@pytest.mark.parametrize(
    ("shape", "basis"),
    [((7, 7), "two_sided"), ((6, 9), "two_sided"), ((9, 6), "two_sided"), ((7, 7), "one_sided"),
     ((6, 9), "one_sided"), ((9, 6), "one_sided"), ((4, 20), "one_sided"), ((20, 4), "one_sided")],
)  # fmt: skip
def test_step_equals_the_explicit_one(shape, basis, transport, every):
    weights = start(shape, shape, shape)
    modules = layers(*weights)
    optimizer = adamr(
        modules,
        basis=basis,
        basis_interval=4,
        lr=1e-2,
        weight_decay=0.1,
        transport=transport,
        basis_tolerance=0.0,
        stat_interval=every,
    )
    left = basis == "two_sided" or shape[0] <= shape[1]
    right = basis == "two_sided" or shape[0] > shape[1]
    explicit = [Explicit(w, left, right, transport=transport, every=every) for w in weights]
    for gradients in noise(shape, shape, shape, steps=30):
        run(optimizer, modules, [gradients])
        for reference, module, gradient in zip(explicit, modules, gradients, strict=True):
            state = optimizer.state[module.weight]
            phases = {side: state.get(f"{side}_phase") for side in ("left", "right")}
            reference.step(gradient, phases)
    for reference, module in zip(explicit, modules, strict=True):
        torch.testing.assert_close(module.weight.data, reference.weight, rtol=0, atol=1e-9)


def test_first_call_changes_no_rotated_matrix_and_steps_the_others():
    modules = [*layers(*start((5, 5))), nn.LayerNorm(5, bias=False, dtype=torch.float64)]
    before = [module.weight.detach().clone() for module in modules]
    optimizer = adamr(modules[:1])
    optimizer.add_param_group({"params": [modules[1].weight]})
    modules[0].weight.grad = torch.ones(5, 5, dtype=torch.float64)
    modules[1].weight.grad = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(modules[0].weight, before[0])
    assert not torch.equal(modules[1].weight, before[1])
    state = optimizer.state[modules[0].weight]
    assert state["left_updates"] == 1 and state["step"] == 0


def test_second_step_is_the_polar_factor():
    """In the basis of a constant gradient Adam's first step is ``-lr U Vᵀ``, G = U Σ Vᵀ."""
    (weight,) = start((6, 6))
    gradient = start((6, 6), seed=5)[0]
    (module,) = layers(weight)
    optimizer = adamr([module], lr=1e-2, floor=0.0, eps=1e-8)
    run(optimizer, [module], [[gradient]] * 2)
    u, _, vh = torch.linalg.svd(gradient)
    torch.testing.assert_close(module.weight.data, weight - 1e-2 * u @ vh, rtol=0, atol=1e-7)


def test_in_a_fixed_basis_it_is_adamw_of_the_rotated_problem(monkeypatch):
    """On f(UᵀWV) from U W₀ Vᵀ the path is U (AdamW's path of f) Vᵀ, decay included."""
    left, right = orthogonal(6, 1), orthogonal(9, 2)
    bases = [left, right]

    def fixed(factor, count=None):
        return bases.pop(0)[None], factor

    monkeypatch.setattr(eigenbasis, "eigenbasis", fixed)
    (weight,) = start((6, 9))
    (module,) = layers(left @ weight @ right.T)
    fields = {"lr": 2e-2, "weight_decay": 0.1}
    optimizer = adamr([module], basis="two_sided", basis_interval=1000, floor=0.0, **fields)

    def once(batches):
        first = [batch for batch in batches if not batch.number("step")]
        return [RefreshItem(batch, 0, 0, (), ("left", "right")) for batch in first]

    monkeypatch.setattr(optimizer.rotated.bases, "due", once)
    plain = nn.Parameter(weight.clone())
    reference = torch.optim.AdamW([plain], **fields)
    curvature = torch.logspace(0, 4, 54, dtype=torch.float64).reshape(6, 9)
    for step in range(101):
        seen = left.T @ module.weight.data @ right
        run(optimizer, [module], [[left @ (curvature * seen) @ right.T]])
        if step:  # AdamR's first call collects statistics only
            plain.grad = curvature * plain.data
            reference.step()
    path = left @ plain.data @ right.T
    assert (module.weight.data - path).abs().max() < 1e-11


def equivariance(shape, left, right, steps=40, **fields):
    """Distance between the path from U W₀ Vᵀ, seen rotated back, and the path from W₀."""
    ends = []
    eyes = torch.eye(shape[0]).double(), torch.eye(shape[1]).double()
    for rows, columns in (eyes, (left, right)):
        (weight,) = start(shape)
        (module,) = layers(rows @ weight @ columns.T)
        optimizer = adamr([module], lr=1e-2, weight_decay=0.1, **fields)
        for (shake,) in noise(shape, steps=steps):
            seen = rows.T @ module.weight.data @ columns
            run(optimizer, [module], [[rows @ (seen + shake) @ columns.T]])
        ends.append(rows.T @ module.weight.data @ columns)
    return float((ends[0] - ends[1]).abs().max())


@pytest.mark.parametrize("transport", ["overlap", "permute"])
@pytest.mark.parametrize("interval", [1, 5])
def test_two_sided_is_equivariant(interval, transport):
    """Rotating the problem rotates the path: no axis is special."""
    left, right = orthogonal(7, 1), orthogonal(7, 2)
    fields = {"basis": "two_sided", "basis_interval": interval, "transport": transport}
    assert equivariance((7, 7), left, right, **fields) < 1e-8


def test_one_sided_is_equivariant_on_its_side_only():
    rows, columns, eye = orthogonal(6, 1), orthogonal(9, 2), torch.eye(9, dtype=torch.float64)
    fields = {"basis": "one_sided", "basis_interval": 5}
    assert equivariance((6, 9), rows, eye, **fields) < 1e-8
    assert equivariance((6, 9), torch.eye(6).double(), columns, **fields) > 1e-2


def test_identity_is_not_equivariant():
    rows, columns = orthogonal(7, 1), orthogonal(7, 2)
    assert equivariance((7, 7), rows, columns, basis="identity") > 1e-2


def test_elongated_two_sided_is_equivariant_once_the_first_basis_has_full_rank():
    """The first basis holds two gradients, so R (9 x 9) has no null space left to be arbitrary."""
    rows, columns = orthogonal(6, 1), orthogonal(9, 2)
    fields = {"basis": "two_sided", "basis_interval": 5}
    assert equivariance((6, 9), rows, columns, **fields) < 1e-8


def test_basis_reaches_the_full_matrix_bound():
    """Σ √(QᵀCQ)_ii = tr C^½ at the eigenbasis, less than at any other."""
    root = start((12, 20))[0]
    covariance = root @ root.T
    basis, _ = eigenbasis.eigenbasis(covariance[None])

    def bound(q):
        return float((q.T @ covariance @ q).diagonal().sqrt().sum())

    best = float(torch.linalg.eigvalsh(covariance).sqrt().sum())
    assert math.isclose(bound(basis[0]), best, rel_tol=1e-12)
    others = [bound(orthogonal(12, seed)) for seed in range(20)] + [bound(torch.eye(12).double())]
    assert min(others) > best * 1.01


def test_a_refresh_moves_no_momentum_and_keeps_the_sum_of_the_second_moment():
    shape = (6, 9)
    (module,) = layers(*start(shape))
    optimizer = adamr([module], basis="two_sided", basis_interval=10)
    run(optimizer, [module], noise(shape, steps=7))
    state = optimizer.state[module.weight]

    def momentum():
        return (state["left_basis"] @ state["exp_avg"] @ state["right_basis"].mT)[0].clone()

    before, total = momentum(), float(state["exp_avg_sq"].sum())
    bases = state["left_basis"].clone(), state["right_basis"].clone()
    view = ParamView(module.weight, module.weight.grad, state, "", optimizer.param_groups[0])
    batch = Batch([view], optimizer.rotated.tiling(view))
    for side in ("left", "right"):
        optimizer.rotated.bases.refresh([RefreshItem(batch, 0, 0, (), (side,))])
    assert not torch.allclose(bases[0], state["left_basis"], atol=1e-3)
    assert not torch.allclose(bases[1], state["right_basis"], atol=1e-3)
    torch.testing.assert_close(momentum(), before)
    assert math.isclose(float(state["exp_avg_sq"].sum()), total, rel_tol=1e-12)
    assert (state["exp_avg_sq"] >= 0).all()


def test_a_swap_of_two_columns_permutes_the_second_moment():
    swap = torch.eye(5, dtype=torch.float64)[[0, 3, 2, 1, 4]]
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    rotation = (swap * signs)[None]
    second = start((5, 8))[0].square()[None]
    moved = eigenbasis.rotate("left", eigenbasis.overlap(rotation), second)
    assert torch.equal(moved, second[:, [0, 3, 2, 1, 4]])
    columns = eigenbasis.rotate("right", eigenbasis.overlap(rotation), second.mT)
    assert torch.equal(columns, second.mT[:, :, [0, 3, 2, 1, 4]])


@pytest.mark.parametrize("basis", ["two_sided", "one_sided"])
def test_gradients_of_low_rank_give_no_large_step_in_float32(basis):
    generator = torch.Generator().manual_seed(0)
    (module,) = layers(torch.zeros(64, 256))
    optimizer = adamr([module], basis=basis, lr=1.0)
    largest = 0.0
    for _ in range(20):
        before = module.weight.detach().clone()
        down = torch.randn(16, 256, generator=generator)
        run(optimizer, [module], [[torch.randn(64, 16, generator=generator) @ down]])
        largest = max(largest, float((module.weight.data - before).square().mean().sqrt()))
    assert 0.1 < largest <= 2.0


def test_without_the_floor_a_rounding_error_becomes_a_full_step():
    """The control of the floor: a gradient that is the same at every step, in float32."""
    gradient = start((32, 32), seed=1)[0].float()
    sizes = {}
    for floor in (0.0, 1e-4):
        (module,) = layers(torch.zeros(32, 32))
        optimizer = adamr([module], floor=floor, lr=1.0, eps=1e-12)
        run(optimizer, [module], [[gradient]] * 2)
        sizes[floor] = float(module.weight.norm())
    # The polar factor has the norm √32.
    assert math.isclose(sizes[1e-4], math.sqrt(32), rel_tol=0.03)
    assert sizes[0.0] > 1.5 * math.sqrt(32)


def test_zero_gradient_only_decays():
    (weight,) = start((6, 6))
    (module,) = layers(weight)
    optimizer = adamr([module], lr=1e-2, weight_decay=0.5)
    run(optimizer, [module], [[torch.zeros_like(weight)]] * 6)
    torch.testing.assert_close(module.weight.data, weight * (1 - 1e-2 * 0.5) ** 5)


def test_scaling_the_loss_leaves_the_path_unchanged():
    ends = []
    for scale in (1.0, 1e3):
        (module,) = layers(*start((6, 9)))
        optimizer = adamr([module], basis="two_sided", eps=0.0)
        run(optimizer, [module], [[scale * g] for (g,) in noise((6, 9), steps=20)])
        ends.append(module.weight.data)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)
