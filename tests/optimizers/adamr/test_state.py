"""What AdamR keeps: checkpoints, batching, missing gradients, dtypes, refreshes, failures."""

import copy
import io

import pytest
import torch
from torch import nn

from hf_precond.architectures.structure import LayerMatrix, ModelStructure
from hf_precond.linalg import factorization
from hf_precond.optimizers.adamr import refresh
from hf_precond.optimizers.adamr.batch import Batch
from hf_precond.optimizers.adamr.config import AdamRConfig
from hf_precond.optimizers.adamr.optimizer import AdamR
from hf_precond.optimizers.adamr.refresh import RefreshItem
from hf_precond.optimizers.adamr.rotated_adam import RotatedAdamFallback
from hf_precond.optimizers.adamr.tiling import Tiling
from hf_precond.optimizers.base.fallback import make_fallback
from hf_precond.optimizers.base.refresh import FailureRecord, ShardedRefresh
from hf_precond.optimizers.nkfac.config import NKFACConfig
from hf_precond.statistics.requests import Statistic, StatisticsSource
from tests.optimizers.adamr.cases import adamr, experts, layers, noise, run

SHAPES = [(7, 7), (7, 7), (6, 40), (40, 6), (7, 7)]


def zeros(*shapes, dtype=torch.float64):
    return layers(*[torch.zeros(*shape, dtype=dtype) for shape in shapes])


@pytest.mark.parametrize("steps", [1, 2, 5, 13])
def test_state_round_trips_in_the_middle_of_an_interval(steps):
    gradients = noise(*SHAPES, steps=25)
    modules = zeros(*SHAPES)
    optimizer = adamr(modules, basis_interval=4, basis_tolerance=0.05)
    run(optimizer, modules, gradients[:steps])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    others = layers(*[module.weight.data for module in modules])
    resumed = adamr(others, basis_interval=4, basis_tolerance=0.05)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    run(optimizer, modules, gradients[steps:])
    run(resumed, others, gradients[steps:])
    for ours, theirs in zip(modules, others, strict=True):
        assert torch.equal(ours.weight, theirs.weight)


def test_a_deep_copy_steps_alike():
    modules = zeros(*SHAPES)
    optimizer = adamr(modules, basis_interval=4)
    gradients = noise(*SHAPES, steps=12)
    run(optimizer, modules, gradients[:6])
    optimizer2, modules2 = copy.deepcopy((optimizer, modules))
    run(optimizer, modules, gradients[6:])
    run(optimizer2, modules2, gradients[6:])
    for ours, theirs in zip(modules, modules2, strict=True):
        assert torch.equal(ours.weight, theirs.weight)


def test_one_batch_or_one_by_one_is_the_same(monkeypatch):
    # Which refresh makes a basis orthogonal again depends on what else there is.
    monkeypatch.setattr(refresh, "ORTHOGONALIZE_EVERY", 1)
    together, alone = zeros(*SHAPES), zeros(*SHAPES)
    gradients = noise(*SHAPES, steps=20)
    run(adamr(together, basis_interval=1), together, gradients)
    for number, module in enumerate(alone):
        run(adamr([module], basis_interval=1), [module], [[g[number]] for g in gradients])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-10)


def test_a_matrix_without_a_gradient_waits_and_disturbs_no_other():
    gradients = noise(*SHAPES, steps=20)
    missing = [
        [None if (n == 1 and s % 3 == 0) else g for n, g in enumerate(step)]
        for s, step in enumerate(gradients)
    ]
    modules, alone = zeros(*SHAPES), zeros(SHAPES[1])
    run(adamr(modules, basis_interval=1), modules, missing)
    run(adamr(alone, basis_interval=1), alone, [[s[1]] for s in missing if s[1] is not None])
    torch.testing.assert_close(modules[1].weight, alone[0].weight, rtol=0, atol=1e-10)
    whole = zeros(*SHAPES)
    run(adamr(whole, basis_interval=1), whole, gradients)
    torch.testing.assert_close(modules[0].weight, whole[0].weight, rtol=0, atol=1e-10)


def test_rows_of_an_embedding_that_were_not_read_need_no_rotation(monkeypatch):
    """A table of which a step reads few rows steps as any matrix with that gradient."""
    gradients = noise((500, 8), steps=12)
    for number, (gradient,) in enumerate(gradients):
        unread = torch.ones(500, dtype=torch.bool)
        unread[number % 3 :: 11] = False
        gradient[unread] = 0.0
    tables = [nn.Embedding(500, 8, dtype=torch.float64) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    run(adamr(tables[:1], weight_decay=0.1), tables[:1], gradients)
    monkeypatch.setattr(Batch, "rows_read", lambda self, gradient: None)
    run(adamr(tables[1:], weight_decay=0.1), tables[1:], gradients)
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=0, atol=1e-10)


