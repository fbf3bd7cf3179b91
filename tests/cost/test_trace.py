"""What a traced training consists of: the optimizers' own steps, and a model's passes."""

import pytest
import torch
import transformers

from hf_precond.cost.batches import make_batch, sequence_length
from hf_precond.cost.counting import Counts
from hf_precond.cost.trace import on_device, trace_training
from tests.fake_cuda import GPU, pretended

SIZE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LENGTH, COUNT, WIDTH = 4, 3, 8


@pytest.fixture(autouse=True)
def gpu():
    with pretended():
        yield


def tiny_bert():
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=LENGTH, **SIZE)
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    return on_device(model, GPU)


def traced(name, batch=True, **fields):
    model = tiny_bert()
    data = make_batch(model, LENGTH * COUNT, GPU) if batch else None
    with torch.enable_grad():
        return trace_training(model, name, data, lr=1e-3, **fields)


def linear_flops(model):
    """Three products a linear layer, two for the first, whose input needs no gradient."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    rows = {True: COUNT * LENGTH, False: COUNT}
    return sum(
        3 * 2 * m.weight.numel() * rows["encoder" in name]
        for name, m in model.named_modules()
        if m in layers
    )


def test_passes_of_a_model_are_in_bfloat16():
    training = traced("muon")
    plain = training.passes[False]
    # Two products forward, and five backward, where the fused kernel computes scores again.
    attention = 7 * 2 * COUNT * LENGTH * LENGTH * WIDTH
    assert Counts(plain).flops == {"bfloat16": linear_flops(tiny_bert()) + attention}
    assert not training.collection.kernels


def test_a_period_of_afopt():
    training = traced("afopt", stat_interval=2, inverse_interval=4)
    assert [(s.times, s.due) for s in training.steps] == [(1, True), (1, True), (2, False)]
    # On an accelerator all refreshes come at one of the steps with statistics.
    refreshes = [any(k.phase == "refresh" for k in s.kernels) for s in training.steps]
    assert refreshes == [True, False, False]
    assert training.plain.launches < training.with_statistics.launches
    assert training.plain.launches < training.average.launches
    assert 0 < training.refresh.launches < training.average.launches
    moments = {k.name for k in training.collection.kernels}
    assert "bmm" in moments and training.due_share == 0.5


def test_statistics_without_passes_give_the_same_steps():
    fields = {"stat_interval": 2, "inverse_interval": 4}
    one, other = (traced("nkfac", batch, **fields) for batch in (True, False))
    assert [s.kernels for s in one.steps] == [s.kernels for s in other.steps]


def test_a_plain_step_alone():
    whole, alone = (traced("nkfac", False, whole_period=w) for w in (True, False))
    assert len(whole.steps) == 3 and [s.times for s in alone.steps] == [90]
    assert alone.plain.kernels == whole.plain.kernels


def test_every_step_of_adamr_may_refresh():
    training = traced("adamr", False)
    assert len(training.steps) == 3 and {s.times for s in training.steps} == {1}
    assert training.refresh.flops and not training.passes


def test_probes_of_sgdph_are_part_of_its_passes():
    training = traced("sgdph")
    # Passes of their own, under autocast as the training's, and the products with the Hessian.
    plain = sum(k.flops for k in training.passes[False])
    flops = training.collection.flops
    assert sum(flops.values()) > plain and flops["bfloat16"] > flops["float32"]
    assert (training.average.launches - training.plain.launches) < 5


def test_batches_are_made_from_the_config():
    with torch.device("meta"):
        vit = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZE))
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **SIZE))
    assert sequence_length(vit) == 197 and sequence_length(llama) == 1024
    assert make_batch(vit, 400, GPU)["pixel_values"].shape == (2, 3, 224, 224)
    batch = make_batch(llama, 2048, GPU)
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 1024)
    assert make_batch(llama, 5, GPU)["input_ids"].shape == (1, 5)
