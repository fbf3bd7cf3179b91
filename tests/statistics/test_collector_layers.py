"""Captured moments of convolutions, cross-attention, torch's attention, adapters and embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_precond.architectures.attention import find_attention
from hf_precond.architectures.modules import find_matrices
from hf_precond.architectures.structure import LayerMatrix
from hf_precond.statistics.collector import MomentCollector
from hf_precond.statistics.requests import MomentRequest
from tests.architectures.families import FAMILIES, build, loss_of, text
from tests.statistics.support import (
    close_all,
    opened,
    requests_for,
)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_all()


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (2, 3), dilation=2, groups=2),
    nn.Conv1d(4, 4, 3, groups=4),
]


@pytest.mark.parametrize("entries", [1, 2**24])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=["plain", "grouped", "depthwise"])
def test_convolutions(layer: nn.Module, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_precond.statistics.moments._PATCHES", entries)
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    (matrix,) = find_matrices(layer)
    collector = opened(layer, requests_for([matrix]))
    inputs = torch.randn(2, 4, *[7] * (layer.weight.dim() - 2), dtype=torch.float64)
    output = layer(inputs)
    output.retain_grad()
    output.pow(2).sum().backward()
    taken = collector.take()
    # Rows by the definition: what the kernel of each group sees at each position.
    kernel, groups = layer.weight.shape[2:].numel(), layer.groups
    rows = []
    for group in inputs.chunk(groups, dim=1):
        eye = torch.eye(group.shape[1] * kernel, dtype=torch.float64)
        probes = eye.view(-1, group.shape[1], *layer.weight.shape[2:])
        convolve = nn.functional.conv1d if inputs.dim() == 3 else nn.functional.conv2d
        seen = convolve(group, probes, None, layer.stride, layer.padding, layer.dilation)
        seen = seen.movedim(1, -1).flatten(0, -2)
        rows.append(torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1))
    stacked = torch.cat(rows)
    torch.testing.assert_close(taken["/input"].sum, stacked.T @ stacked)
    assert taken["/input"].count == len(stacked)
    delta = output.grad.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(taken["/output_grad"].sum, delta.T @ delta)
    assert taken["/output_grad"].count == len(delta)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1)], ids=["linear", "conv"])
def test_a_call_without_rows_adds_nothing(layer: nn.Module) -> None:
    """As of an expert without tokens, or a mask head without boxes."""
    collector = opened(layer, requests_for(find_matrices(layer)))
    inputs = torch.randn(2, 4, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 4)
    layer(inputs).square().sum().backward()
    wanted = collector.take()
    (layer(inputs[:0]).sum() + layer(inputs).square().sum()).backward()
    for key, statistic in collector.take().items():
        assert torch.equal(statistic.sum, wanted[key].sum)
        assert torch.equal(statistic.count, wanted[key].count)


def test_a_vector_alone_is_one_row() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    collector = opened(model, requests_for(find_matrices(model)))
    inputs, taken = torch.randn(4), []
    for given in (inputs, inputs[None]):
        model(given).square().sum().backward()
        taken.append(collector.take())
    for key in taken[1]:
        torch.testing.assert_close(taken[0][key].sum, taken[1][key].sum)
        assert taken[0][key].count == taken[1][key].count == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_diagonal_blocks_are_those_of_the_whole_moment(blocks: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 2, bias=bias).double()
    (matrix,) = find_matrices(layer)
    requests = [
        MomentRequest("whole", "input", matrix),
        MomentRequest("blocks", "input", matrix, blocks=blocks),
    ]
    collector = opened(layer, requests)
    layer(torch.randn(9, 7, dtype=torch.float64)).sum().backward()
    taken = collector.take()
    whole, width = taken["whole"].sum, -(-matrix.columns // blocks)
    assert taken["blocks"].sum.shape == (blocks, width, width)
    assert taken["blocks"].count == 9
    for number, block in enumerate(taken["blocks"].sum):
        span = slice(number * width, (number + 1) * width)
        expected = torch.zeros(width, width, dtype=torch.float64)
        part = whole[span, span]
        expected[: len(part), : len(part)] = part
        torch.testing.assert_close(block, expected)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_reads_the_masks_of_its_two_sequences(name: str) -> None:
    model, batch = build(name), FAMILIES[name].batch()
    block = next(block for block in find_attention(model) if block.cross)
    inner = next(b for b in find_attention(model) if "decoder" in b.name and not b.cross)
    collector = opened(
        model,
        [
            MomentRequest("q", "input", block.q, block),
            MomentRequest("k", "input", block.k),
            MomentRequest("self", "input", inner.q, inner),
        ],
    )
    loss_of(model, batch).backward()
    counts = {key: found.count.item() for key, found in collector.take().items()}
    assert counts["k"] == batch["attention_mask"].sum()
    # Decoder positions behind the last label are padding.
    assert counts["q"] == counts["self"] == (batch["labels"] != -100).sum()
    loss_of(model, batch | {"decoder_attention_mask": torch.ones(3, 5)}).backward()
    assert collector.take()["self"].count == 15
    collector.close()


def test_a_linear_layer_that_computes_something_else_has_no_statistics() -> None:
    """As DeepSeek V4's: the weight of each group of inputs is a part of one matrix."""

    class Grouped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight.view(2, -1, self.in_features)
            return torch.einsum("bgi,goi->bgo", input, weight)

    layer = Grouped(3, 8, bias=False)
    (matrix,) = find_matrices(layer)
    collector = opened(layer, requests_for([matrix]))
    layer(torch.randn(4, 2, 3)).square().sum().backward()
    assert collector.take() == {}
    for request in collector.requests:
        assert "something else" in collector.missing(request.key)


