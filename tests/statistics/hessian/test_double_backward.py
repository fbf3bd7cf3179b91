"""Switches to kernels that can be differentiated twice: held no longer than they are needed."""

from contextlib import nullcontext

import torch
import torch._dynamo  # without it there is no stance to set
from torch import nn

from hf_precond.statistics.hessian import double_backward
from hf_precond.statistics.hessian.double_backward import DoubleBackward


def test_compilation_is_left_alone_where_nothing_was_compiled(monkeypatch):
    stances = []
    monkeypatch.setattr(
        torch.compiler, "set_stance", lambda stance: stances.append(stance) or nullcontext()
    )
    monkeypatch.setattr(double_backward, "compiled_code_runs", lambda: False)
    switches = DoubleBackward(nn.Linear(1, 1))
    switches.expect(True)
    assert stances == ["force_eager"]
    switches.expect(False)
    switches.expect(True)
    assert len(stances) == 1
    monkeypatch.setattr(double_backward, "compiled_code_runs", lambda: True)
    switches.expect(True)
    assert len(stances) == 2
    switches.release()
