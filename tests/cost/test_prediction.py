"""Predictions: of kernels made by hand, and of a tiny model."""

import pytest
import torch
import transformers

from hf_precond.cost.counting import Kernel
from hf_precond.cost.devices import Device
from hf_precond.cost.prediction import Prediction, predict
from hf_precond.cost.text import _table, prediction_text
from hf_precond.cost.trace import TracedStep, TracedTraining

# One millisecond is 1 GB of traffic, or 250 launches.
DEVICE = Device("round", {"float32": 1.0}, 1000, start=0.0, shares=(1.0, 1.0, 1.0))
MS = 1e9


def moved(milliseconds, phase="step"):
    return Kernel("add", phase, bytes=milliseconds * MS)


def by_hand(step=4.0, statistics=1.0, scales=0.0):
    """Passes of 10 ms for 100 tokens; every second step has statistics of that many ms."""
    passes = {False: [moved(10, "passes")], True: [moved(10, "passes"), moved(scales, "passes")]}
    twice = [moved(20, "passes")]
    larger = {False: twice, True: [*twice, moved(2 * scales, "passes")]}
    steps = [
        TracedStep(1, True, [moved(step), moved(statistics, "statistics")]),
        TracedStep(1, False, [moved(step)]),
    ]
    return Prediction(DEVICE, TracedTraining(passes, steps, larger), [moved(2)], (100, 200), 10)


def test_a_step_is_averaged_over_a_period():
    prediction = by_hand()
    assert prediction.adamw_ms(100) == pytest.approx(12.0)
    assert prediction.step_ms(100) == pytest.approx(14.5)
    assert prediction.step_ms(400) == pytest.approx(44.5)
    assert prediction.ratio(100) == pytest.approx(14.5 / 12)
    parts = prediction.parts(100)
    times = {title: DEVICE.average(part) for title, part in parts.items()}
    assert times == pytest.approx(
        {"the model's passes": 10, "statistics": 0.5, "refreshes": 0, "the step itself": 4}
    )


def test_where_the_overhead_is_low_enough():
    # (4.5 - 2) / (tokens / 10 + 2) = 0.05: 480 tokens.
    assert by_hand().break_even() == 480
    assert by_hand(step=2.0, statistics=0.0).break_even() == 10
    # Statistics of every second step that cost a fifth of the passes stay above 5 %.
    assert by_hand(scales=2.0).break_even() is None
    assert by_hand(scales=0.5).break_even() > 480


def test_launches_hold_a_step_of_small_kernels_up():
    prediction = by_hand()
    prediction.training.steps[1].kernels.extend([Kernel("add")] * 5000)
    assert prediction.step_ms(100) == pytest.approx((15 + 4e-3 * 5002) / 2)


def test_a_tiny_model():
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=11, intermediate_size=16, **size)

    def make():
        return transformers.BertForSequenceClassification(config)

    device = Device("small", {"float32": 1.0, "bfloat16": 2.0}, 100)
    prediction = predict(make, "muon", device, 64, length=16, fields={"lr": 1e-3})
    assert prediction.tokens == (64, 128) and prediction.ratio(64) > 1
    # What depends on the batch is linear in it, so what lies between two is known exactly.
    larger = predict(make, "muon", device, 256, length=16, fields={"lr": 1e-3})
    assert prediction.step_ms(256) == pytest.approx(larger.step_ms(256))
    flops = [sum(k.flops for k in p.passes(False, 256)) for p in (prediction, larger)]
    assert flops[0] == pytest.approx(flops[1])
    assert {k.name for k in prediction.adamw} == {"_fused_adamw_", "_foreach_add_"}
    text = prediction_text(prediction, "muon")
    assert max(map(len, text.splitlines())) <= 80 and "predicted, not measured" in text
    assert "times as long" in text and "gpu.py" in text


def test_columns_stay_apart_whatever_is_in_them():
    heads = ["float32", "tf32", "bfloat16", "float16", "GB", "launches", "ms"]
    cells = ["1,234.5", "12,345.6", "123,456.7", "1,234.5", "123.45", "1,203", "1,234.56"]
    lines = _table([("an average step, GFLOP in", heads), ("  the model's passes", cells)])
    assert [line.split()[-len(heads) :] for line in lines] == [heads, cells]
    assert {len(line) for line in lines} == {max(map(len, lines))} and len(lines[0]) <= 100
    (line, _) = _table([("an average step, GFLOP in", heads), ("  refreshes", ["-"] * 7)])
    assert line.split()[-len(heads) :] == heads and len(line) <= 80


def test_a_build_with_cuda_and_no_device_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="built with CUDA and sees no device") as caught:
        predict(lambda: None, "muon", DEVICE, 64)
    assert "\n" not in str(caught.value)


def test_a_processor_runs_its_own_code():
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    # With dropout torch does not fuse it on CPUs.
    size["attention_probs_dropout_prob"] = 0.0
    config = transformers.BertConfig(vocab_size=11, intermediate_size=16, **size)
    cpu = Device("cpu", {"float32": 0.1}, 10, kind="cpu", shares=(1.0, 1.0, 1.0))

    def make():
        return transformers.BertForSequenceClassification(config)

    for name in ("afopt", "adamr", "nkfac", "sgdph"):
        prediction = predict(make, name, cpu, 32, length=16, fields={"lr": 1e-3})
        flops = prediction.parts(32)["the model's passes"].flops
        assert set(flops) == {"float32"} and prediction.ratio(32) > 1
        # The fused attention of CPUs is counted, forward and backward.
        attention = [k for k in prediction.passes(False, 32) if "attention" in k.name]
        assert len(attention) == 2 and all(k.flops for k in attention)
    assert not torch.cuda.is_initialized()
