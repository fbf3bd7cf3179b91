"""What hooks compute from a GPU's activations and gradients stays there; nothing waits for it."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hf_precond.architectures.structure import LayerMatrix
from hf_precond.statistics.attention_heads import Call, entropies, spaced
from hf_precond.statistics.hessian_products import diagonal_estimates, probe_vectors
from hf_precond.statistics.moments import (
    Collection,
    moment,
    patch_moment,
    second_moment,
)
from hf_precond.statistics.passes import StatisticsBuffer
from hf_precond.statistics.rope import average, half_split, tables
from hf_precond.statistics.shared_inputs import SharedInputs
from hf_precond.statistics.token_weights import TokenWeights
from tests.fake_cuda import GPU, Watch, on_gpu, pretended


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with pretended(monkeypatch):
        yield


def there(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=GPU)


def watched(work):
    """The result of ``work``, which must not wait."""
    with Watch() as watch:
        result = work()
    assert watch.waits == []
    return result


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("shape", [(30, 8), (700, 600)])
def test_moments(shape, constant, weights):
    weights = there(shape[0]) if weights else None
    found = watched(lambda: moment(there(*shape), weights, constant=constant))
    size = shape[1] + constant
    assert found.device == GPU and found.shape == (size, size)


@pytest.mark.parametrize("blocks", [1, 3])
def test_moments_of_half_precision(blocks):
    collection = Collection("input", None, constant=True, blocks=blocks)
    rows, weights = there(2, 5, 8, dtype=torch.bfloat16), there(2, 5)
    found = watched(lambda: second_moment(collection, rows, weights))
    assert found.sum.dtype == found.count.dtype == torch.float32


@pytest.mark.parametrize(("blocks", "rows"), [(1, 0), (3, 4)])
@pytest.mark.parametrize("kind", ["input", "output_grad"])
def test_statistics_add_up(kind, blocks, rows):
    matrix = LayerMatrix("layer", on_gpu(nn.Linear(8, 6)), bias="bias")
    if kind == "input":
        collection, shape = Collection(kind, matrix, True, blocks, rows), (2, 5, 8)
    else:
        collection, shape = Collection(kind, matrix, rows=rows), (10, 6)
    buffer, weights = StatisticsBuffer(), there(2, 5)
    for _ in range(2):
        statistic = watched(lambda: second_moment(collection, there(*shape), weights, 1))
        watched(lambda statistic=statistic: buffer.add("c", statistic))
    found = buffer.get("c")
    assert found.sum.device == found.count.device == GPU


def test_patches_of_a_convolution():
    layer = on_gpu(nn.Conv2d(2, 4, 3, padding=1))
    matrix = LayerMatrix("layer", layer, bias="bias", layout="conv")
    collection = Collection("input", matrix, True)
    found = watched(lambda: patch_moment(collection, layer, there(3, 2, 6, 6)))
    assert found.sum.shape == (19, 19) and found.sum.device == GPU


def test_siblings_share():
    shared, inputs = SharedInputs(), there(4, 8)
    matrix = LayerMatrix("layer", on_gpu(nn.Linear(8, 6, bias=False)))
    collection = Collection("input", matrix)
    for _ in range(2):
        found = watched(
            lambda: shared.moment(0, inputs, lambda: second_moment(collection, inputs, None))
        )
        assert found.sum.device == GPU


@pytest.mark.parametrize("weights", [False, True])
def test_rotations(weights):
    with unset_fake_temporarily():
        layout = half_split(8, 8)
    layout = type(layout)(*(there(8, dtype=t.dtype) for t in vars(layout).values()))
    weights = there(2, 5) if weights else None
    found = watched(lambda: tables(layout, there(2, 5, 8), there(2, 5, 8), weights))
    turned = watched(lambda: average(layout, there(3, 8, 8), found))
    assert turned.device == GPU and turned.shape == (3, 8, 8)


@pytest.mark.parametrize("mask", [None, (2, 1, 5, 5), (2, 5)])
@pytest.mark.parametrize("kernel", ["sdpa_attention_forward", "eager_attention_forward"])
def test_entropies(kernel, mask):
    options = {"scaling": 0.5, "softcap": 3.0, "s_aux": there(4), "sliding_window": 2}
    mask = None if mask is None else there(*mask, dtype=torch.bool)
    query, key = there(2, 4, 5, 8), there(2, 2, 5, 8)
    call = Call(query, key, there(2, 5, 32), mask, options, kernel)
    found = watched(lambda: entropies(nn.Identity(), call, spaced(5, 2)))
    assert found.device == GPU and found.shape == (2, 4, 2)


@pytest.mark.parametrize("given", ["attention_mask", "labels"])
def test_token_weights(given):
    class Model(nn.Module):
        base_model_prefix = "model"

        def forward(self, attention_mask=None, decoder_input_ids=None, labels=None):
            return None

    model = Model()
    model.config = type("Config", (), {"is_encoder_decoder": given == "labels"})()
    tokens = TokenWeights(model)
    tokens.enabled = True
    reader = tokens.reader("decoder.layer" if given == "labels" else "layer")
    trained = torch.enable_grad()(model)  # passes without gradients have no masks to keep
    watched(lambda: trained(**{given: there(2, 5, dtype=torch.int64)}))
    weights = watched(lambda: reader.read((2, 5, 8), torch.float32))
    assert weights.device == GPU and weights.dtype == torch.float32
    tokens.close()


@pytest.mark.parametrize("probe", ["rademacher", "ones", "exact"])
def test_probes(probe):
    parameters = [there(3), there(2), there(4, dtype=torch.bfloat16)]
    vectors = watched(lambda: probe_vectors(parameters, probe, 3))
    estimates = watched(
        lambda: diagonal_estimates(lambda v: [2 * each for each in v], probe, vectors)
    )
    assert [e.shape for e in estimates] == [p.shape for p in parameters]
    assert all(t.device == GPU and t.dtype == torch.float32 for t in (*vectors, *estimates))
