"""Under autocast, the passes that are probed run in the precision of the weights."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_precond.architectures.modules import find_norms
from hf_precond.statistics.hessian_probe import CurvatureProbe, FullPrecision
from hf_precond.statistics.requests import CurvatureRequest

LOW = torch.bfloat16


class Model(nn.Module):
    """A product of its own between its children; notes the dtypes that linear layers yield."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
        self.own = nn.Parameter(torch.randn(6, 6))
        self.seen, self.checkpointed = [], False

    def forward(self, x, fail=False):
        hidden = self.first(x)
        self.seen.append(hidden.dtype)
        if fail:
            raise ArithmeticError
        hidden = hidden @ self.own
        if self.checkpointed:
            return checkpoint(self.last, hidden, use_reentrant=False)
        return self.last(hidden)


def as_accelerate_does(model):
    """Autocast inside the root's forward pass, where its own hooks do not see it."""
    model.forward = torch.autocast("cpu", LOW)(model.forward)
    return model


def open_source(model, autocast=False):
    norms = find_norms(model)
    return CurvatureProbe(
        model, [CurvatureRequest(n.name, n, "rademacher", autocast=autocast) for n in norms]
    )


def loss_of(model):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    return nn.functional.cross_entropy(model(x).float(), torch.arange(8) % 3)


def estimates(model, around=None, autocast=False):
    source = open_source(model, autocast)
    source.enable(True, 0)
    if around is None:
        source.observe(loss_of(model))
    else:
        with around:
            loss = loss_of(model)
            assert torch.is_autocast_enabled("cpu")
            source.observe(loss)
    assert not torch.is_autocast_enabled("cpu")
    taken = source.take()
    source.close()
    assert not any(module._forward_hooks for module in model.modules())
    return torch.cat([taken[key].sum for key in sorted(taken)])


def away(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_a_plain_loop_under_autocast():
    wanted = estimates(Model())
    assert away(estimates(Model(), torch.autocast("cpu", LOW)), wanted) < 1e-6
    assert away(estimates(Model(), torch.autocast("cpu", LOW), autocast=True), wanted) > 1e-4


def test_autocast_inside_the_forward_pass():
    """What the root itself computes between its children stays in low precision."""
    model = as_accelerate_does(Model())
    wanted = estimates(Model())
    found = estimates(model)
    assert model.seen == [torch.float32]
    low = estimates(as_accelerate_does(Model()), autocast=True)
    assert away(found, wanted) < 0.5 * away(low, wanted)


def test_steps_that_are_not_due_and_evaluations_keep_autocast():
    model = as_accelerate_does(Model())
    source = open_source(model)
    source.enable(False, 1)
    loss_of(model)
    source.enable(True, 20)
    with torch.no_grad():
        loss_of(model)
    assert model.seen == [LOW, LOW]
    source.close()


def test_a_failed_pass_gives_autocast_back():
    model = Model()
    source = open_source(model)
    source.enable(True, 0)
    with torch.autocast("cpu", LOW):
        with pytest.raises(ArithmeticError):
            model(torch.randn(2, 6), fail=True)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == LOW
    source.close()


def test_recomputed_activations_are_those_of_the_pass():
    model = as_accelerate_does(Model())
    wanted = estimates(model)
    model.checkpointed = True
    assert away(estimates(model), wanted) < 1e-6


def test_models_with_weights_in_low_precision_stay_under_autocast():
    """Otherwise float32 activations would meet bfloat16 weights."""
    model = as_accelerate_does(Model())
    model.first.to(LOW)
    assert estimates(model).dtype == torch.float32
    assert model.seen == [LOW]


def test_inputs_made_in_low_precision_are_cast():
    model = Model()
    source = open_source(model)
    source.enable(True, 0)
    with torch.autocast("cpu", LOW):
        model(torch.randn(2, 6).to(LOW))
    assert model.seen == [torch.float32]
    source.close()


def test_the_weights_are_looked_at_once_a_step(monkeypatch):
    model, looked = as_accelerate_does(Model()), []
    source = open_source(model)
    dtypes = FullPrecision._is_full

    def is_full(self):
        looked.append(self._full is None)
        return dtypes(self)

    monkeypatch.setattr(FullPrecision, "_is_full", is_full)
    for step, wanted in ((0, 1), (1, 1)):
        looked.clear()
        source.enable(True, step)
        for _ in range(2):
            source.observe(loss_of(model))
        source.take()
        assert sum(looked) == wanted and len(looked) > 2
    source.enable(True, 2)
    model.last.to(LOW)  # from now on autocast makes the dtypes fit
    source.observe(loss_of(model))
    assert model.seen[-1] == LOW
    source.close()


def test_a_module_may_write_to_what_it_is_called_with():
    class Collecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x, seen):
            seen.append(self.norm(x))
            return seen[-1]

    model, seen = Collecting(), []
    source = open_source(model)
    source.enable(True, 0)
    with torch.autocast("cpu", LOW):
        model(torch.randn(4, 6), seen)
    assert [hidden.dtype for hidden in seen] == [torch.float32]
    source.close()
