"""Compiled code runs uncompiled no longer than it must."""

from contextlib import nullcontext

import torch
import torch._dynamo  # without it there is no stance to set

from hf_precond.compat import torch_internals
from hf_precond.compat.torch_internals import EagerCode


def test_compilation_is_left_alone_where_nothing_was_compiled(monkeypatch):
    stances = []
    monkeypatch.setattr(
        torch.compiler, "set_stance", lambda stance: stances.append(stance) or nullcontext()
    )
    monkeypatch.setattr(torch_internals, "compiled_code_runs", lambda: False)
    code = EagerCode()
    code.expect(True)
    assert stances == ["force_eager"]
    code.expect(False)
    code.expect(True)
    assert len(stances) == 1
    monkeypatch.setattr(torch_internals, "compiled_code_runs", lambda: True)
    code.expect(True)
    assert len(stances) == 2
    code.release()