def test_flattened_sequences_keep_their_mask() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.layer(x.flatten(0, 1)).view_as(x)

    model, x = Flat().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.ones(3, 5)
    mask[0, 2:] = 0
    collector = opened(model, requests_for(find_matrices(model)))
    model(x, mask).sum().backward()
    taken = collector.take()
    rows = torch.cat([x, torch.ones(3, 5, 1, dtype=torch.float64)], dim=-1)[mask.bool()]
    torch.testing.assert_close(taken["layer/input"].sum, rows.T @ rows)
    assert taken["layer/input"].count == taken["layer/output_grad"].count == 12
    model(x).sum().backward()
    assert collector.take()["layer/input"].count == 15


def test_images_and_packed_sequences_weigh_one() -> None:
    model = build("clip")
    blocks = find_attention(model)
    requests = [MomentRequest(b.name, "input", b.q, b) for b in blocks]
    collector = opened(model, requests)
    batch = FAMILIES["clip"].batch()
    loss_of(model, batch).backward()
    counts = {key: found.count.item() for key, found in collector.take().items()}
    assert sorted(counts.values()) == [15, batch["attention_mask"].sum().item()]


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_of_torch(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=batch_first).double()
    (block,) = find_attention(layer)
    requests = [
        MomentRequest("x", "input", block.q, block),
        MomentRequest("v", "input", block.v, block),
        MomentRequest("o", "input", block.o, block),
        MomentRequest("d", "output_grad", block.o, block),
    ]
    collector = opened(layer, requests)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    kept = ~mask
    given = x if batch_first else x.transpose(0, 1)
    output = layer(given, src_key_padding_mask=mask)
    output = output if batch_first else output.transpose(0, 1)
    (output[kept].pow(3)).sum().backward()
    taken = collector.take()
    rows = torch.cat([x, torch.ones(3, 5, 1, dtype=torch.float64)], dim=-1)
    real = rows[kept]
    for key in ("x", "v"):
        torch.testing.assert_close(taken[key].sum, real.T @ real)
        assert taken[key].count == 13
    q, k, v = (
        (rows @ m.read().T).unflatten(-1, (4, 4)).transpose(1, 2)
        for m in (block.q, block.k, block.v)
    )
    logits = (q @ k.mT / 2).masked_fill(mask[:, None, None], float("-inf"))
    heads = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    heads = torch.cat([heads, rows[..., -1:]], dim=-1)[kept]
    torch.testing.assert_close(taken["o"].sum, heads.T @ heads)
    bias = layer.self_attn.out_proj.bias.grad
    assert taken["d"].sum.shape == (16, 16) and bias.abs().sum() > 0
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention"):
        MomentCollector(layer, [MomentRequest("d", "output_grad", block.q, block)])


def test_lora_below_which_nothing_trains_is_seen_at_its_wrapper() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    model = get_peft_model(build("llama"), config)
    block = find_attention(model)[0]
    pair = block.adapters["q"]
    collector = opened(
        model,
        [
            MomentRequest("q", "input", block.q, block),
            MomentRequest("k", "input", block.k, block),
            MomentRequest("down", "input", pair.down, block),
            MomentRequest("up", "input", pair.up, block),
            MomentRequest("delta", "output_grad", block.q, block),
        ],
    )
    batch = FAMILIES["llama"].batch()
    inputs: list[Tensor] = []
    block.k.module.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    loss_of(model, batch).backward()
    taken = collector.take()
    real = inputs[0][batch["attention_mask"].bool()]
    for key in ("q", "k", "down"):
        torch.testing.assert_close(taken[key].sum, real.T @ real)
    low = real @ pair.down.read().T
    torch.testing.assert_close(taken["up"].sum, low.T @ low)
    assert taken["delta"].sum.shape == (16, 16)


def test_embedding_gradients_and_refused_requests() -> None:
    model = build("bert")
    embedding = next(m for m in find_matrices(model) if "word_embeddings" in m.name)
    collector = opened(model, [MomentRequest("e", "output_grad", embedding)])
    loss_of(model, text()).backward()
    assert collector.take()["e"].sum.shape == (16, 16)
    with pytest.raises(ValueError, match="has no second moment"):
        MomentCollector(model, [MomentRequest("e", "input", embedding)])
    with pytest.raises(ValueError, match="inputs of linear layers alone"):
        MomentCollector(model, [MomentRequest("e", "output_grad", embedding, reached=True)])
    with pytest.raises(ValueError, match="is not a layer of this model"):
        MomentCollector(model, [MomentRequest("e", "input", LayerMatrix("x", nn.Linear(2, 2)))])
    with pytest.raises(ValueError, match="same key"):
        MomentCollector(model, [MomentRequest("e", "output_grad", embedding)] * 2)
