"""One run against a loop written out here; determinism, divergence, the schedule."""

import json
import math
from pathlib import Path

import pytest
import torch

from hf_precond.bench import optimizers, results, tasks
from hf_precond.bench.report import steps_to
from hf_precond.bench.spec import Run, TaskSpec, Training
from hf_precond.bench.training import rate, train
from tests.bench import tiny

FILE = f"{Path(__file__).with_name('tiny.py')}:make"


def run(optimizer="adamw", fields=None, course=True, **training):
    training = {"steps": 10, "eval_every": 5, "eval_every_late": 1, **training}
    task = TaskSpec("mine", FILE, None, {}, None, "", Training(**training))
    return Run(task, optimizer, optimizer, fields or {"lr": 1e-2}, 3, course)


def test_the_rate_warms_up_and_falls():
    training = Training(steps=300)
    assert rate(training, 0) == pytest.approx(1 / 30) and rate(training, 29) == 1
    assert rate(training, 165) == pytest.approx(0.5)  # half of the 270 steps that follow
    expected = 0.5 * (1 + math.cos(math.pi * 269 / 270))
    assert rate(training, 299) == pytest.approx(expected)
    assert rate(Training(steps=300, schedule="linear"), 165) == pytest.approx(0.5)
    assert rate(Training(steps=300, schedule="constant"), 299) == 1
    assert rate(training, 299, decays=False) == 1


def test_a_run_is_the_loop_written_out():
    found = train(run(fields={"lr": 1e-2, "weight_decay": 0.1}))
    model, draw, evaluate = tiny.make(3)
    decayed = [p for n, p in model.named_parameters() if "bias" not in n]
    rest = [p for n, p in model.named_parameters() if "bias" in n]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    losses, evaluations = [], []
    for step in range(10):
        share = 1.0 if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 9))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * share
        loss = model(**draw(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step + 1 in (5, 9, 10):
            evaluations.append((step + 1, evaluate(model)["loss"]))
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    kept = [(e["step"], e["loss"]) for e in found["evaluations"]]
    assert [step for step, _ in kept] == [5, 9, 10]
    assert [loss for _, loss in kept] == pytest.approx([x for _, x in evaluations], rel=1e-5)
    assert found["final"] == {"loss": kept[-1][1], "half": 0.5}
    assert found["train_loss"] == found["losses"][-1] and not found["diverged"]
    assert found["state_bytes"] >= 2 * 4 * sum(p.numel() for p in model.parameters())
    seconds = [e["processor_seconds"] for e in found["evaluations"]]
    assert seconds == sorted(seconds) and seconds[-1] <= found["processor_seconds"]


ELSEWHERE = ("schedulefree", "lora_plus", "lora_muon")  # below; of adapters, in controls/test_lora


@pytest.mark.parametrize("name", [n for n in optimizers.names() if n not in ELSEWHERE])
def test_every_optimizer_trains_and_a_seed_fixes_it(name, recwarn):
    fields = {"lr": 1e-2} | ({"include_bias": True} if name == "sgdph" else {})
    found = [train(run(name, fields, steps=6)) for _ in range(2)]
    assert found[0]["losses"] == found[1]["losses"]
    assert found[0]["final"] == found[1]["final"]
    assert len(found[0]["losses"]) == 6 and not found[0]["diverged"]


def test_trials_are_evaluated_at_the_end_alone_and_train_the_same():
    whole, trial = train(run()), train(run(course=False))
    assert [e["step"] for e in trial["evaluations"]] == [10]
    assert whole["losses"] == trial["losses"] and whole["final"] == trial["final"]


def test_a_loss_that_is_not_finite_ends_the_run():
    found = train(run("sgd", {"lr": 1e30}, steps=40, clip=0.0))
    assert found["diverged"] and found["final"] == {} and found["steps"] == 5


def test_what_is_not_finite_is_written_as_null(tmp_path):
    results.perform(run("sgd", {"lr": 1e30}, steps=40, clip=0.0), tmp_path / "a.json", print)
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found["diverged"] and None in found["losses"]
    assert results.read(tmp_path / "a.json") == found
    assert steps_to(0.0, found["evaluations"]) is None


def test_progress_is_told():
    told = []
    train(run(steps=25), told.append)
    assert told[-1] == 25 and told == sorted(told)


def test_schedule_free_is_evaluated_at_its_average():
    pytest.importorskip("schedulefree")
    found = train(run("schedulefree", {"lr": 1e-1}, steps=20, eval_every=1))
    assert len(found["evaluations"]) == 20
    plain = train(run("schedulefree", {"lr": 1e-1}, steps=20, course=False))
    # To rounding: every evaluation moves the weights to the average and back.
    assert plain["losses"] == pytest.approx(found["losses"], rel=1e-4)
    assert plain["final"] == pytest.approx(found["final"], rel=1e-4)


class TestLosses:
    """What a model may return."""

    model = torch.nn.Linear(2, 1)
    x = torch.ones(3, 2)

    def task(self, model, loss=None):
        return tasks.Task(model, [], lambda model: 0.0, loss)

    def test_a_tuple_is_positional_and_a_tensor_is_the_loss(self):
        class Net(torch.nn.Linear):
            def forward(self, x, y):
                return (super().forward(x) - y).square().mean()

        net = Net(2, 1)
        expected = net(self.x, 1.0)
        assert torch.equal(self.task(net).loss_of((self.x, 1.0)), expected)

    def test_a_function_of_ones_own(self):
        task = self.task(self.model, lambda model, batch: model(batch).sum())
        assert torch.equal(task.loss_of(self.x), self.model(self.x).sum())

    def test_no_loss_is_refused(self):
        with pytest.raises(TypeError, match="returns no loss"):
            self.task(self.model).loss_of(self.x)