def test_a_convolution_equals_the_reshaped_matrix():
    convolution = nn.Conv2d(3, 6, 2, bias=False, dtype=torch.float64)
    (linear,) = layers(convolution.weight.detach().flatten(1))
    gradients = noise((6, 3, 2, 2), steps=15)
    run(adamr([convolution], basis_interval=3), [convolution], gradients)
    run(adamr([linear], basis_interval=3), [linear], [[g.flatten(1)] for (g,) in gradients])
    torch.testing.assert_close(convolution.weight.flatten(1), linear.weight, rtol=0, atol=1e-12)


def test_groups_of_a_convolution_step_as_matrices_of_their_own():
    convolution = nn.Conv2d(6, 8, 2, groups=2, bias=False, dtype=torch.float64)
    halves = layers(*[half.detach().flatten(1) for half in convolution.weight.chunk(2)])
    gradients = noise(tuple(convolution.weight.shape), steps=15)
    run(adamr([convolution], basis_interval=3, basis_tolerance=0.0), [convolution], gradients)
    split = [[half.flatten(1) for half in g.chunk(2)] for (g,) in gradients]
    for number, half in enumerate(halves):
        alone = adamr([half], basis_interval=3, basis_tolerance=0.0)
        run(alone, [half], [[s[number]] for s in split])
    stepped = torch.cat([half.weight for half in halves]).reshape_as(convolution.weight)
    torch.testing.assert_close(convolution.weight, stepped, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "max_dim", "blocks"), [((3, 6, 5), 8, 1), ((3, 12, 6), 8, 1), ((2, 12, 10), 6, 2)]
)
def test_experts_step_as_matrices_of_their_own(shape, max_dim, blocks):
    fields = {"basis_interval": 3, "max_dim": max_dim, "basis_tolerance": 0.0}
    stack = experts(*shape)
    gradients = noise(shape, steps=15)
    run(adamr([stack], **fields), [stack], gradients)
    for number in range(shape[0]):
        for block in range(blocks):
            rows = slice(block * shape[1] // blocks, (block + 1) * shape[1] // blocks)
            alone = zeros((shape[1] // blocks, shape[2]))
            run(adamr(alone, **fields), alone, [[g[number, rows]] for (g,) in gradients])
            expected = stack.weight[number, rows]
            torch.testing.assert_close(alone[0].weight, expected, rtol=0, atol=1e-10)


def test_a_side_wider_than_max_dim_is_not_rotated():
    limited, one_sided = zeros((6, 9)), zeros((6, 9))
    gradients = noise((6, 9), steps=15)
    optimizer = adamr(limited, basis="two_sided", max_dim=8)
    run(optimizer, limited, gradients)
    run(adamr(one_sided, basis="one_sided"), one_sided, gradients)
    assert torch.equal(limited[0].weight, one_sided[0].weight)
    assert "right_basis" not in optimizer.state[limited[0].weight]


@pytest.mark.parametrize(("shape", "axis"), [((10, 12), 0), ((12, 10), 1)])
def test_blocks_step_as_matrices_of_their_own(shape, axis):
    whole = zeros(shape)
    fields = {"basis_interval": 3, "max_dim": 5, "basis_tolerance": 0.0}
    gradients = noise(shape, steps=15)
    run(adamr(whole, **fields), whole, gradients)
    blocks = zeros(*[g.shape for g in gradients[0][0].chunk(2, axis)])
    for number, block in enumerate(blocks):
        side = adamr([block], **fields)
        run(side, [block], [[g.chunk(2, axis)[number].contiguous()] for (g,) in gradients])
        assert len(side._tiling(side.bound[0]).sides) == 1
    stepped = torch.cat([block.weight.data for block in blocks], axis)
    torch.testing.assert_close(whole[0].weight.data, stepped, rtol=0, atol=1e-10)


def test_bfloat16_factors_are_kept_in_bfloat16_and_find_the_same_directions():
    gradients = noise((24, 24), steps=40, dtype=torch.float32)
    ends = {}
    for kept in (None, "bfloat16"):
        modules = zeros((24, 24), dtype=torch.float32)
        optimizer = adamr(modules, state_dtype=kept, lr=1e-2)
        run(optimizer, modules, gradients)
        state = optimizer.state[modules[0].weight]
        expected = torch.float32 if kept is None else torch.bfloat16
        assert state["left_factor"].dtype == state["right_factor"].dtype == expected
        assert state["left_basis"].dtype == state["exp_avg"].dtype == torch.float32
        ends[kept] = modules[0].weight.data.flatten()
    assert torch.nn.functional.cosine_similarity(*ends.values(), dim=0) > 0.9


def test_bfloat16_parameters_are_stepped_in_float32():
    modules = zeros((8, 8), dtype=torch.bfloat16)
    exact = zeros((8, 8), dtype=torch.float32)
    gradients = noise((8, 8), steps=3, dtype=torch.bfloat16)
    optimizer = adamr(modules, lr=1e-2)
    run(optimizer, modules, gradients[:2])
    run(adamr(exact, lr=1e-2), exact, [[g.float()] for (g,) in gradients[:2]])
    assert optimizer.state[modules[0].weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(modules[0].weight, exact[0].weight.bfloat16())


def test_checkpoint_allocation_makes_all_state_and_advances_nothing():
    modules = zeros((5, 5))
    optimizer = adamr(modules)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, modules, [[torch.zeros(5, 5, dtype=torch.float64)]])
    made = {
        k: v.shape
        for k, v in optimizer.state[modules[0].weight].items()
        if isinstance(v, torch.Tensor)
    }
    state = optimizer.state[modules[0].weight]
    assert state["step"] == state["left_updates"] == 0
    optimizer.param_groups[0]["lr"] = 1e-3
    run(optimizer, modules, noise((5, 5), steps=12))
    after = {k: v.shape for k, v in state.items() if isinstance(v, torch.Tensor)}
    assert made == after


# Refreshes ------------------------------------------------------------------------


def test_refreshes_come_at_powers_of_two_and_then_each_on_its_own_step():
    modules = zeros(*[(5, 5)] * 6)
    optimizer = adamr(modules, basis_interval=8, basis_tolerance=0.0)
    refreshes, before = [], 0
    for step in noise(*[(5, 5)] * 6, steps=25):
        run(optimizer, modules, [step])
        refreshes.append(optimizer.counters.get("basis_refreshes", 0) - before)
        before += refreshes[-1]
    # Call 0 collects only; Adam's step t is call t + 1.
    assert refreshes[:9] == [0, 12, 6, 6, 0, 6, 0, 0, 0]
    for start in (9, 17):
        interval = refreshes[start : start + 8]
        assert sum(interval) == 12 and max(interval) <= 2
    diagnostics = optimizer.diagnostics()
    assert diagnostics["basis_refreshes"] == sum(refreshes)


def test_a_basis_that_is_still_good_is_left_alone():
    """Gradients with fixed singular vectors: after the first refreshes the bases stay good."""
    u, v = torch.linalg.qr(
        torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    scale = torch.logspace(0, -1, 6, dtype=torch.float64)
    modules = zeros((6, 6))
    optimizer = adamr(modules, basis_interval=4)
    run(optimizer, modules, [[u @ torch.diag(scale * (1 + s % 3)) @ v.T] for s in range(40)])
    counters = optimizer.diagnostics()
    # Two sides: steps 0, 1 or 2, and once, not knowing better, in the first whole interval.
    assert counters["basis_refreshes"] == 6
    assert counters["basis_skipped"] >= 14


def test_a_basis_that_moves_is_refreshed():
    modules = zeros((6, 6))
    optimizer = adamr(modules, basis_interval=4, stat_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    isotropic = torch.randn(40, 1, 6, 6, generator=generator, dtype=torch.float64)
    run(optimizer, modules, isotropic)
    counters = optimizer.diagnostics()
    assert counters["basis_skipped"] < counters["basis_refreshes"] / 4


def test_factors_that_stay_bad_are_counted_and_stop_with_advice():
    modules = zeros((5, 5))
    optimizer = adamr(modules, basis_interval=2)
    run(optimizer, modules, noise((5, 5), steps=4))
    optimizer.state[modules[0].weight]["left_factor"].fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"layer0 \(left side\).*3 times in a row"):
        run(optimizer, modules, noise((5, 5), steps=14))
    assert optimizer.diagnostics()["basis_kept"] >= 3


def test_a_failing_eigendecomposition_is_retried_and_counted(monkeypatch):
    plain, calls = torch.linalg.eigh, []

    def fails_twice(matrix):
        calls.append(matrix.dtype)
        if len(calls) <= 2:
            raise torch.linalg.LinAlgError("no convergence")
        return plain(matrix)

    monkeypatch.setattr(factorization.torch.linalg, "eigh", fails_twice)
    modules = zeros((5, 5))
    optimizer = adamr(modules)
    run(optimizer, modules, noise((5, 5), steps=3))
    assert optimizer.diagnostics()["basis_scaled"] == 1.0


@pytest.mark.parametrize("transport", ["overlap", "permute"])
def test_momentum_rotated_into_an_empty_direction_has_a_second_moment_there(transport):
    """Adam's ratio stays bounded; V kept as it was would make it 1e4 / √2."""
    modules = zeros((2, 2))
    optimizer = adamr(modules, transport=transport, basis_interval=2)
    run(optimizer, modules, noise((2, 2), steps=6))
    state = optimizer.state[modules[0].weight]
    state["exp_avg"].copy_(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]))
    state["exp_avg_sq"].copy_(torch.tensor([[[1.0, 1.0], [1e-8, 1e-8]]]))
    batch = Batch([optimizer._view(optimizer.bound[0])], Tiling(1, 2, 2, "rows", True, True))
    half = torch.full((2, 2), 0.5, dtype=torch.float64).sqrt()
    half[0, 1] *= -1
    for name, value in optimizer.rotated.bases._transported(batch, "left", half[None]).items():
        batch.write(name, value)
    items = [RefreshItem(batch, 0, 0, ("left",), ("left",))]
    optimizer.rotated.bases._raise_second_moments(ShardedRefresh(items, [1.0], half.device))
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    first = state["exp_avg"] / (1 - beta1 ** state["step"])
    second = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
    ratio = first.abs() / second.sqrt()
    # By overlap V is the mean of both coordinates', without the bias corrections' help.
    bound = 1.0 if transport == "permute" else (1 - beta2**5) ** 0.5 / (1 - beta1**5)
    assert ratio.max() <= bound * (1 + 1e-9)
    if transport == "permute":
        torch.testing.assert_close(state["mean_sq"].squeeze(), state["exp_avg_sq"].mean())


# Sources of statistics --------------------------------------------------------------


class Features(StatisticsSource):
    """A source that hands over given moments."""

    def __init__(self, requests, moments):
        self.requests, self.moments, self.step = requests, moments, 0

    def enable(self, due, step):
        self.step = step

    def take(self):
        return {
            r.key: Statistic(4 * self.moments[r.kind], torch.tensor(4.0)) for r in self.requests
        }


def featured(layout="linear"):
    """A layer of 5 outputs and 7 inputs with moments of known eigenvectors, and their bases."""
    generator = torch.Generator().manual_seed(0)

    def moment(n):
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        return basis @ torch.diag(torch.arange(n, 0, -1.0).double()) @ basis.T, basis

    (output, left), (inputs, right) = moment(5), moment(7)
    moments = {"output_grad": output, "input": inputs}
    (module,) = zeros((5, 7)) if layout == "linear" else zeros((7, 5))
    sources = []

    def open_source(requests):
        sources.append(Features(requests, moments))
        return sources[-1]

    matrix = LayerMatrix("layer", module, layout=layout)
    structure = ModelStructure([matrix], open_statistics=open_source)
    groups = [{"params": [module.weight]}]
    optimizer = AdamR(groups, structure, AdamRConfig(basis_source="feature"))
    return optimizer, module, left, right, sources[0]


@pytest.mark.parametrize("layout", ["linear", "transposed"])
def test_feature_bases_are_those_of_inputs_and_output_gradients(layout):
    optimizer, module, left, right, source = featured(layout)
    assert {r.kind for r in source.requests} == {"input", "output_grad"}
    shape = tuple(module.weight.shape)
    run(optimizer, [module], noise(shape, steps=6))
    state = optimizer.state[module.weight]
    if layout == "transposed":
        left, right = right, left
    for name, expected in (("left_basis", left), ("right_basis", right)):
        torch.testing.assert_close(
            (state[name][0].T @ expected).abs(), torch.eye(len(expected), dtype=torch.float64)
        )
    assert state["step"] == 5 and state["left_updates"] == 6


def test_a_layer_whose_features_never_come_uses_the_gradient():
    (module,), (plain,) = zeros((5, 7)), zeros((5, 7))
    source = Features([], {})
    structure = ModelStructure([LayerMatrix("layer", module)], open_statistics=lambda _: source)
    groups = [{"params": [module.weight]}]
    optimizer = AdamR(groups, structure, AdamRConfig(basis_source="feature"))
    gradients = noise((5, 7), steps=8)
    run(optimizer, [module], gradients)
    run(adamr([plain]), [plain], gradients)
    assert torch.equal(module.weight, plain.weight)


def test_as_a_fallback_it_keeps_its_own_fields():
    given = NKFACConfig(
        base="adamr", max_dim=8, stat_decay=0.5, state_dtype="bfloat16", precision="tf32"
    )
    fallback = make_fallback("adamr", given, FailureRecord(), lambda name, by: None)
    assert isinstance(fallback, RotatedAdamFallback)
    config = fallback.rotated.config
    assert config.max_dim == AdamRConfig().max_dim
    assert config.stat_decay == AdamRConfig().stat_decay
    assert config.state_dtype == "bfloat16" and config.precision == "tf32"
