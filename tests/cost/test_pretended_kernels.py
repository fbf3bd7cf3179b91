"""The stand-ins of the Triton kernels: shapes and dtypes of the originals, and their traffic."""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_precond.cost import pretended_kernels
from hf_precond.cost.counting import OperationCounter

real = pytest.importorskip("hf_precond.optimizers.base.triton_kernels")
ROWS, COLUMNS = 5, 6
OPTIONS = {
    "decay": 0.9, "started": True, "noise": 0.3, "length": 5.0, "longest": 2.0, "height": 64.0,
    "nesterov": True, "blocks": 2, "own": 4, "wide": 8,
}  # fmt: skip
CALLS = {
    "advance": lambda k, g: k.advance(
        g, torch.zeros(3, ROWS, 8), torch.ones(3), COLUMNS, 0.9, **OPTIONS
    ),
    "frobenius_norms": lambda k, g: k.frobenius_norms(g, COLUMNS),
    "halved": lambda k, g: k.halved(g, torch.ones(3), COLUMNS, (8, 8)),
    "scaled_steps": lambda k, g: k.scaled_steps(
        torch.ones(3, 8, 8).half(), torch.ones(3), COLUMNS, True, ROWS
    ),
    "descend": lambda k, g: k.descend(
        g, torch.ones(3, ROWS, 16).half(), torch.ones(3), torch.ones(3), COLUMNS, 4, 8, (1.0,) * 4
    ),
    "unpacked": lambda k, g: k.unpacked(torch.ones(3, 2, 21), torch.ones(3), 6, 8),
}


def gradients(kernels):
    weights = [torch.ones(ROWS, COLUMNS) for _ in range(3)]
    return kernels.Matrices(weights, [torch.ones(ROWS) for _ in range(3)])


def about(found):
    found = found if isinstance(found, tuple) else (found,)
    return [t if t is None else (tuple(t.shape), t.dtype) for t in found]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the originals are interpreted on CPUs")
def test_results_are_shaped_alike(name):
    expected = about(CALLS[name](real, gradients(real)))
    with FakeTensorMode():
        assert about(CALLS[name](pretended_kernels, gradients(pretended_kernels))) == expected


def test_every_function_has_a_stand_in():
    functions = {
        name
        for name, value in vars(real).items()
        if inspect.isfunction(value) and value.__module__ == real.__name__ and name[0] != "_"
    }
    assert functions - {"usable", "trial"} == set(CALLS) == set(dir(pretended_kernels)) & set(CALLS)


def test_traffic():
    with FakeTensorMode(), OperationCounter("cpu") as seen:
        found = gradients(pretended_kernels)
        momentum, usual = torch.empty(3, ROWS, 8), torch.empty(3)
        seen.records.clear()
        pretended_kernels.advance(found, momentum, usual, COLUMNS, 0.9, **OPTIONS)
    kernels = [kernel for kernel in seen.records if kernel.name == pretended_kernels.KERNEL]
    grads, numbers = 3 * ROWS * (COLUMNS + 1), 3 * ROWS * 8
    half = 2 * 3 * ROWS * 16
    expected = [4 * (grads + 2 * numbers + 6), 4 * (6 + 3 + 6), 4 * (grads + numbers) + half]
    assert [kernel.bytes for kernel in kernels] == expected
    assert all(kernel.launches == 1 for kernel in kernels)
