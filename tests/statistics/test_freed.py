"""A model that keeps an output, and with it the graph, is freed with what watched it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.experts import find_experts
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.recorded_losses import RecordedLoss
from hf_precond.statistics.requests import MomentRequest
from tests.architectures.families import FAMILIES, build, loss_of, text
from tests.statistics.support import linears, requests_for


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, pad_token_id=None,
    )  # fmt: skip
    return tf.MixtralForCausalLM(config).train()


@pytest.mark.filterwarnings("ignore:no second moment was collected")
@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_kept_graph_keeps_neither_the_model_nor_its_collector(
    name: str, evaluated: bool, stepped: bool
) -> None:
    model = mixtral() if name == "mixtral" else build(name).train(not evaluated)
    model.train(not evaluated)
    requests = requests_for(find_experts(model) or linears(model))
    for block in find_attention(model):
        for kind in ("query", "key"):
            requests.append(MomentRequest(f"{block.name}.{kind}", kind, block.q, block))
    collector = MomentCollector(model, requests)
    collector.enable(True, 0)
    kept: list[Tensor] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: kept.append(output))
    model.kept = kept  # as models do that show their activations
    loss = loss_of(model, text("tokens") if name == "mixtral" else FAMILIES[name].batch())
    loss.backward(retain_graph=True)
    assert evaluated or collector.buffer.answers
    if stepped:
        collector.take()
    gone = weakref.ref(model), weakref.ref(collector)
    del model, collector, requests, block, module
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    (kept[0] if isinstance(kept[0], Tensor) else loss).sum().backward(retain_graph=True)


def test_a_kept_loss_does_not_keep_its_record() -> None:
    layer = nn.Linear(2, 1)
    layer.record = RecordedLoss(layer, layer, (torch.ones(2),), {}, layer)
    layer.loss = layer.record.watched(layer(torch.ones(2)).sum())
    layer.loss.backward(retain_graph=True)
    assert layer.record.factor == 1
    loss, gone = layer.loss, weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
    loss.backward()
