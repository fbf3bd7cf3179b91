"""Whatever kernel computes the attention, the statistics are those of the MATH kernel."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from hf_precond.registry import create_optimizer
from tests.gpu.support import inputs, passes
from tests.optimizers.models import make

pytestmark = pytest.mark.gpu
WITH_STATISTICS = {
    "afopt": {"scope": "all_linear", "stat_interval": 1},
    "adamr": {"basis_source": "feature"},
    "nkfac": {"stat_interval": 1},
    "sgdph": {"probe_interval": 1},
}
FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
# Flash takes no mask and no float32 on a GPU; the memory-efficient kernel no grouped queries.
CASES = [(FLASH, model, "bfloat16") for model in ("vit", "gpt2", "llama")]
CASES += [(FLASH, model, "float16") for model in ("vit", "gpt2", "llama")]
CASES += [(EFFICIENT, model, "float32") for model in ("vit", "gpt2", "bert")]
CASES += [(EFFICIENT, model, "bfloat16") for model in ("vit", "gpt2", "bert")]
# Without a loss scaler SGD-PH's products overflow in float16 weights; they are dropped and counted.
CASES = [
    (name, *case)
    for name in WITH_STATISTICS
    for case in CASES
    if (name, case[2]) != ("sgdph", "float16")
]
ERROR = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


def build(model_name, dtype):
    """As the other tests' models; the Llama with heads as wide as the fused kernels want them."""
    if model_name != "llama":
        return make(model_name, dtype=dtype)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).train()


def statistics(name, model_name, device, dtype, kernel, implementation="sdpa"):
    """The statistics of one step, by key."""
    model = build(model_name, dtype).to(device)
    model.set_attn_implementation(implementation)
    optimizer = create_optimizer(model, name, **WITH_STATISTICS[name])
    data = inputs(model_name, device, dtype=dtype)
    if model_name != "bert":
        data.pop("attention_mask", None)
    with sdpa_kernel(kernel):
        loss = passes(model, optimizer, data)
    assert torch.isfinite(loss)
    found = optimizer.statistics.take()
    optimizer.close()
    return found


def assert_alike(found, expected, error):
    """Relative to the norm of each statistic."""
    assert found.keys() == expected.keys() and found
    for key, statistic in expected.items():
        difference = (found[key].sum - statistic.sum).norm() / statistic.sum.norm()
        assert difference < error, (key, float(difference))
        torch.testing.assert_close(found[key].count, statistic.count)


@pytest.mark.parametrize(("name", "kernel", "model_name", "dtype"), CASES, ids=str)
def test_fused_attention(name, kernel, model_name, dtype, device):
    if device.type != "cuda" and kernel == EFFICIENT:
        pytest.skip("CUDA devices alone have the memory-efficient kernel")
    chosen = getattr(torch, dtype)
    expected = statistics(name, model_name, device, chosen, SDPBackend.MATH)
    found = statistics(name, model_name, device, chosen, kernel)
    assert_alike(found, expected, ERROR[dtype])


@pytest.mark.parametrize("name", WITH_STATISTICS)
@pytest.mark.parametrize("model_name", ["bert", "vit", "gpt2", "llama"])
def test_eager_attention(name, model_name, device):
    expected = statistics(name, model_name, device, torch.float32, SDPBackend.MATH)
    found = statistics(name, model_name, device, torch.float32, SDPBackend.MATH, "eager")
    assert_alike(found, expected, 1e-4)
