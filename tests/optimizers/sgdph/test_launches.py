"""What a step of SGD-PH launches on a GPU that torch only pretends to have."""

import pytest
from torch.optim import AdamW
from transformers import BertConfig, BertForSequenceClassification

from hf_precond.registry import create_optimizer
from tests.fake_cuda import on_gpu, pretended, step, with_source


def bert(layers):
    return on_gpu(BertForSequenceClassification(BertConfig(num_hidden_layers=layers)))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("layers", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_a_plain_step_of_bert_base_launches_little_more_than_adamw(base, layers, monkeypatch):
    with pretended(monkeypatch):
        optimizer = with_source(create_optimizer(bert(layers), "sgdph", base=base))
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        plain = AdamW(groups, lr=1e-3, fused=True)
        for each in (optimizer, plain):
            step(each)
        seen, adamw = step(optimizer), step(plain)
    assert adamw.total == 2 * len(groups)
    assert seen.total - adamw.total <= 45 and seen.waits == []
