"""What is kept of a call of compute_loss, and what is put back after it was made again."""

import collections
import random
from types import SimpleNamespace

import numpy
import torch
from torch import nn
from transformers import BatchEncoding

from hf_precond.statistics.recorded_losses import (
    RandomState,
    RecordedLoss,
    copied,
    modules_of,
    snapshot,
)


def recorded(function=None, *args, **kwargs):
    return RecordedLoss(None, function, args, kwargs, nn.Linear(1, 1))


def test_the_factor_is_what_the_training_made_of_the_loss():
    """Divided in place, scaled, summed with another, and reached by two backward passes."""
    weight = torch.tensor(3.0, requires_grad=True)
    first, second, unused = recorded(), recorded(), recorded()
    one = first.watched(weight * 2)
    two, outputs = second.watched((weight * 5, "outputs"))
    assert outputs == "outputs"
    unused.watched(weight * 7)
    one /= 4
    (one * 8 + two).backward(retain_graph=True)
    two.backward()
    assert (first.factor, second.factor, unused.factor) == (2, 2, None)
    assert first.node is None and unused.node is not None
    assert weight.grad == 2 * 2 + 2 * 5


def test_what_has_no_graph_is_returned_as_it_is():
    call, loss = recorded(), torch.tensor(1.0)
    assert call.watched(loss) is loss and call.watched(None) is None and call.node is None


def test_hooks_of_the_loss_itself_run_once_a_backward_pass():
    weight, ran = torch.tensor(3.0, requires_grad=True), []
    loss = weight * 2
    loss.register_hook(lambda grad: ran.append(grad.item()))
    recorded().watched(loss).backward()
    assert ran == [1.0]


def test_a_call_is_made_again_with_its_arguments_and_random_numbers():
    def compute(inputs, extra):
        inputs["nested"].clear()
        drawn = random.random() + numpy.random.rand() + torch.rand(())
        return inputs.pop("x") * drawn + extra

    inputs = {"x": torch.ones(()), "nested": [1, 2]}
    call = recorded(compute, inputs, extra=2)
    values = [compute(inputs, extra=2), call.loss(True), call.loss(True)]
    assert values[0] == values[1] == values[2]
    assert call.args[0]["nested"] == [1, 2]


def test_containers_are_copied_and_tensors_shared():
    tensor = torch.ones(2)
    encoding = BatchEncoding({"input_ids": tensor})
    given = ({"a": [tensor, {"b": tensor}]}, encoding, tensor)
    plain, same, last = copied(given)
    plain["a"][1]["c"] = 1
    del same["input_ids"]
    assert given[0] == {"a": [tensor, {"b": tensor}]} and "input_ids" in encoding
    assert last is tensor and plain["a"][0] is tensor


def test_the_state_of_a_trainer_is_put_back_in_place():
    module = nn.Module()
    module.calls, module.losses = 1, [1.0]
    metrics = collections.defaultdict(list, {"loss": [1.0]})
    owner = SimpleNamespace(
        state=SimpleNamespace(tokens=3), metrics={"train": metrics}, total=torch.ones(()), tokens=5,
        recent=collections.deque([1, 2], maxlen=2), seen={1}, train_dataset=[{"x": [1]}],
    )  # fmt: skip
    losses = metrics["loss"]
    restore = snapshot([module], owner)
    module.calls += 1
    module.losses.append(2.0)
    losses.append(2.0)
    metrics["entropy"].append(1.0)
    owner.total += 1
    owner.tokens += 1
    owner.state.tokens += 1
    owner.recent.append(3)
    owner.seen.add(2)
    owner.new = 1
    owner.train_dataset[0]["x"].append(2)  # data are left alone
    restore()
    assert (module.calls, module.losses) == (1, [1.0])
    assert owner.metrics["train"] is metrics and dict(metrics) == {"loss": [1.0]}
    assert metrics["loss"] is losses
    assert (owner.total.item(), owner.tokens, owner.state.tokens) == (1.0, 5, 3)
    assert (list(owner.recent), owner.seen) == ([1, 2], {1}) and not hasattr(owner, "new")
    assert owner.train_dataset == [{"x": [1, 2]}]


def test_every_generator_is_put_back():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    state = RandomState([torch.ones(())])
    first = draw()
    state.restore()
    assert draw() == first


def test_modules_are_found_in_attributes_lists_and_dictionaries():
    one, two, three = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    owner = SimpleNamespace(model=one, loss={"a": two}, rewards=[three, len], name="x")
    assert modules_of(owner) == [one, two, three]
